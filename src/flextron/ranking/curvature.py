"""Estimate sensitivities from curvature: one backward pass tells what every width of every layer costs, nearly.

Narrowing a sub-layer to k units takes d_k(t) = sum of W_u a_u(t) over u >= k from the residual stream at token t. To
second order, the model's predictions move by a divergence F(k), half the mean square of g(t) . d_k(t), where g is the
gradient of the log-probability of a token that the model itself draws (Fisher information; Theis et al. 2018, arXiv
1801.05787, rank channels by it). Products between tokens are left out: from few texts they are mostly noise.

For deep cuts that is too little: leaving out a whole sub-layer costs about three times as much. So the narrowest width
of each sub-layer is measured, and the curve bends towards it, to F(k) r^sqrt(F(k) / F(0)), with r = measured / F(0).
docs/decisions/0003-sensitivity.md compares it with measuring all widths.

Shapes: B blocks, T tokens, U units of a sub-layer, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flextron.data.blocks import TokenBlocks
from flextron.elastic.layers import ElasticLayer, SubLayer
from flextron.elastic.loss import logits_of
from flextron.elastic.model import ElasticModel
from flextron.elastic.walk import Walk, walking
from flextron.progress import bar
from flextron.ranking.sensitivity import (
    SECOND_SHARE,
    Sensitivity,
    Widths,
    batches_for,
    batches_of,
    frozen,
    loss_increases,
    measure_sensitivity,
    sensitivity_of,
)
from flextron.subnet import AXES

MEASURED_PART = 2
"""One block in so many is also measured at the narrowest widths: half of these in the full model, half around the 60%
sub-network that these lead to."""
LARGEST_RATIO = 100.0
"""Largest correction of a curve's end by what was measured."""
Curves = dict[str, NDArray[np.float64]]
"""By axis: for each layer and choice of width the estimated increase, [L, widths]."""


def estimate_sensitivity(model: ElasticModel, blocks: TokenBlocks, *, show: bool = False) -> Sensitivity:
    """Return what `measure_sensitivity` measures, estimated at every width of the search space, some five times faster.

    The loss is the divergence from the full model's own predictions: of so few tokens, those of the text are noise.
    Mixtures of experts are measured, because tokens meet other experts when one is left out.

    Raises:
        CheckpointError: the weights are quantised, so that there is no backward pass.
    """
    model.check_float("estimate sensitivities of")
    if model.family.mlp.holds_experts:
        return measure_sensitivity(model, blocks, show=show)
    space = model.search_space
    widths: Widths = {axis: space[axis] for axis in AXES}
    ends: Widths = {axis: (space[axis][0], space[axis][-1]) for axis in AXES}
    tokens = blocks.tokens[: max(2, len(blocks.tokens) // MEASURED_PART)]
    halves = [half for half in tokens.tensor_split(2) if len(half)]
    batches = len(batches_of(blocks.tokens)) + sum(len(batches_for(model, half, ends)) for half in halves)
    with bar(batches * space.layers, description="sensitivity", show=show) as advance:
        curves = _curves(model, blocks.tokens, widths, advance)
        sensitivity = sensitivity_of(model, blocks, widths, curves)
        around = space.full
        measured: list[Curves] = []
        for half in halves:
            with torch.inference_mode():
                measured.append(loss_increases(model, half, around, ends, advance, text_weight=0))
            lowest = {axis: np.mean([each[axis][:, 0] for each in measured], axis=0) for axis in AXES}
            bent = {axis: _bent(curves[axis], lowest[axis]) for axis in AXES}
            sensitivity = replace(sensitivity, increases=frozen(bent))
            around = sensitivity.allocate(max(SECOND_SHARE, sensitivity.share(space.smallest)))
    return sensitivity


def _bent(curves: NDArray[np.float64], measured_L: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bend each curve towards its measured end; where noise makes that low, towards the median ratio."""
    curves = np.maximum.accumulate(curves[:, ::-1], axis=1)[:, ::-1]  # a wider sub-layer never costs more
    ends_L = np.maximum(curves[:, 0], 1e-9)
    ratios_L = np.clip(measured_L / ends_L, 0, LARGEST_RATIO)
    ratios_L = np.maximum(ratios_L, max(np.median(ratios_L), 1.0))
    bent: NDArray[np.float64] = curves * ratios_L[:, None] ** np.sqrt(curves / ends_L[:, None])
    return bent


def _curves(model: ElasticModel, tokens: torch.Tensor, widths: Widths, advance: Callable[[], None]) -> Curves:
    """The divergence to second order at every width, [L, widths] by axis; 0 at the full width.

    The backward pass goes layer by layer too: each layer runs again, so that activations of one layer at a time are
    held, and beside them the hidden states between all layers for one batch.
    """
    sums = {axis: np.zeros((len(model.layers), len(widths[axis]))) for axis in AXES}
    draw = torch.Generator(device=model.device).manual_seed(0)
    with _frozen_weights(model), model.use(model.search_space.full), walking(model) as walk:
        for tokens_BT in batches_of(tokens):
            states = _states(walk, tokens_BT, len(model.layers))
            gradient_BTD: torch.Tensor | None = _gradient(model, walk, tokens_BT, states.pop(), draw)
            for index in reversed(range(len(model.layers))):
                below_BTD = states.pop().requires_grad_() if states else None
                with _observed(model.layers[index]) as seen, torch.enable_grad():
                    torch.autograd.backward([walk.through(index, tokens_BT, below_BTD)], [gradient_BTD])
                gradient_BTD = None if below_BTD is None else below_BTD.grad
                for axis, sub in model.layers[index].subs.items():
                    moved = _moved(seen[axis], sub, widths[axis])
                    sums[axis][index] += 0.5 * moved.square().sum((0, 1)).double().cpu().numpy()
                advance()
    return {axis: rows / tokens[:, 1:].numel() for axis, rows in sums.items()}


@torch.no_grad()
def _states(walk: Walk, tokens_BT: torch.Tensor, layers: int) -> list[torch.Tensor]:
    """The output of every layer, [B, T, D] each."""
    states: list[torch.Tensor] = []
    for index in range(layers):
        states.append(walk.through(index, tokens_BT, states[-1] if states else None))
    return states


def _gradient(
    model: ElasticModel, walk: Walk, tokens_BT: torch.Tensor, last_BTD: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """The gradient of minus the log-probability of drawn tokens by the last layer's output, [B, T, D]."""
    with torch.enable_grad():
        read_BTD = walk.finish(tokens_BT, last_BTD.requires_grad_())
        gradient_BTD = torch.zeros_like(read_BTD)
        for row in range(len(tokens_BT)):
            row_TD = read_BTD[row, :-1].detach().requires_grad_()
            log_p_TV = logits_of(model.lm, row_TD).float().log_softmax(-1)
            drawn_T1 = torch.multinomial(log_p_TV.detach().exp(), 1, generator=draw)
            (gradient_BTD[row, :-1],) = torch.autograd.grad(-log_p_TV.gather(1, drawn_T1).sum(), row_TD)
        torch.autograd.backward([read_BTD], [gradient_BTD])
    gradient_of_last_BTD = last_BTD.grad
    assert gradient_of_last_BTD is not None  # noqa: S101 - it has been asked for
    return gradient_of_last_BTD


def _moved(input_BTC: torch.Tensor, sub: SubLayer, widths: tuple[int, ...]) -> torch.Tensor:
    """The first-order change of the log-probability when units from each width on are left out, [B, T, widths]."""
    gradient_BTC = input_BTC.grad
    assert gradient_BTC is not None  # noqa: S101 - the loss depends on every sub-layer
    products_BTC = input_BTC.detach() * gradient_BTC
    products_BTU = products_BTC.float().view(*products_BTC.shape[:2], sub.width.full, -1).sum(-1)
    from_BTU = products_BTU.flip(-1).cumsum(-1).flip(-1)  # the sum over this unit and all that follow
    nothing_BT1 = torch.zeros_like(from_BTU[..., :1])
    return torch.cat([from_BTU, nothing_BT1], -1)[..., list(widths)]


@contextmanager
def _observed(layer: ElasticLayer) -> Iterator[dict[str, torch.Tensor]]:
    """Collect, by axis, the inputs of a layer's closing projections, which get a gradient."""
    seen: dict[str, torch.Tensor] = {}

    def hook(axis: str) -> Any:
        def observe(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            a_BTC = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_(True)
            a_BTC.retain_grad()
            seen[axis] = a_BTC
            return (a_BTC, *inputs[1:])

        return observe

    with ExitStack() as hooks:
        for axis, sub in layer.subs.items():
            hooks.callback(sub.closes.register_forward_pre_hook(hook(axis)).remove)
        yield seen


@contextmanager
def _frozen_weights(model: ElasticModel) -> Iterator[None]:
    """No gradients of weights inside the block, which would take time and memory."""
    trained = [parameter for parameter in model.lm.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
