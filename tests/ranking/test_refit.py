"""The refitted matrix is the best for its widths; the full model stays near what it was; what cannot be refitted."""

import pytest
import torch

import tiny
from flextron.elastic.permutation import permute
from flextron.errors import FlextronError
from flextron.model import ElasticModel
from flextron.ranking import refit as refitting
from flextron.ranking.refit import refit


def ranked(model_type: str = "llama") -> ElasticModel:
    model = ElasticModel(tiny.plain_model(model_type))
    permute(model, tiny.ranking_for(model))
    return model


@pytest.fixture
def blocks():
    return tiny.blocks(40, 16)


def inputs_of(model, blocks) -> list[torch.Tensor]:
    """The inputs of the MLPs' closing projections at full width, [T, C] for each layer."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.closes.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].flatten(0, 1)))
        for layer in model.layers
    ]
    tiny.logits_of(model, blocks.tokens)
    for hook in hooks:
        hook.remove()
    return found


def error(weight, before, inputs, units: int) -> float:
    """Squared error of a sub-layer's output with so many units."""
    return (inputs[:, :units] @ weight[:, :units].T - inputs @ before.T).square().sum().item()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_one_width_is_least_squares(model_type, blocks, monkeypatch):
    monkeypatch.setattr(refitting, "WEIGHTS", {0.5: 1.0})
    monkeypatch.setattr(refitting, "RIDGE", 1e-7)
    model = ranked(model_type)
    inputs = inputs_of(model, blocks)
    before = [layer.mlp.closes.matrix().detach().clone() for layer in model.layers]
    refit(model, blocks)
    half = tiny.NEURONS // 2
    for layer, weight, a in zip(model.layers, before, inputs, strict=True):
        expected = torch.linalg.lstsq(a[:, :half].double(), (a @ weight.T).double()).solution.T.float()
        torch.testing.assert_close(layer.mlp.closes.matrix()[:, :half].detach(), expected, rtol=1e-2, atol=1e-3)


def test_the_full_width_alone_changes_nothing(blocks, monkeypatch):
    monkeypatch.setattr(refitting, "WEIGHTS", {1.0: 1.0})
    model = ranked()
    expected = tiny.logits_of(model, blocks.tokens)
    refit(model, blocks)
    torch.testing.assert_close(tiny.logits_of(model, blocks.tokens), expected, rtol=0, atol=2e-4)


def test_narrow_sub_layers_answer_better_and_the_full_one_nearly_as_before(blocks):
    model = ranked()
    inputs = inputs_of(model, blocks)
    before = [layer.mlp.closes.matrix().detach().clone() for layer in model.layers]
    refit(model, blocks)
    for layer, weight, a in zip(model.layers, before, inputs, strict=True):
        after = layer.mlp.closes.matrix().detach()
        for units in (tiny.NEURONS // 2, 3 * tiny.NEURONS // 4):
            assert error(after, weight, a, units) < 0.97 * error(weight, weight, a, units)
        assert error(after, weight, a, tiny.NEURONS) < 0.02 * (a @ weight.T).square().sum()


def test_a_change_of_low_rank(blocks):
    """It is the nearest of its rank for these inputs: better than the same rank of the plain singular values."""
    whole, low = ranked(), ranked()
    before = [layer.mlp.closes.matrix().detach().clone() for layer in low.layers]
    inputs = inputs_of(low, blocks)
    refit(whole, blocks)
    refit(low, blocks, rank=4)
    for full, narrow, weight, a in zip(whole.layers, low.layers, before, inputs, strict=True):
        change = (narrow.mlp.closes.matrix() - weight).detach()
        wanted = (full.mlp.closes.matrix() - weight).detach()
        assert torch.linalg.svdvals(change)[4:].max() < 1e-4
        u, sizes, v = torch.linalg.svd(wanted, full_matrices=False)
        plain = u[:, :4] * sizes[:4] @ v[:4]
        assert (a @ (change - wanted).T).square().sum() < (a @ (plain - wanted).T).square().sum()


def test_attentions_stay_unless_asked_for(blocks):
    model = ranked()
    before = [layer.attention.closes.weight.clone() for layer in model.layers]
    refit(model, blocks)
    assert all(torch.equal(a, b.attention.closes.weight) for a, b in zip(before, model.layers, strict=True))
    refit(model, blocks, axes=("kv_groups",))
    assert not any(torch.equal(a, b.attention.closes.weight) for a, b in zip(before, model.layers, strict=True))


def test_what_cannot_be_refitted(blocks):
    with pytest.raises(FlextronError, match="Rank it first"):
        refit(ElasticModel(tiny.plain_model("llama")), blocks)
    model = ranked()
    with torch.no_grad():
        model.layers[1].mlp.opens[0].weight[0, 0] = torch.inf
    with pytest.raises(FlextronError, match="the activations of layer 1 are not finite, so it cannot be refitted"):
        refit(model, blocks)
    assert "forward" not in vars(model.layers[0].module)  # the model runs as before
