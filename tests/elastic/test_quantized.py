"""int8 weights: every sub-network computes what float weights of the same values compute, in a quarter of the bytes."""

import copy

import pytest
import torch

import tiny
from flextron import ElasticModel
from flextron.cli import main
from flextron.costs.formulas import formula_table
from flextron.elastic.quantized import OutputLinear, quantize
from flextron.errors import CheckpointError, FlextronError
from flextron.exporting import hf
from flextron.exporting.gguf.file import export_gguf
from flextron.inference import per_token
from flextron.inference.decoder import Decoder, supports
from flextron.inference.per_token import TokenWidths, use_token_widths
from flextron.subnet import AXES, Subnet

TYPES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi")
TIME = 9


@pytest.fixture(params=TYPES)
def models(request):
    """A quantised model, and the same values in float."""
    return both(request.param)


def both(model_type, **changes):
    quantised = ElasticModel(tiny.plain_model(model_type, **changes), tiny.tokenizer())
    quantize(quantised)
    floats = ElasticModel(tiny.plain_model(model_type, **changes), tiny.tokenizer())
    held = dict(quantised.lm.named_modules())
    for name, module in floats.lm.named_modules():
        scale = getattr(held[name], "scale", None)
        if isinstance(scale, torch.Tensor):
            weight = held[name].weight.float()
            module.weight.data = weight * (scale if getattr(module, "transposed", False) else scale[:, None])
    return quantised, floats


def subnets(model):
    space = model.search_space
    groups = max(1, space.kv_groups[-1] // 2)
    return [space.full, space.uniform(24, groups), Subnet((0, 40, 6), (space.kv_groups[-1], 0, 1)), space.smallest]


def logits(model, subnet, tokens):
    with torch.inference_mode(), model.use(subnet):
        return tiny.logits_of(model, tokens)


def test_every_subnetwork_computes_what_the_same_values_in_float_compute(models):
    quantised, floats = models
    tokens = tiny.token_ids(2, TIME)
    for subnet in subnets(floats):
        torch.testing.assert_close(
            logits(quantised, subnet, tokens), logits(floats, subnet, tokens), rtol=1e-4, atol=1e-4
        )


def test_a_weight_is_off_by_half_a_step_at_most(models):
    quantised, floats = models
    original = ElasticModel(tiny.plain_model(floats.config.model_type))
    for (_, _, sub), (_, _, before), (_, _, held) in zip(
        floats.sub_layers(), original.sub_layers(), quantised.sub_layers(), strict=True
    ):
        apart = (sub.closes.matrix() - before.closes.matrix()).abs().amax(1)
        assert (apart <= 0.5001 * held.closes.scale).all()
        assert held.closes.weight.dtype == torch.int8


@pytest.mark.parametrize("few_tokens", [0, 10_000], ids=["blocks", "masks"])
def test_every_token_may_have_its_own_widths(models, few_tokens, monkeypatch):
    monkeypatch.setattr(per_token, "FEW_TOKENS", few_tokens)
    quantised, floats = models
    tokens = tiny.token_ids(1, TIME)
    chosen = [tiny.random_subnet(floats.search_space, seed=seed) for seed in range(TIME)]
    neurons_L1T, groups_L1T = (torch.tensor([subnet[axis] for subnet in chosen]).T[:, None] for axis in AXES)
    heads = floats.layers[0].attention.heads_per_unit
    widths = TokenWidths(neurons_L1T, groups_L1T, torch.full_like(groups_L1T, heads))
    found = []
    for model in (quantised, floats):
        with torch.inference_mode(), use_token_widths(model, widths):
            found.append(tiny.logits_of(model, tokens))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_fast_decoding_reads_int8(tied):
    quantised, floats = both("llama", tie_word_embeddings=tied)
    assert supports(quantised)
    assert type(quantised.lm.get_output_embeddings()) is OutputLinear
    tokens = tiny.token_ids(1, TIME)
    for subnet in subnets(floats):
        decoder = Decoder(quantised, subnet, max_tokens=TIME)
        decoder.prefill(tokens[:, :4])
        found = torch.stack([decoder.step(token) for token in tokens[0, 4:].tolist()])
        torch.testing.assert_close(found, logits(floats, subnet, tokens)[0, 4:], rtol=1e-4, atol=1e-4)


def test_bytes_are_those_that_are_held(models):
    quantised, floats = models
    for model in models:
        table = formula_table(model, "weights")
        scales = {
            id(m.scale): m.scale for m in model.lm.modules() if isinstance(getattr(m, "scale", None), torch.Tensor)
        }
        held = sum(p.nbytes for p in model.lm.parameters()) + sum(scale.nbytes for scale in scales.values())
        assert table.price(model.search_space.full) == held
    assert table.conditions["dtype"] == "float32"
    assert formula_table(quantised, "weights").conditions["dtype"] == "int8"
    assert quantised.share(quantised.search_space.smallest) == floats.share(floats.search_space.smallest)


def test_what_was_measured_for_the_model_still_belongs_to_it():
    model = ElasticModel(tiny.plain_model("llama"))
    before = model.fingerprint()
    quantize(model)
    assert model.fingerprint() == before
    assert model.weights_type == "int8"


def test_what_changes_weights_refuses_int8(tmp_path):
    model = ElasticModel(copy.deepcopy(tiny.plain_model("llama")), tiny.tokenizer())
    quantize(model)
    with pytest.raises(FlextronError, match="int8, for running only"):
        model.layers[0].mlp.closes.matrix()
    with pytest.raises(CheckpointError, match="cannot save int8 weights"):
        model.save_pretrained(tmp_path / "out")
    for export, name in ((hf.export, "out"), (export_gguf, "out.gguf")):
        with pytest.raises(FlextronError, match="cannot export int8 weights"):
            export(model, model.search_space.full, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_the_type(tmp_path, capsys):
    ElasticModel(tiny.plain_model("llama", vocab_size=303), tiny.tokenizer()).save_pretrained(tmp_path / "model")
    main(["generate", str(tmp_path / "model"), "a b", "--max-new-tokens", "3", "--dtype", "int8", "--device", "cpu"])
    assert capsys.readouterr().out.strip()
    loaded = ElasticModel.from_pretrained(tmp_path / "model", dtype="int8")
    assert {projection.weight.dtype for _, _, sub in loaded.sub_layers() for projection in sub.opens} == {torch.int8}
