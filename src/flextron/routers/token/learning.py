"""Training a token router, the LLM frozen: what a neuron is worth to a token is measured, learnt, and measured again.

Flextron (Cai et al., ICML 2024), section 4.3, trains it by Gumbel-softmax through the LLM. Ours: a backward pass gives
the slope of the loss in every neuron of every token, so a worth is learnt from all of them, not from a sampled choice.
The loss is the divergence from the full model's predictions, which has less noise than the text's.

Shapes: B rows (requests), T time, N tokens, L layers, K choices of an MLP's width, D model, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flextron.costs.pricing import Ceiling
from flextron.costs.table import CostTable
from flextron.data.blocks import TokenBlocks, batch_tokens
from flextron.elastic.loss import hidden_states, losses
from flextron.elastic.model import ElasticLayer, ElasticModel
from flextron.errors import RouterError
from flextron.inference.per_token import Forward, TokenWidths, masked_parts, rows_of_attention, running
from flextron.progress import bar
from flextron.routers.about import MadeFrom
from flextron.routers.static.router import Router
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.net import RANK, TokenRouter
from flextron.routers.token.slopes import KeptSlopes, Slopes
from flextron.subnet import Subnet

ROUNDS = 3
"""Measurements of slopes, each at the widths that the router gives by then."""
WINDOW = 1 / 6
"""Part of an MLP's neurons, below and above a token's width, over which its slope is taken."""
HELD_OUT = 1 / 8
"""Part of the rows of text that tell when to stop learning."""
PASSES = 40
"""Passes over the tokens at most."""
PATIENCE = 4
"""Passes without a gain after which learning stops."""
BATCH = 1024
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.3
DAMPING = 1.0
"""Pull towards the worths at which slopes were measured: slopes hold near them only."""
CAUTION = 0.75
"""Part of the learnt logarithms of worths that is used: slopes tell of small steps (docs/decisions/0010)."""
LARGEST_SLOPE = 16.0
"""In mean slopes of the layer; single tokens' slopes have long tails."""
HIGHEST = 0.97
"""Highest budget that is calibrated; above, towards 1, nearly all neurons run."""
CALIBRATED = 8
TOLERANCE = 0.004
"""Part of a budget by which calibration may miss it."""
TRIES = 8
LARGEST_OFFSET = 4.0
"""Of the logarithm of prices."""
FIRST_STEP = 1.5
"""Half of how far the logarithm of a price goes for a budget that is missed by the whole; it doubles at every try."""


@dataclass(frozen=True)
class TokenRouterAbout(MadeFrom):
    """What a token router was made from, over all rounds, and how good it is."""

    explained: float
    """Quasi-likelihood that the last fit gained on rows left out; 0 where it tells no tokens apart."""


def train_token_router(
    model: ElasticModel,
    static: Router,
    table: CostTable,
    blocks: TokenBlocks,
    calibration: TokenBlocks,
    *,
    rounds: int = ROUNDS,
    calibrated: Sequence[float] | None = None,
    rank: int = RANK,
    arithmetic: torch.dtype | None = None,
    kept: KeptSlopes | None = None,
    seed: int = 0,
    show: bool = False,
) -> tuple[TokenRouter, TokenRouterAbout]:
    """A token router on top of a static one, learnt on `blocks` and calibrated on other text.

    Args:
        blocks: text for all rounds together, each of which takes its part.
        calibrated: ascending budgets to calibrate, as shares of the full model's cost; between them prices are
            interpolated. By default 8 over the static router's range.
        arithmetic: what to compute in, if not the weights' type.
        kept: takes each round that is measured, so that an interrupted run goes on.

    Raises:
        RouterError: too little text, or slopes that are no numbers.
    """
    router = TokenRouter(static.net, model.config.hidden_size, rank=rank).to(model.device)
    parts = blocks.tokens.tensor_split(rounds)
    if min(map(len, parts)) * HELD_OUT < 1:
        raise RouterError(f"{len(blocks.tokens)} blocks of text are too few for {rounds} rounds; give more tokens.")
    measured: list[Slopes] = []
    explained = 0.0
    wanted = model.lm.training, [parameter.requires_grad for parameter in model.lm.parameters()]
    model.lm.requires_grad_(False).eval()
    try:
        with bar(len(blocks.tokens), description="token router", show=show) as advance:
            for round_, tokens_NT in enumerate(parts):
                slopes = None if kept is None else kept.load(round_)
                if slopes is None:
                    draw = torch.Generator().manual_seed(seed + round_)
                    slopes = _measure(model, router, table, static, tokens_NT, draw, arithmetic, advance)
                    if kept is not None:
                        kept.save(round_, slopes)
                measured.append(slopes)
                explained = fit(router, measured, rows=tokens_NT.shape[1], seed=seed)
        with torch.no_grad():
            router.out_LR.mul_(CAUTION)
            router.out_bias_L.mul_(CAUTION)
        budgets = calibrated or np.linspace(router.static.lowest, HIGHEST, CALIBRATED).tolist()
        calibrate(model, router, table, static, calibration, budgets, arithmetic=arithmetic, show=show)
    finally:
        model.lm.train(wanted[0])
        for parameter, wants in zip(model.lm.parameters(), wanted[1], strict=True):
            parameter.requires_grad_(wants)
    about = TokenRouterAbout(table.metric, dict(table.conditions), blocks.text, blocks.tokens.numel(), explained)
    return router, about


def answers(static: Router, table: CostTable, budgets: Sequence[float]) -> list[Subnet]:
    """The static router's sub-networks within shares of the full model's cost."""
    return [static.choose([Ceiling(table, min(budget, 1) * table.full, f"{budget}x")]) for budget in budgets]


def _measure(
    model: ElasticModel,
    router: TokenRouter,
    table: CostTable,
    static: Router,
    tokens_NT: torch.Tensor,
    draw: torch.Generator,
    arithmetic: torch.dtype | None,
    advance: Any,
    batch: int = 4,
) -> Slopes:
    """Slopes at the router's widths, at a budget of its own for each row of text."""
    parts = []
    for tokens_BT in torch.split(tokens_NT, batch):
        places_B = (torch.arange(len(tokens_BT)) + torch.rand(len(tokens_BT), generator=draw)) / len(tokens_BT)
        budgets_B = router.static.lowest + (HIGHEST - router.static.lowest) * places_B
        subnets = answers(static, table, budgets_B.tolist())
        with torch.autocast(model.device.type, dtype=arithmetic or model.dtype, enabled=_casts(model, arithmetic)):
            parts.append(_slopes(model, router, budgets_B, subnets, tokens_BT))
        for _ in tokens_BT:
            advance()
    hidden, slopes, worths, budgets = zip(*parts, strict=True)
    slopes_LN = torch.cat(slopes, 1)
    means_L1 = slopes_LN.mean(1, keepdim=True)
    if not bool(slopes_LN.isfinite().all()):
        raise RouterError("the loss has slopes that are no numbers; evaluate the model, or load it in float32.")
    # a layer whose neurons hardly matter has slopes of noise: they count for little
    least = torch.maximum(0.3 * means_L1.median(), 1e-2 * slopes_LN.abs().mean()).clamp(min=1e-12)
    scale_L1 = torch.maximum(means_L1, least)
    return Slopes(
        torch.cat(hidden, 1),
        (slopes_LN / scale_L1).clamp(-LARGEST_SLOPE / 2, LARGEST_SLOPE),
        torch.cat(worths, 1),
        torch.cat(budgets),
    )


def _casts(model: ElasticModel, arithmetic: torch.dtype | None) -> bool:
    return arithmetic is not None and arithmetic != model.dtype and arithmetic.itemsize == 2


def _slopes(
    model: ElasticModel,
    router: TokenRouter,
    budgets_B: torch.Tensor,
    subnets: Sequence[Subnet],
    tokens_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens_BT, budgets_B = tokens_BT.to(model.device), budgets_B.to(model.device)
    neurons_K = torch.tensor(model.search_space.neurons, device=model.device)
    sizes_K = torch.cat([neurons_K[:1], neurons_K.diff()])
    log_prices_BL, shifts_LBR = router.log_prices(budgets_B), router.shifts(budgets_B)
    rows = TokenWidths.of_rows(model, subnets)
    masks: list[torch.Tensor] = []
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def run_of(index: int, layer: ElasticLayer) -> Forward:
        def run(forward: Forward, hidden_BTD: torch.Tensor) -> Any:
            with torch.no_grad():
                worths_BT = router.log_worths(index, hidden_BTD, shifts_LBR[index])
                chosen_BT = router.choose(index, log_prices_BL[:, index, None] - worths_BT)
                used_BTK = torch.arange(len(neurons_K), device=model.device) <= chosen_BT[..., None]
                masks.append(used_BTK[..., sizes_K > 0].to(hidden_BTD.dtype).requires_grad_())
                kept.append((hidden_BTD.detach().to(torch.bfloat16), worths_BT, neurons_K[chosen_BT]))
            return masked_parts(layer.mlp, forward, _of_neurons(masks[-1], sizes_K[sizes_K > 0]), hidden_BTD)

        return run

    with torch.no_grad():
        taught_BTD = hidden_states(model.lm, tokens_BT, None)
    runs = [
        (run_of(index, layer), rows_of_attention(layer.attention, groups, heads))
        for index, (layer, groups, heads) in enumerate(zip(model.layers, rows.kv_groups, rows.query_heads, strict=True))
    ]
    with running(model, runs), torch.enable_grad():
        hidden_BTD = hidden_states(model.lm, tokens_BT, None)
        loss = losses(model.lm, hidden_BTD, tokens_BT, teacher=model.lm, teacher_hidden_BTD=taught_BTD)
        gradients = torch.autograd.grad(loss.total, masks)
    ends_K, sizes = neurons_K[sizes_K > 0], sizes_K[sizes_K > 0]
    slopes = []
    for gradient_BTK, (_, _, widths_BT) in zip(gradients, kept, strict=True):
        middle_K = ends_K - sizes / 2
        near_BTK = (middle_K - widths_BT[..., None]).abs() < WINDOW * ends_K[-1]
        slopes.append(-(gradient_BTK.float() * near_BTK).sum(-1) / (sizes * near_BTK).sum(-1).clamp(min=1))
    hidden, worths, _ = zip(*kept, strict=True)
    stacked = (torch.stack([each.flatten(0, 1) for each in several]).cpu() for several in (hidden, slopes, worths))
    return (*stacked, budgets_B.repeat_interleave(tokens_BT.shape[1]).cpu())  # type: ignore[return-value]


def _of_neurons(mask_BTK: torch.Tensor, sizes_K: torch.Tensor) -> torch.Tensor:
    """A mask of blocks of neurons as one of equal parts: of blocks, if they are equal, else of neurons."""
    return mask_BTK if bool((sizes_K == sizes_K[0]).all()) else mask_BTK.repeat_interleave(sizes_K, dim=-1)


def fit(router: TokenRouter, measured: Sequence[Slopes], *, rows: int, seed: int = 0) -> float:
    """Learn worths from slopes; the quasi-likelihood gained on rows of text that were left out of learning.

    A token whose slope is s times its layer's mean, at the worth w that it had, is worth s w. The expectation is learnt
    by the quasi-likelihood of a Poisson, which takes slopes below zero too, with a pull towards w.

    Args:
        rows: tokens of a row of text, which are learnt from or left out together.
    """
    hidden_LND, slopes_LN, before_LN = (
        torch.cat(several, 1) for several in ([getattr(part, name) for part in measured] for name in Slopes._fields[:3])
    )
    budgets_N = torch.cat([part.budgets_N for part in measured])
    if len(measured) == 1:
        _fit_scale(router, hidden_LND)
    of_row_N = torch.arange(len(budgets_N)) // rows
    left_out_N = of_row_N % round(1 / HELD_OUT) == 0
    learnt = (~left_out_N).nonzero()[:, 0]
    checked = left_out_N.nonzero()[:, 0]

    device = router.out_LR.device

    def loss_of(places: torch.Tensor) -> torch.Tensor:
        shifts_LNR = router.shifts(budgets_N[places].to(device))
        hidden_LMD = hidden_LND[:, places].to(device).float()
        worths = [
            router.log_worths(layer, hidden_MD[:, None], shift_MR)[:, 0]
            for layer, (hidden_MD, shift_MR) in enumerate(zip(hidden_LMD, shifts_LNR, strict=True))
        ]
        moved_LN = torch.stack(worths) - before_LN[:, places].to(device)
        slopes = slopes_LN[:, places].to(device)
        return (moved_LN.exp() - 1 - slopes * moved_LN + DAMPING / 2 * moved_LN.square()).mean()

    parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    draw = torch.Generator().manual_seed(seed)
    best, state, waited = _value(loss_of, checked), _copy(parameters), 0
    first = best
    for _ in range(PASSES):
        for places in torch.split(learnt[torch.randperm(len(learnt), generator=draw)], BATCH):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = loss_of(places)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        value = _value(loss_of, checked)
        waited += 1
        if value < best:
            best, state, waited = value, _copy(parameters), 0
        if waited == PATIENCE:
            break
    with torch.no_grad():
        for parameter, kept in zip(parameters, state, strict=True):
            parameter.copy_(kept)
    _centre(router, hidden_LND, budgets_N)
    return first - best


@torch.no_grad()
def _value(loss_of: Any, places: torch.Tensor) -> float:
    return float(sum(loss_of(part) * len(part) for part in torch.split(places, BATCH)) / len(places))


def _copy(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _centre(router: TokenRouter, hidden_LND: torch.Tensor, budgets_N: torch.Tensor) -> None:
    """Let the mean logarithm of worths be 0 in every layer: what a layer gets is the static router's matter."""
    device = router.out_LR.device
    for layer, shift_NR in enumerate(router.shifts(budgets_N.to(device))):
        worths_N = router.log_worths(layer, hidden_LND[layer].to(device).float()[:, None], shift_NR)
        router.out_bias_L[layer] -= worths_N.mean()


@torch.no_grad()
def _fit_scale(router: TokenRouter, hidden_LND: torch.Tensor) -> None:
    """What the networks read gets a variance of about 1, however large a model's hidden states are."""
    for layer, hidden_ND in enumerate(hidden_LND):
        router.reads_LRD[layer] /= hidden_ND.float().square().mean().sqrt().clamp(min=1e-6).item()


def calibrate(
    model: ElasticModel,
    router: TokenRouter,
    table: CostTable,
    static: Router,
    blocks: TokenBlocks,
    budgets: Sequence[float],
    *,
    arithmetic: torch.dtype | None = None,
    show: bool = False,
) -> None:
    """Find, for ascending budgets, what to add to prices so that the average cost on `blocks` is the budget."""
    offsets, plans = [], []
    offset = 0.0
    with bar(len(budgets), description="calibrate", show=show) as advance:
        for budget, subnet in zip(budgets, answers(static, table, budgets), strict=True):

            def used_at(offset: float, budget: float = budget, subnet: Subnet = subnet) -> TokenRouting:
                router.offsets_C, router.budgets_C = torch.full((2,), offset), torch.full((2,), budget)
                router.plan_CL = torch.arange(2.0)[:, None].expand(-1, router.layers)
                routing = TokenRouting(model, router, [budget], [subnet])
                casts = torch.autocast(
                    model.device.type, dtype=arithmetic or model.dtype, enabled=_casts(model, arithmetic)
                )
                with routing.use(), casts, torch.inference_mode():
                    for tokens_BT in blocks.batches(batch_tokens(model.device, 1024)):
                        model.lm.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)
                return routing

            offset, routing = _find(used_at, budget, offset)
            offsets.append(offset)
            plans.append(routing.costs_of_layers)
            advance()
    router.budgets_C, router.offsets_C = torch.tensor(budgets), torch.tensor(offsets)
    router.plan_CL = torch.stack(plans).cpu()
    router.to(model.device)


def _find(used_at: Callable[[float], TokenRouting], budget: float, offset: float) -> tuple[float, TokenRouting]:
    """The offset at which the average cost is the budget, by false position; the nearest of some tries."""
    tried: list[tuple[float, float, TokenRouting]] = []
    for _ in range(TRIES):
        routing = used_at(offset)
        tried.append((offset, routing.average_cost / budget - 1, routing))
        if abs(tried[-1][1]) < TOLERANCE:
            break
        offset = _next(sorted((place, missed) for place, missed, _ in tried))
    offset, _, routing = min(tried, key=lambda item: abs(item[1]))
    return offset, routing


def _next(tried: Sequence[tuple[float, float]]) -> float:
    """Where to look next: between a price that is too low and one too high, else further the way that is left."""
    too_low = [pair for pair in tried if pair[1] > 0]
    too_high = [pair for pair in tried if pair[1] <= 0]
    way = FIRST_STEP * 2.0 ** len(tried)
    if not too_high:
        return min(too_low[-1][0] + way * too_low[-1][1], LARGEST_OFFSET)
    if not too_low:
        return max(too_high[0][0] + way * too_high[0][1], -LARGEST_OFFSET)
    (low, above), (high, below) = too_low[-1], too_high[0]
    return low + min(max(above / (above - below), 0.1), 0.9) * (high - low)
