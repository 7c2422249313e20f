"""The table of families: every field of a spec is needed, and an unknown architecture is told how to be added."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

import tiny
from flextron.elastic.families import FAMILIES, GPT2, LLAMA_LIKE, Family, family_of
from flextron.elastic.projections import Width, make_elastic
from flextron.elastic.shrinking import small_copy
from flextron.errors import FlextronError, UnknownFamilyError
from flextron.model import ElasticModel
from flextron.subnet import Subnet
from tiny import differs, logits_of, masked


def changed(family: Family, axis: str, **fields) -> Family:
    return replace(family, **{axis: replace(getattr(family, axis), **fields)})


RIGHT = dict(FAMILIES)
WRONG = {
    "layers": ("llama", replace(LLAMA_LIKE, layers="model")),
    "mlp": ("llama", replace(LLAMA_LIKE, mlp=GPT2.mlp)),
    "attention": ("llama", replace(LLAMA_LIKE, attention=FAMILIES["phi"].attention)),
    "mlp.opens": ("llama", changed(LLAMA_LIKE, "mlp", opens=("mlp.gate_proj",))),
    "mlp.closes": ("llama", changed(LLAMA_LIKE, "mlp", closes="mlp.up_proj")),
    "attention.opens": ("llama", changed(LLAMA_LIKE, "attention", opens=("self_attn.q_proj", "self_attn.k_proj"))),
    "attention.closes": ("llama", changed(LLAMA_LIKE, "attention", closes="self_attn.v_proj")),
    "attention.config_keys": ("llama", changed(LLAMA_LIKE, "attention", config_keys=("num_attention_heads",))),
    "stacked": ("gpt2", changed(GPT2, "attention", stacked=1)),
    "not stacked": ("gpt_neox", changed(FAMILIES["gpt_neox"], "attention", stacked=3)),
    "counts": ("gpt2", changed(GPT2, "attention", counts=())),
    "norm": ("phi", changed(FAMILIES["phi"], "mlp", norm="input_layernorm")),  # which the attention reads too
}


def narrows_rightly(model_type: str) -> bool:
    lm = tiny.plain_model(model_type)
    groups = lm.config.num_attention_heads // (2 if hasattr(lm.config, "num_key_value_heads") else 1)
    subnets = (Subnet((12, 40, 0), (1, 2, 0)), Subnet((0, 40, 12), (1, 0, 2)))
    expected = [
        logits_of(masked(copy.deepcopy(lm), subnet, groups=groups, family=RIGHT[model_type]), tiny.token_ids())
        for subnet in subnets
    ]
    model = ElasticModel(lm)
    for subnet, logits in zip(subnets, expected, strict=True):
        with model.use(subnet):
            if differs(logits_of(model, tiny.token_ids()), logits):
                return False
    return True


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_shows(field, monkeypatch):
    model_type, spec = WRONG[field]
    assert narrows_rightly(model_type)
    monkeypatch.setitem(FAMILIES, model_type, spec)
    try:
        right = narrows_rightly(model_type)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        right = False
    assert not right


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_norm_is_left_out_with_the_only_sub_layer_that_reads_it(model_type):
    model = ElasticModel(tiny.plain_model(model_type))
    x_BTD = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with model.use(Subnet((0, 40, 12), (1, 0, 2))):
        for layer, sub in [(each, sub) for each in model.layers for sub in (each.mlp, each.attention)]:
            if not sub.axis.norm:
                assert model_type == "phi"
                continue
            norm = layer.module.get_submodule(sub.axis.norm)
            with torch.no_grad():
                assert (norm(x_BTD) is x_BTD) == (not sub.width.kept)
            norm(x_BTD).sum().backward()  # every weight has a gradient, as when it is masked
            assert all(p.grad is not None and (sub.width.kept or not p.grad.any()) for p in norm.parameters())


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
class TestConfigKeys:
    """An export states its widths by these keys, so a plain model made with them must have those widths."""

    def test_count_neurons(self, model_type):
        family = FAMILIES[model_type]
        lm = tiny.plain_model(model_type, **dict.fromkeys(family.mlp.config_keys, 24))
        assert tiny.closing_matrix(lm, family, 0, "mlp").shape == (tiny.HIDDEN, 24)
        assert ElasticModel(lm).search_space.neurons[-1] == 24

    def test_count_heads(self, model_type):
        family = FAMILIES[model_type]
        counts = dict(zip(family.attention.config_keys, (2, 4), strict=False))
        attention = ElasticModel(tiny.plain_model(model_type, **counts, hidden_size=32)).layers[0].attention
        assert attention.width.full == 2
        assert attention.heads_per_unit == (2 if len(counts) == 2 else 1)

    def test_exports_fewer_heads_says_whether_the_head_size_can_be_chosen(self, model_type):
        lm = tiny.plain_model(model_type, head_dim=32)
        columns = tiny.closing_matrix(lm, FAMILIES[model_type], 0, "attention").shape[1]
        assert (columns == tiny.HEADS * 32) is FAMILIES[model_type].exports_fewer_heads


def test_neurons_are_counted_where_the_config_leaves_them_open():
    assert ElasticModel(tiny.plain_model("gpt2", n_inner=None)).search_space.neurons[-1] == 4 * tiny.HIDDEN


def test_an_unknown_family_is_told_what_to_add_and_where():
    with pytest.raises(UnknownFamilyError) as error:
        family_of("mamba")
    message = str(error.value)
    assert "'mamba'" in message
    assert all(name in message for name in FAMILIES)
    assert "FAMILIES['mamba'] in src/flextron/elastic/families.py" in message
    assert "docs/add_a_family.md" in message
    assert isinstance(error.value, FlextronError)


def test_an_unknown_model_stays_as_it_was():
    lm = small_copy(AutoConfig.for_model("bloom"))
    with pytest.raises(UnknownFamilyError):
        ElasticModel(lm)
    assert type(lm.transformer.h[0].mlp.dense_h_to_4h) is nn.Linear


def test_a_path_without_layers_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", replace(LLAMA_LIKE, layers="model.norm"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layers at 'model.norm'; the family spec is wrong"):
        ElasticModel(tiny.plain_model("llama"))


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 1), nn.Identity(), nn.Bilinear(2, 2, 2)], ids=repr)
@pytest.mark.parametrize("opens", [True, False])
def test_only_linear_and_conv1d_become_elastic(module, opens):
    kind = type(module)
    message = f"cannot narrow a {kind.__name__}: .* Load the model unquantised and without adapters."
    with pytest.raises(TypeError, match=message):
        make_elastic(module, Width(4), opens=opens)
    assert type(module) is kind


def test_a_subclass_of_linear_is_refused():
    """A quantised or adapted Linear computes something else than its weight says."""
    quantised = type("QuantLinear", (nn.Linear,), {})(4, 4)
    with pytest.raises(TypeError, match="cannot narrow a QuantLinear"):
        make_elastic(quantised, Width(4), opens=True)


@pytest.mark.parametrize("projection", [nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Conv1D(8, 6)], ids=repr)
def test_a_projection_runs_on_its_first_units(projection):
    x, full = torch.randn(2, 3, 6), copy.deepcopy(projection)
    width = Width(4)
    make_elastic(projection, width, opens=True, stacked=2)
    width.kept = 3
    expected = full(x).unflatten(-1, (2, 4))[..., :3].flatten(-2)
    torch.testing.assert_close(projection(x), expected)
    width.kept = 4
    assert torch.equal(projection(x), full(x))
