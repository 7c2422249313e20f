"""Decoders without an entry in FAMILIES: found from their modules, held against the contract, used on the whole way."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import tiny
from flextron.cli import main
from flextron.costs.formulas import formula_table
from flextron.data.blocks import TokenBlocks
from flextron.elastic import coverage
from flextron.elastic.contract import BrokenContractError, check_contract, random_ranking
from flextron.elastic.coverage import CoverageWarning, coverage_of
from flextron.elastic.discovery import discover, family_for
from flextron.elastic.families import FAMILIES, LLAMA_LIKE
from flextron.elastic.inspecting import entry, inspect
from flextron.elastic.permutation import permute
from flextron.elastic.shrinking import HEADS, small_config, small_copy
from flextron.errors import CheckpointError, FlextronError, UnknownFamilyError
from flextron.exporting.hf import export
from flextron.exporting.trying import exports_of
from flextron.generation import generate
from flextron.inference.decoder import supports
from flextron.inference.per_token import TokenWidths, use_token_widths
from flextron.model import ElasticModel
from flextron.ranking.curvature import estimate_sensitivity
from flextron.ranking.importance import rank
from flextron.ranking.sensitivity import measure_sensitivity
from flextron.subnet import Subnet

KINDS = {
    "olmo2": ("3 of 96 neurons", "whole"),  # its QK norm reads all heads at once
    "phi3": ("3 of 96 neurons", "whole"),  # gate and up in one weight; Q, K, V too, of unequal sizes
    "lfm3": ("3 of 96 neurons", "whole"),  # convolutions in place of some attentions
    "opt": ("3 of 96 neurons", "4 of 1"),  # an MLP without a module of its own
    "gptj": ("3 of 96 neurons", "4 of 1"),  # attributes count heads
    "cohere": ("3 of 96 neurons", "4 of 1"),  # logits are scaled
    "qwen3_moe": ("3 of 8 neurons", "2 of 2"),  # experts
    "glm4_moe": ("3 of 8 neurons", "2 of 2"),  # an MLP in the first layer, experts beside shared ones in the others
}
"""One type of each kind: layers and neurons, and KV groups with their query heads."""


def small(model_type: str, **changes) -> torch.nn.Module:
    return small_copy(AutoConfig.for_model(model_type), **changes)


def elastic(model_type: str, **changes) -> ElasticModel:
    lm = small(model_type, **changes)
    return ElasticModel(lm, family=family_for(AutoConfig.for_model(model_type)))


@pytest.mark.parametrize("model_type", KINDS)
def test_finds_what_narrows(model_type):
    """`discover` holds its answer against the contract."""
    model = elastic(model_type)
    attention = model.layers[0].attention
    units = f"{attention.width.full} of {attention.heads_per_unit}" if attention.axis.narrows else "whole"
    assert (f"{len(model.layers)} of {model.layers[0].mlp.width.full} neurons", units) == KINDS[model_type]
    assert coverage_of(model).held > 0.9


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_finds_what_was_written_by_hand(model_type):
    assert discover(AutoConfig.for_model(model_type)).family == FAMILIES[model_type]


def test_a_wrong_guess_does_not_pass():
    lm = small("llama", num_key_value_heads=2)
    check_contract(lm, LLAMA_LIKE)
    for axis, fields in (("mlp", {"opens": ("mlp.gate_proj",)}), ("attention", {"closes": "self_attn.v_proj"})):
        wrong = replace(LLAMA_LIKE, **{axis: replace(getattr(LLAMA_LIKE, axis), **fields)})
        with pytest.raises(BrokenContractError, match=r"narrowed equals masked|is elastic already"):
            check_contract(lm, wrong)


def test_logits_that_the_loss_would_compute_wrongly_show(monkeypatch):
    lm, family = small("granite"), FAMILIES["granite"]
    monkeypatch.setattr("flextron.elastic.contract.logits_of", lambda lm, h: lm.get_output_embeddings()(h))
    with pytest.raises(BrokenContractError, match="logits follow from hidden states"):
        check_contract(lm, family)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "predictions depend on later tokens, as an encoder's do"),
        ("mamba", "a layer has no MLP"),
        ("bloom", "fails the contract: narrowed equals masked"),
        ("bitnet", "fails the contract"),
    ],
)
def test_what_cannot_narrow_says_why(model_type, reason):
    with pytest.raises(UnknownFamilyError, match=rf"cannot narrow the architecture '{model_type}': .*{reason}"):
        discover(AutoConfig.for_model(model_type))


class TestCoverage:
    def test_little_is_told_with_numbers_and_too_little_refused(self, monkeypatch):
        monkeypatch.setattr(coverage, "ENOUGH_NARROWING", 0.9)
        with pytest.warns(CoverageWarning, match=r"olmo2: \d+% of the layers' weights narrows, \d+% is left"):
            ElasticModel(small("olmo2"))
        monkeypatch.setattr(coverage, "LEAST_NARROWING", 0.9)
        with pytest.raises(UnknownFamilyError, match=r"only \d+% of the layers' weights narrows, .* at least 90% must"):
            ElasticModel(small("olmo2"))


class TestCoupled:
    """OLMo 2, whose attentions are kept or left out as a whole, on the whole way."""

    @pytest.fixture
    def model(self):
        return elastic("olmo2", vocab_size=tiny.VOCAB)

    def test_from_ranking_to_an_export(self, model, tmp_path):
        blocks = tiny.blocks(rows=8)
        rank(model, blocks)
        assert model.search_space.kv_groups == (0, 1)
        for learn in (measure_sensitivity, estimate_sensitivity):
            sensitivity = learn(model, blocks)
            assert 0 < sensitivity.share(sensitivity.allocate(0.6)) <= 0.6
        subnet = Subnet((96, 48, 0), (1, 0, 1))
        report = export(model, subnet, tmp_path / "out")
        assert report.parameters_got == report.parameters_asked == formula_table(model, "parameters").price(subnet)
        model.save_pretrained(tmp_path / "saved")
        loaded = ElasticModel.from_pretrained(tmp_path / "saved")
        with loaded.use(subnet), model.use(subnet):
            tiny.assert_same_function(tiny.logits_of(loaded, blocks.tokens), tiny.logits_of(model, blocks.tokens))

    def test_prices_of_a_whole_attention(self, model):
        full, without = model.search_space.full, model.search_space.uniform(kv_groups=0)
        kv = formula_table(model, "kv", context_tokens=10)
        assert kv.price(full) == 3 * 10 * 2 * 64 * 4
        assert kv.price(without) == 0
        flops = formula_table(model, "flops")
        assert flops.price(full) - flops.price(without) == 3 * 2 * 4 * 64 * 64

    def test_rows_and_tokens_of_their_own_widths(self, model):
        tokens = tiny.token_ids(3, 6)
        rows = [Subnet((96, 48, 0), (1, 0, 1)), Subnet((48, 96, 96), (0, 0, 1)), model.search_space.full]
        with use_token_widths(model, TokenWidths.of_rows(model, rows)):
            together = model(tokens, use_cache=False).logits
        for row, subnet in enumerate(rows):
            with model.use(subnet):
                tiny.assert_same_function(together[row], model(tokens[row : row + 1], use_cache=False).logits[0])


@pytest.mark.parametrize("model_type", ["starcoder2", "stablelm", "arcee"])
def test_layers_that_look_like_those_of_a_family_decode_fast(model_type):
    """LayerNorms, part of a head rotated, no gate, a squared relu."""
    model = elastic(model_type, vocab_size=303)
    model.tokenizer = tiny.tokenizer()
    assert supports(model)
    subnet = model.search_space.uniform(model.search_space.neurons[2], 1)
    texts = [generate(model, "The quick", subnet=subnet, max_new_tokens=9, fast=fast) for fast in (True, False)]
    assert texts[0] == texts[1]


class TestMixture:
    """A mixture of experts, whose units are experts, on the whole way."""

    @pytest.fixture
    def model(self):
        return elastic("qwen3_moe", vocab_size=tiny.VOCAB)

    def test_keeps_as_many_experts_as_a_token_is_routed_to(self, model):
        assert model.least_units == 2
        assert model.search_space.neurons == (0, 2, 3, 4, 5, 6, 7, 8)

    @pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
    def test_from_ranking_to_an_export(self, model_type, tmp_path):
        model = elastic(model_type, vocab_size=tiny.VOCAB)
        blocks = tiny.blocks(rows=8)
        full = tiny.logits_of(model, blocks.tokens)
        rank(model, blocks)
        tiny.assert_same_function(tiny.logits_of(model, blocks.tokens), full)
        sensitivity = estimate_sensitivity(model, blocks)
        assert 0 < sensitivity.share(sensitivity.allocate(0.6)) <= 0.6
        for name, subnet in {
            "equal": model.search_space.uniform(neurons=4),
            "unequal": Subnet((8, 4, 2), (2, 1, 0)),
        }.items():
            report = export(model, subnet, tmp_path / name)
            assert report.parameters_got == report.parameters_asked == formula_table(model, "parameters").price(subnet)
        model.save_pretrained(tmp_path / "saved")
        loaded = ElasticModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded.ranking.neurons, model.ranking.neurons)
        with loaded.use(subnet), model.use(subnet):
            tiny.assert_same_function(tiny.logits_of(loaded, blocks.tokens), tiny.logits_of(model, blocks.tokens))

    @pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
    def test_decoding_is_left_to_transformers(self, model_type):
        model = elastic(model_type, vocab_size=303)
        model.tokenizer = tiny.tokenizer()
        subnet = model.search_space.uniform(neurons=4)
        texts = [generate(model, "The quick", subnet=subnet, max_new_tokens=5, fast=fast) for fast in (True, False)]
        assert texts[0] == texts[1]

    def test_a_token_costs_as_many_operations_with_fewer_experts(self, model):
        flops = formula_table(model, "flops")
        assert flops.price(model.search_space.uniform(neurons=2)) == flops.price(model.search_space.full)
        assert flops.price(model.search_space.uniform(neurons=0)) < flops.price(model.search_space.full)

    def test_ranked_experts_beat_random_ones(self):
        """A small mixture, trained from nothing on words of which each begins with a letter of its own."""
        torch.manual_seed(0)
        lm = small("qwen3_moe", vocab_size=40, num_experts=16)
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(3, 40, (12, 4), generator=draw)

        def text(rows: int) -> torch.Tensor:
            frequent = torch.rand(rows, 6, generator=draw).square().mul(12).long()  # few words are frequent
            return words[frequent].flatten(1)

        optimizer = torch.optim.AdamW(lm.parameters(), lr=6e-3)
        for _ in range(60):
            tokens = text(8)
            lm(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        lm.eval()
        held_out, rows = text(32), text(32)
        half = Subnet((4,) * 3, (2,) * 3)

        def loss(order) -> float:
            model = ElasticModel(copy.deepcopy(lm))
            order(model)
            with model.use(half), torch.no_grad():
                return model(held_out, labels=held_out).loss.item()

        def at_random(seed: int):
            return lambda model: permute(model, replace(random_ranking(model, seed), query_heads=whole_heads(model)))

        def whole_heads(model):
            return torch.arange(2, dtype=torch.int32).expand(3, 2, 2).clone()

        ranked = loss(lambda model: rank(model, TokenBlocks(rows, torch.full_like(rows, 3), "words")))
        others = [loss(at_random(seed)) for seed in range(4)]
        assert ranked < sum(others) / len(others) - 0.05


def test_tokens_cannot_have_their_own_widths_without_a_module():
    model = elastic("opt")
    widths = TokenWidths.of_rows(model, [model.search_space.full])
    with (
        pytest.raises(FlextronError, match="MLPs of opt are mixtures of experts or not modules of their own"),
        use_token_widths(model, widths),
    ):
        pytest.fail("the block must not run")


def test_positions_of_opt_are_not_the_rows_of_its_table():
    assert elastic("opt").positions == 128


@pytest.mark.parametrize("model_type", ["opt"])
def test_exports(model_type):
    config = AutoConfig.for_model(model_type)
    assert exports_of(config, family_for(config)) == ("hf", "hf per layer")


@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral3"])
def test_the_text_model_of_a_multimodal_checkpoint(kind, tmp_path):
    config = AutoConfig.for_model(kind)
    text = small_config(config.get_text_config()).to_dict()
    vision = {**config.vision_config.to_dict(), "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 1, "depth": 1, "num_heads": 4, "out_hidden_size": 64, "head_dim": 16}
    vision["deepstack_visual_indexes"] = [0]
    fields = {**config.to_dict(), "text_config": text, "vision_config": vision}
    del fields["model_type"]
    lm = AutoModelForImageTextToText.from_config(type(config).from_dict(fields), dtype=torch.float32).eval()
    lm.save_pretrained(tmp_path / "both")
    tokens = tiny.token_ids()
    expected = tiny.logits_of(lm, tokens)
    model = ElasticModel.from_pretrained(tmp_path / "both")
    assert model.config.model_type in ("qwen3", "mistral")
    tiny.assert_same_function(tiny.logits_of(model, tokens), expected)
    model.save_pretrained(tmp_path / "text")
    tiny.assert_same_function(tiny.logits_of(ElasticModel.from_pretrained(tmp_path / "text"), tokens), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a small OLMo 2; to read, never to change."""
    folder = tmp_path_factory.mktemp("olmo2")
    small("olmo2").save_pretrained(folder)
    return folder


class TestInspect:
    def test_prints_what_narrows_and_the_entry(self, folder, capsys):
        assert main(["inspect", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert "olmo2: found by discovery; the contract holds" in printed
        assert "96 neurons" in printed
        assert "left out as a whole" in printed
        assert '"olmo2": Family(' in printed
        assert "exports: hf, hf per layer" in printed

    def test_the_entry_is_code(self, folder):
        family = inspect(ElasticModel.from_pretrained(folder)).family
        names = {"Family": type(family), "Axis": type(family.mlp)}
        assert eval(f"{{{entry('olmo2', family)}}}", names) == {"olmo2": family}  # noqa: S307

    def test_a_written_entry_that_is_wrong_is_one_line(self, folder, monkeypatch, capsys):
        mlp = replace(LLAMA_LIKE.mlp, norm="")
        attention = replace(LLAMA_LIKE.attention, norm="")
        monkeypatch.setitem(FAMILIES, "olmo2", replace(LLAMA_LIKE, mlp=mlp, attention=attention))
        assert main(["inspect", str(folder)]) == 2
        assert "the entry FAMILIES['olmo2'] is wrong: " in capsys.readouterr().err
        lacking = replace(LLAMA_LIKE, mlp=replace(LLAMA_LIKE.mlp, closes="mlp.fc2"))
        monkeypatch.setitem(FAMILIES, "olmo2", lacking)
        assert main(["inspect", str(folder)]) == 2
        assert "Olmo2DecoderLayer has no 'mlp.fc2'; the family spec is wrong." in capsys.readouterr().err

    @pytest.mark.parametrize(
        "record", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "awq", "bits": 4}]
    )
    def test_a_quantised_checkpoint_is_refused_by_name(self, folder, tmp_path, record):
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=rf"is quantised \({record['quant_method']}\): .* in bfloat16"):
            ElasticModel.from_pretrained(tmp_path)


def test_small_copies_keep_the_kinds_of_layers():
    config = small_config(AutoConfig.for_model("lfm3"))
    assert set(config.layer_types) == set(AutoConfig.for_model("lfm3").layer_types)
    assert small_config(AutoConfig.for_model("starcoder2")).num_key_value_heads == HEADS // 2


@pytest.mark.slow
def test_the_page_of_architectures():
    """docs/architectures.md is what the command writes, and at least 75 types work."""
    page = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
    before = page.read_text(encoding="utf8")
    try:
        subprocess.run([sys.executable, "tools/architectures.py"], check=True, cwd=page.parent.parent)
        after = page.read_text(encoding="utf8")
    finally:
        page.write_text(before, encoding="utf8")
    assert after == before
