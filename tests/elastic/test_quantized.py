"""Weights in 8 and 4 bits: every sub-network computes what float weights of the same values compute, in fewer bytes."""

import copy

import pytest
import torch

import tiny
from flextron import ElasticModel
from flextron.cli import main
from flextron.costs.formulas import formula_table
from flextron.elastic.projections import Projection
from flextron.elastic.quantized import OutputLinear, quantize
from flextron.errors import CheckpointError, FlextronError
from flextron.exporting import hf
from flextron.exporting.gguf.file import export_gguf
from flextron.inference import per_token
from flextron.inference.decoder import Decoder, supports
from flextron.inference.per_token import TokenWidths, use_token_widths
from flextron.ranking.curvature import estimate_sensitivity
from flextron.ranking.importance import rank
from flextron.subnet import AXES, Subnet

TYPES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi")
TIME = 9


BITS = ("int8", "int4")


@pytest.fixture(params=[(model_type, bits) for bits in BITS for model_type in TYPES], ids="-".join)
def models(request):
    """A quantised model, and the same values in float."""
    return both(*request.param)


def both(model_type, bits, **changes):
    quantised = ElasticModel(tiny.plain_model(model_type, **changes), tiny.tokenizer())
    quantize(quantised, bits)
    floats = ElasticModel(tiny.plain_model(model_type, **changes), tiny.tokenizer())
    held = dict(quantised.lm.named_modules())
    for name, module in floats.lm.named_modules():
        if isinstance(module, Projection):
            values = held[name].quantized.floats(slice(None), slice(None))
            module.weight.data = values.T if module.transposed else values
        elif isinstance(scale := getattr(held[name], "scale", None), torch.Tensor):
            module.weight.data = held[name].weight.float() * scale[:, None]
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
        apart = (sub.closes.matrix() - before.closes.matrix()).abs()
        if quantised.weights_type == "int8":
            assert (apart.amax(1) <= 0.5001 * held.closes.quantized.scale).all()
        else:  # the ends of a strip may be cut off, if the others gain by it
            step = held.closes.quantized.scale[0].float().repeat_interleave(32, 0)[: len(apart), : apart.shape[1]]
            assert (apart <= 2 * step).all()
            assert apart.square().mean() < 0.01 * before.closes.matrix().square().mean()
        assert held.closes.weight.is_meta


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
@pytest.mark.parametrize("bits", BITS)
def test_fast_decoding_reads_few_bits(bits, tied, tmp_path):
    quantised, floats = both("llama", bits, tie_word_embeddings=tied)
    assert supports(quantised)
    assert type(quantised.lm.get_output_embeddings()) is OutputLinear
    tokens = tiny.token_ids(1, TIME)
    for subnet in subnets(floats):
        decoder = Decoder(quantised, subnet, max_tokens=TIME)
        decoder.prefill(tokens[:, :4])
        found = torch.stack([decoder.step(token) for token in tokens[0, 4:].tolist()])
        torch.testing.assert_close(found, logits(floats, subnet, tokens)[0, 4:], rtol=1e-4, atol=1e-4)
    quantised.save_pretrained(tmp_path / "saved")  # decoding lays closing matrices out by columns
    again = ElasticModel.from_pretrained(tmp_path / "saved")
    for (_, _, sub), (_, _, other) in zip(quantised.sub_layers(), again.sub_layers(), strict=True):
        assert torch.equal(sub.closes.quantized.weight, other.closes.quantized.weight)
        assert torch.equal(sub.closes.quantized.scale, other.closes.quantized.scale)


def test_embeddings_that_are_multiplied_are_quantised_too():
    """Gemma's are multiplied by the root of the size, and are most of a small model's weights."""
    quantised, floats = both("gemma3_text", "int8", tie_word_embeddings=True)
    embedding, head = quantised.lm.get_input_embeddings(), quantised.lm.get_output_embeddings()
    assert embedding.weight is head.weight
    assert embedding.weight.dtype == torch.int8
    torch.testing.assert_close(embedding.scale, head.scale * tiny.HIDDEN**0.5)
    assert supports(quantised)
    tokens = tiny.token_ids(1, TIME)
    full = floats.search_space.full
    torch.testing.assert_close(logits(quantised, full, tokens), logits(floats, full, tokens), rtol=1e-4, atol=1e-4)


def test_bytes_are_those_that_are_held(models):
    quantised, floats = models
    for model in models:
        table = formula_table(model, "weights")
        modules = list(model.lm.modules())
        scales = {id(m.scale): m.scale for m in modules if isinstance(getattr(m, "scale", None), torch.Tensor)}
        quantized = [m.quantized for m in modules if getattr(m, "quantized", None) is not None]
        parameters = [p for p in model.lm.parameters() if not p.is_meta]
        held = sum(each.nbytes for each in (*parameters, *scales.values(), *quantized))
        assert abs(table.price(model.search_space.full) - held) <= 64 * len(quantized)  # a unit has whole bytes
    assert table.conditions["dtype"] == "float32"
    assert formula_table(quantised, "weights").conditions["dtype"] == quantised.weights_type
    for metric in ("parameters", "flops"):
        tables = [formula_table(model, metric) for model in models]
        assert tables[0].price(floats.search_space.full) == tables[1].price(floats.search_space.full)
    assert quantised.share(quantised.search_space.smallest) == floats.share(floats.search_space.smallest)


@pytest.mark.parametrize("bits", BITS)
def test_what_was_measured_for_the_model_still_belongs_to_it(bits):
    model = ElasticModel(tiny.plain_model("llama"))
    before = model.fingerprint()
    quantize(model, bits)
    assert model.fingerprint() == before
    assert model.weights_type == bits


@pytest.mark.parametrize("bits", BITS)
def test_what_changes_weights_refuses_few_bits(bits, tmp_path):
    model = ElasticModel(copy.deepcopy(tiny.plain_model("llama")), tiny.tokenizer())
    quantize(model, bits)
    with pytest.raises(FlextronError, match="quantised, for running only"):
        model.layers[0].mlp.closes.matrix()
    for change, verb in ((rank, "rank"), (estimate_sensitivity, "estimate sensitivities of")):
        with pytest.raises(CheckpointError, match=f"cannot {verb} {bits} weights"):
            change(model, None)
    for export, name in ((hf.export, "out"), (export_gguf, "out.gguf")):
        with pytest.raises(FlextronError, match=f"cannot export {bits} weights"):
            export(model, model.search_space.full, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", BITS)
def test_the_command_line_takes_the_type(bits, tmp_path, capsys):
    ElasticModel(tiny.plain_model("llama", vocab_size=303), tiny.tokenizer()).save_pretrained(tmp_path / "model")
    main(["generate", str(tmp_path / "model"), "a b", "--max-new-tokens", "3", "--dtype", bits, "--device", "cpu"])
    assert capsys.readouterr().out.strip()
    assert ElasticModel.from_pretrained(tmp_path / "model", dtype=bits).weights_type == bits
