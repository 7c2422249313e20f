"""Export: transformers loads what was asked for, in every family, and nothing else appears."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from flextron import ExportReport, export
from flextron.costs.latency import measure_latency
from flextron.costs.saved import save_table
from flextron.data.blocks import load_blocks
from flextron.elastic import per_layer
from flextron.elastic.families import FAMILIES
from flextron.errors import CheckpointError, ExportError, SubnetError
from flextron.exporting import cutting, hf
from flextron.model import ElasticModel
from flextron.ranking.importance import rank
from flextron.subnet import Subnet

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OWN_SIZES = {
    "mistral": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.4},
    "gpt2": {"n_inner": 40},
}
FEWER_HEADS = {model_type: family.exports_fewer_heads for model_type, family in FAMILIES.items()}
PROMPT = torch.tensor([[5, 17, 3, 88, 41]])


def tiny(model_type, **changes):
    """A random elastic model in which every weight, also in biases and norms, differs from its neighbours."""
    sizes = {**SIZES, **OWN_SIZES.get(model_type, {}), **changes}
    if not FEWER_HEADS[model_type] or model_type == "phi":
        del sizes["head_dim"]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return ElasticModel(lm)


def uneven(model):
    """Widths that differ between layers; the first attention is skipped, because transformers asks its cache."""
    groups = model.search_space.kv_groups[-1]
    fewer = (2, groups, 1) if model.family.exports_fewer_heads else (groups,) * 3
    return Subnet((16, 0, 40, 24), (0, *fewer))


def logits(model, tokens=PROMPT):
    with torch.inference_mode():
        return model(tokens).logits


def greedy(model, **how):
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False, pad_token_id=0, **how
    )


@dataclass
class Exported:
    model: ElasticModel
    subnet: Subnet
    folder: Path
    report: ExportReport
    reloaded: torch.nn.Module


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def exported(request, tmp_path_factory):
    model = tiny(request.param)
    folder = tmp_path_factory.mktemp("export") / request.param
    report = export(model, uneven(model), folder)
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return Exported(model, uneven(model), folder, report, reloaded)


class TestEveryFamily:
    def test_per_layer_widths_compute_the_same(self, exported):
        with exported.model.use(exported.subnet):
            wanted = logits(exported.model)
        torch.testing.assert_close(logits(exported.reloaded), wanted, atol=1e-5, rtol=0)
        assert not torch.allclose(wanted, logits(exported.model), atol=1e-2)  # otherwise this would show nothing

    def test_generates_the_same_without_cache_and_with_each(self, exported):
        with exported.model.use(exported.subnet):
            wanted = greedy(exported.model, use_cache=False)
        assert wanted.shape == (1, 13)
        for how in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
            assert torch.equal(greedy(exported.reloaded, **how), wanted), how

    def test_the_config_states_the_sizes_by_the_standard(self, exported):
        config = json.loads((exported.folder / "config.json").read_text())
        original = exported.model.config.model_type
        assert config["model_type"] == exported.report.architecture == f"flextron_{original}"
        assert config["per_layer_config"]["0"]["skip"] == ["attention"]
        assert config["per_layer_config"]["1"]["skip"] == ["mlp"]
        layers = AutoConfig.from_pretrained(exported.folder).per_layer_config
        neurons, groups = (axis.config_keys[0] for axis in (exported.model.family.mlp, exported.model.family.attention))
        assert [getattr(layer, neurons) for layer in layers if "mlp" not in layer.skip] == [16, 40, 24]
        kept = [getattr(layer, groups) for layer in layers if "attention" not in layer.skip]
        assert kept == list(exported.subnet.kv_groups[1:])

    def test_the_report_tells_what_was_asked_and_got(self, exported):
        report = exported.report
        held = sum(p.numel() for p in exported.reloaded.parameters())
        assert report.parameters_got == report.parameters_asked == held
        assert held < sum(p.numel() for p in exported.model.lm.parameters())
        assert report.bytes_got == (exported.folder / "model.safetensors").stat().st_size > 4 * held
        assert report.share == exported.model.share(exported.subnet) < 1
        assert report.subnet == exported.subnet
        assert report.folder == str(exported.folder)
        assert 0 <= report.largest_logit_difference < 1e-5

    def test_saves_and_loads_again(self, exported, tmp_path):
        exported.reloaded.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is type(exported.reloaded)
        assert torch.equal(logits(again), logits(exported.reloaded))

    def test_the_base_model_loads_too(self, exported):
        base = AutoModel.from_pretrained(exported.folder)
        body = getattr(exported.reloaded, exported.reloaded.base_model_prefix)
        with torch.inference_mode():
            assert torch.equal(base(PROMPT).last_hidden_state, body(PROMPT).last_hidden_state)

    def test_can_be_made_from_its_config(self, exported):
        config = AutoConfig.from_pretrained(exported.folder)
        for auto in (AutoModel, AutoModelForCausalLM):
            fresh = auto.from_config(config)
            spread = {name: float(p.detach().std()) for name, p in fresh.named_parameters() if p.ndim == 2}
            assert max(spread.values()) < 1.5 * config.initializer_range, spread  # not torch's own initialisation
        assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) is config.tie_word_embeddings

    def test_learns(self, exported):
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(exported.folder))
        fresh(PROMPT, labels=PROMPT).loss.backward()
        idle = [name for name, p in fresh.named_parameters() if p.grad is None]
        assert all("norm" in name or "ln_" in name for name in idle), idle  # norms before a skipped sub-layer

    def test_equal_widths_give_the_original_architecture(self, exported, tmp_path):
        model = exported.model
        groups = 2 if model.family.exports_fewer_heads else model.search_space.kv_groups[-1]
        subnet = model.search_space.uniform(neurons=24, kv_groups=groups)
        report = export(model, subnet, tmp_path / "out")
        assert report.architecture == model.config.model_type
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert reloaded.__class__.__module__.startswith("transformers.")
        assert report.parameters_asked == report.parameters_got == sum(p.numel() for p in reloaded.parameters())
        with model.use(subnet):
            wanted = logits(model)
        torch.testing.assert_close(logits(reloaded), wanted, atol=1e-5, rtol=0)

    def test_the_full_model_comes_out_as_it_was(self, exported, tmp_path):
        model = exported.model
        report = export(model, model.search_space.full, tmp_path / "out")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert report.share == 1
        assert reloaded.config.to_diff_dict() == {
            **model.config.to_diff_dict(),
            "architectures": [type(model.lm).__name__],
            "dtype": "float32",
        }
        for name, weight in model.lm.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], weight), name


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_all_sub_layers_of_one_kind_can_be_skipped(model_type, tmp_path):
    model = tiny(model_type)
    for name, subnet in {
        "attention": model.search_space.uniform(kv_groups=0),
        "mlp": model.search_space.uniform(neurons=0),
        "both": model.search_space.uniform(0, 0),
    }.items():
        report = export(model, subnet, tmp_path / name)
        assert report.parameters_asked == report.parameters_got
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with model.use(subnet):
            assert torch.equal(greedy(reloaded), greedy(model, use_cache=False))


def test_equal_widths_that_the_stock_config_refuses_become_per_layer(tmp_path):
    model = tiny("llama", num_key_value_heads=6)
    subnet = model.search_space.uniform(kv_groups=5)  # LlamaConfig wants 48 to be a multiple of the heads
    report = export(model, subnet, tmp_path / "out")
    assert report.architecture == "flextron_llama"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.num_attention_heads == 5
    assert reloaded.config.head_dim == 8
    with model.use(subnet):
        assert torch.equal(greedy(reloaded), greedy(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    model = tiny("llama", tie_word_embeddings=tied)
    export(model, uneven(model), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype, tmp_path):
    model = tiny("qwen2")
    model.lm.to(dtype)
    report = export(model, uneven(model), tmp_path / "out")
    assert report.bytes_got < 2.2 * report.parameters_got
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in reloaded.parameters()} == {dtype}


def test_dropout_of_a_model_in_training_does_not_disturb(tmp_path):
    model = tiny("gpt2")
    model.lm.train()
    assert export(model, uneven(model), tmp_path / "out").largest_logit_difference < 1e-5
    assert model.lm.training
    assert model.subnet == model.search_space.full


@pytest.mark.parametrize("widths", ["equal", "uneven"])
def test_tokenizer_and_generation_config_come_along(widths, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tiny("llama")
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model.lm.generation_config.max_new_tokens = 3
    export(model, uneven(model) if widths == "uneven" else model.search_space.uniform(8), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("two one").input_ids == [2, 1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 3


def test_the_model_card_tells_where_it_comes_from(checkpoint, tmp_path):
    model = ElasticModel.from_pretrained(checkpoint)
    rank(model, load_blocks(model.tokenizer, "sample/train", tokens=512, block_tokens=64))
    model.save_pretrained(tmp_path / "elastic")
    about = {"data": ["/home/someone/books.jsonl"], "tokens": 1024}
    run = {"text": about, "optimizer": {"learning_rate": 1e-3}, "arithmetic": "fp32", "seed": 0}
    (tmp_path / "elastic" / "train.json").write_text(json.dumps(run))
    save_table(tmp_path / "elastic", measure_latency(model, tokens=8, designs=8, held_out=0, rounds=1))
    model = ElasticModel.from_pretrained(tmp_path / "elastic")
    subnet = model.search_space.uniform(24, 2)
    report = export(model, subnet, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"# A sub-network of elastic\n\n{subnet}: {model.share(subnet):.1%}" in card
    assert f"{report.parameters_got:,} parameters" in card
    assert "Ranked by reconstruction on 512 tokens of sample/train" in card
    assert "1,024 tokens of books.jsonl; learning rate 0.001, fp32, seed 0" in card
    assert "/home/someone" not in card
    assert re.search(r"\| tpot \| [\d.]+ ms \| [\d.]+ ms \| device ", card)
    assert f"torch {torch.__version__}" in card


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_not_verified_says_so(verify, llama, tmp_path):
    report = export(llama, uneven(llama), tmp_path / "out", verify=verify)
    assert (report.largest_logit_difference is None) is not verify
    assert ("not verified" in str(report)) is not verify


def test_large_weights_are_sharded(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "LARGEST_FILE", "50KB")
    report = export(llama, uneven(llama), tmp_path / "out")
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert report.bytes_got == sum(file.stat().st_size for file in shards)


def test_attention_kernel_can_be_changed_after_loading(llama, tmp_path):
    export(llama, uneven(llama), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = logits(reloaded)
    reloaded.set_attn_implementation("eager")
    outputs = reloaded(PROMPT, output_attentions=True)
    assert [weights.shape[1] for weights in outputs.attentions] == [4, 6, 2]  # heads of the layers that have any
    torch.testing.assert_close(outputs.logits, wanted, atol=1e-5, rtol=0)


LOAD = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code={trust})
    with torch.inference_mode():
        torch.save(lm(torch.tensor({prompt})).logits, folder + "/logits.pt")
    print(type(lm).__module__)
"""


def load_elsewhere(*folders, before, trust, cache):
    script = LOAD.format(before=before, trust=trust, prompt=PROMPT.tolist())
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), [torch.load(folder / "logits.pt") for folder in folders]


def test_loads_where_flextron_is_missing(llama, tmp_path):
    equal, per_layer_ = llama.search_space.uniform(24, 2), uneven(llama)
    export(llama, equal, tmp_path / "plain", remote_code=True)
    export(llama, per_layer_, tmp_path / "remote", remote_code=True)
    assert not (tmp_path / "plain" / "modeling_flextron.py").exists()  # not needed there
    modules, found = load_elsewhere(
        tmp_path / "plain",
        tmp_path / "remote",
        before="sys.modules['flextron'] = None",
        trust=True,
        cache=tmp_path / "cache",
    )
    assert modules[0] == "transformers.models.llama.modeling_llama"
    assert modules[1].startswith("transformers_modules.")
    for subnet, there in zip((equal, per_layer_), found, strict=True):
        with llama.use(subnet):
            torch.testing.assert_close(there, logits(llama), atol=1e-5, rtol=0)


def test_import_flextron_is_all_it_takes(llama, tmp_path):
    export(llama, uneven(llama), tmp_path / "out")
    modules, (there,) = load_elsewhere(tmp_path / "out", before="import flextron", trust=False, cache=tmp_path)
    assert modules == ["flextron.elastic.per_layer"]
    assert not (tmp_path / "out" / "modeling_flextron.py").exists()  # only on request
    with llama.use(uneven(llama)):
        torch.testing.assert_close(there, logits(llama), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", [name for name, fewer in FEWER_HEADS.items() if not fewer])
def test_fewer_heads_are_refused_where_the_config_cannot_state_them(model_type, tmp_path):
    model = tiny(model_type)
    reason = rf"layer 0 keeps 2 of 6 attention heads, but {model_type} cannot express that.*Keep 6 or 0 heads"
    with pytest.raises(ExportError, match=reason):
        export(model, model.search_space.uniform(kv_groups=2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_the_architecture_cannot_hold_are_refused(tmp_path):
    model = tiny("phi", qk_layernorm=True)  # PhiAttention assumes its size is hidden size / heads
    with pytest.raises(ExportError, match=r"phi cannot hold .* 2 KV groups\. Keep the full width[^q]*q_layernorm"):
        export(model, model.search_space.uniform(kv_groups=2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays_unless_told_otherwise(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists"):
        export(llama, uneven(llama), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    export(llama, uneven(llama), tmp_path, overwrite=True)
    assert not (tmp_path / "notes.txt").exists()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "flextron_llama"


def test_an_elastic_checkpoint_is_never_replaced(llama, tmp_path):
    folder = tmp_path / "elastic"
    llama.save_pretrained(folder)
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(CheckpointError, match="is an elastic checkpoint, which an export never replaces"):
        export(llama, uneven(llama), folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == before
    ElasticModel.from_pretrained(folder)


def test_a_subnet_of_another_model_is_refused(llama, tmp_path):
    with pytest.raises(SubnetError, match="5 layers"):
        export(llama, Subnet((8,) * 5, (1,) * 5), tmp_path / "out")


def test_a_wrong_export_never_appears(llama, tmp_path, monkeypatch):
    def last(weight, sub_layer, *, dim, stacked=1):
        kept = sub_layer.width.of(weight.shape[dim])
        return weight.narrow(dim, weight.shape[dim] - kept, kept)

    monkeypatch.setattr(cutting, "_first", last)
    with pytest.raises(ExportError, match="computes something else: its logits differ by up to"):
        export(llama, uneven(llama), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(llama, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes in one file: the config fits, the weights do not
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            export(llama, uneven(llama), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"skip": ["attn"]}, r"per_layer_config\[1\] skips \['attn'\]"),
        ({"num_attention_heads": 5}, r"per_layer_config\[1\] has 5 attention heads, not a multiple of its 3"),
    ],
)
def test_a_config_that_no_layer_could_have_is_refused(layer, reason):
    config = per_layer.classes_of("llama").config
    with pytest.raises(Exception, match=reason):
        config(**SIZES, per_layer_config={1: layer})


def test_every_class_is_found_by_name():
    for model_type in FAMILIES:
        for cls in per_layer.classes_of(model_type):
            assert getattr(per_layer, cls.__name__) is cls
    assert per_layer.FlextronLlamaForCausalLM.config_class is per_layer.FlextronLlamaConfig
