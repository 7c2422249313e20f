"""Estimated sensitivities: curves are half the second derivative of the divergence, and bend towards measured ends."""

import numpy as np
import pytest
import torch

import tiny
from flextron.model import ElasticModel
from flextron.ranking import curvature
from flextron.ranking.curvature import _bent, estimate_sensitivity
from flextron.subnet import AXES


@pytest.fixture(scope="module")
def confident():
    """A model whose sub-layers matter: outputs that are scaled up, so that predictions depend on them."""
    model = ElasticModel(tiny.plain_model("llama"))
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(3)
    return model


@torch.no_grad()
def divergence(model, tokens, sub, units: int, part: float) -> float:
    """KL from the full model's predictions where `part` of the units from `units` on is taken away at every token."""
    rows = sub.closing_size // sub.width.full * units

    def shrink(_module, inputs):
        scale = torch.ones(sub.closing_size)
        scale[rows:] = 1 - part
        return (inputs[0] * scale,)

    before = tiny.logits_of(model, tokens)[:, :-1].double().log_softmax(-1)
    hook = sub.closes.register_forward_pre_hook(shrink)
    after = tiny.logits_of(model, tokens)[:, :-1].double().log_softmax(-1)
    hook.remove()
    return (before.exp() * (before - after)).sum(-1).mean().item()


def test_the_last_layer_is_the_second_derivative(confident, monkeypatch):
    """There tokens do not mix, so leaving out products between them loses nothing: part^2 F is the divergence."""
    tokens = tiny.token_ids(400, 12)
    widths = {axis: confident.search_space[axis] for axis in AXES}
    curves = curvature._curves(confident, tokens, widths, lambda: None)
    sub = confident.layers[-1].mlp
    for place in (0, len(widths["neurons"]) // 2):
        exact = divergence(confident, tokens, sub, widths["neurons"][place], 0.01) / 0.01**2
        assert curves["neurons"][-1, place] == pytest.approx(exact, rel=0.15)  # the drawn tokens are a sample


def test_curves_fall_to_nothing_at_full_width(confident):
    sensitivity = estimate_sensitivity(confident, tiny.blocks(16, 16))
    for axis in AXES:
        rows = np.array(sensitivity.increases[axis])
        assert sensitivity.widths[axis] == confident.search_space[axis]
        assert rows.shape == (tiny.LAYERS, len(sensitivity.widths[axis]))
        assert (rows[:, -1] == 0).all()
        assert (rows[:, 0] > 0).all()


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gpt_neox"])
def test_other_families_and_what_is_left_behind(model_type):
    model = ElasticModel(tiny.plain_model(model_type))
    model.lm.get_input_embeddings().requires_grad_(False)
    frozen = [parameter.requires_grad for parameter in model.lm.parameters()]
    before = tiny.logits_of(model, tiny.token_ids())
    sensitivity = estimate_sensitivity(model, tiny.blocks(4, 16))
    assert sensitivity.allocate(0.6)
    assert frozen == [parameter.requires_grad for parameter in model.lm.parameters()]
    assert all(parameter.grad is None for parameter in model.lm.parameters())
    assert torch.equal(before, tiny.logits_of(model, tiny.token_ids()))
    assert model.subnet == model.search_space.full


def test_bending_keeps_small_cuts_and_reaches_the_end():
    curves = np.array([[4.0, 1.0, 0.01, 0.0], [4.0, 1.0, 0.01, 0.0], [4.0, 1.0, 0.01, 0.0]])
    bent = _bent(curves, np.array([12.0, 36.0, -1.0]))
    assert bent[:, 0] == pytest.approx([12, 36, 12])  # noise below the median ratio is lifted to it
    assert bent[:, 3] == pytest.approx([0, 0, 0])
    assert bent[:, 2] == pytest.approx([0.01] * 3, rel=0.15)
    assert (np.diff(bent, axis=1) <= 0).all()
