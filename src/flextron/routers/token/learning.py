"""Training a token router with the LLM frozen: measure what neurons are worth to tokens, learn it, measure again.

Flextron (Cai et al., ICML 2024), section 4.3, trains it by Gumbel-softmax through the LLM. Ours: one backward pass
gives the slope of the loss in every neuron of every token, so worths are learnt from all neurons, not from sampled
choices. The loss is the divergence from the full model's predictions, which has less noise than the loss to the text.

Shapes: B rows (requests), T time, N tokens, M tokens of a training batch, L layers, K choices of an MLP's width,
D model, R rank.
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
from flextron.elastic.layers import ElasticLayer
from flextron.elastic.loss import body_of, hidden_states, losses
from flextron.elastic.model import ElasticModel
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
"""Number of measurements of slopes, each at the widths that the router gives at that time."""
WINDOW = 1 / 6
"""A token's slope is averaged over this part of the MLP's neurons below and above its width."""
HELD_OUT = 1 / 8
"""Part of the rows of text held out to decide when learning stops."""
PASSES = 40
"""Largest number of passes over the tokens."""
PATIENCE = 4
"""Number of passes without a gain after which learning stops."""
BATCH = 1024
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.3
DAMPING = 1.0
"""Strength of the pull towards the worths at which slopes were measured; slopes are valid only near them."""
CAUTION = 0.75
"""Factor on the learnt logarithms of worths: slopes describe small steps only (docs/decisions/0010-per-token.md)."""
LARGEST_SLOPE = 16.0
"""Slopes are cut at this many means of the layer, and at minus half as many: single tokens have long tails."""
HIGHEST = 0.97
"""Highest calibrated budget; above it nearly all neurons run."""
CALIBRATED = 8
"""Number of calibrated budgets."""
TOLERANCE = 0.004
"""Relative error of a budget at which calibration stops."""
TRIES = 8
"""Largest number of offsets tried for each budget."""
LARGEST_OFFSET = 4.0
"""Largest change of the log price in calibration."""
FIRST_STEP = 1.5
"""The first step of the log price is twice this times the relative miss of the budget; each try doubles it."""


@dataclass(frozen=True)
class TokenRouterAbout(MadeFrom):
    """What a token router was made from, in all rounds together, and how good it is."""

    explained: float
    """Quasi-likelihood that the last fit gained on held-out rows; 0 if the router does not tell tokens apart."""


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
    """Train a token router on top of a static one.

    Args:
        blocks: text to learn from; it is split evenly over the rounds.
        calibration: other text, to calibrate on.
        calibrated: ascending budgets to calibrate, as shares of the full model's cost; prices are interpolated between
            them. By default 8 budgets over the static router's range.
        arithmetic: dtype to compute in, by default the weights'.
        kept: stores each measured round, so that an interrupted run resumes.

    Raises:
        RouterError: too little text, or slopes that are not finite.
    """
    router = TokenRouter(static.net, model.config.hidden_size, rank=rank).to(model.device)
    parts = blocks.tokens.tensor_split(rounds)
    if min(map(len, parts)) * HELD_OUT < 1:
        raise RouterError(
            f"{len(blocks.tokens)} blocks of text are too few for {rounds} rounds: each needs {round(1 / HELD_OUT)}. "
            "Give more tokens."
        )
    measured: list[Slopes] = []
    explained = 0.0
    before = model.lm.training, [parameter.requires_grad for parameter in model.lm.parameters()]
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
        model.lm.train(before[0])
        for parameter, learns in zip(model.lm.parameters(), before[1], strict=True):
            parameter.requires_grad_(learns)
    about = TokenRouterAbout(table.metric, dict(table.conditions), blocks.text, blocks.tokens.numel(), explained)
    return router, about


def static_answers(static: Router, table: CostTable, budgets: Sequence[float]) -> list[Subnet]:
    """Return the static router's sub-networks for budgets, given as shares of the full model's cost."""
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
    """Measure slopes at the router's widths, with a different budget for each row of text."""
    parts = []
    for tokens_BT in torch.split(tokens_NT, batch):
        positions_B = (torch.arange(len(tokens_BT)) + torch.rand(len(tokens_BT), generator=draw)) / len(tokens_BT)
        budgets_B = router.static.lowest + (HIGHEST - router.static.lowest) * positions_B
        subnets = static_answers(static, table, budgets_B.tolist())
        with torch.autocast(model.device.type, dtype=arithmetic or model.dtype, enabled=_casts(model, arithmetic)):
            parts.append(_slopes(model, router, budgets_B, subnets, tokens_BT))
        for _ in tokens_BT:
            advance()
    hidden, slopes, worths, budgets = zip(*parts, strict=True)
    slopes_LN = torch.cat(slopes, 1)
    means_L1 = slopes_LN.mean(1, keepdim=True)
    if not bool(slopes_LN.isfinite().all()):
        raise RouterError("the slopes of the loss are not finite; evaluate the model, or load it in float32.")
    # where neurons hardly matter, slopes are noise: a larger scale lets them count little
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
    """Return a mask of equal parts from one of blocks: the same if all blocks are equal, else one of single neurons."""
    return mask_BTK if bool((sizes_K == sizes_K[0]).all()) else mask_BTK.repeat_interleave(sizes_K, dim=-1)


def fit(router: TokenRouter, measured: Sequence[Slopes], *, rows: int, seed: int = 0) -> float:
    """Learn worths from slopes; returns the quasi-likelihood gained on held-out rows of text.

    A token with worth w whose slope is s times its layer's mean is now worth s w. The networks learn the mean of s w by
    the Poisson quasi-likelihood, which also takes negative slopes, with a pull towards w.

    Args:
        rows: number of tokens in a row of text; a row is learnt from or held out as a whole.
    """
    hidden_LND, slopes_LN, before_LN = (
        torch.cat(several, 1) for several in ([getattr(part, name) for part in measured] for name in Slopes._fields[:3])
    )
    budgets_N = torch.cat([part.budgets_N for part in measured])
    if len(measured) == 1:
        _fit_scale(router, hidden_LND)
    row_of_N = torch.arange(len(budgets_N)) // rows
    held_out_N = row_of_N % round(1 / HELD_OUT) == 0
    learnt = (~held_out_N).nonzero()[:, 0]
    held_out = held_out_N.nonzero()[:, 0]

    device = router.out_LR.device

    def loss_of(indices_M: torch.Tensor) -> torch.Tensor:
        shifts_LMR = router.shifts(budgets_N[indices_M].to(device))
        hidden_LMD = hidden_LND[:, indices_M].to(device).float()
        worths = [
            router.log_worths(layer, hidden_MD[:, None], shift_MR)[:, 0]
            for layer, (hidden_MD, shift_MR) in enumerate(zip(hidden_LMD, shifts_LMR, strict=True))
        ]
        moved_LM = torch.stack(worths) - before_LN[:, indices_M].to(device)
        slopes_LM = slopes_LN[:, indices_M].to(device)
        return (moved_LM.exp() - 1 - slopes_LM * moved_LM + DAMPING / 2 * moved_LM.square()).mean()

    parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    draw = torch.Generator().manual_seed(seed)
    best, state, waited = _mean_loss(loss_of, held_out), _copy(parameters), 0
    first = best
    for _ in range(PASSES):
        for indices_M in torch.split(learnt[torch.randperm(len(learnt), generator=draw)], BATCH):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = loss_of(indices_M)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        value = _mean_loss(loss_of, held_out)
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
def _mean_loss(loss_of: Any, indices: torch.Tensor) -> float:
    return float(sum(loss_of(part) * len(part) for part in torch.split(indices, BATCH)) / len(indices))


def _copy(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _centre(router: TokenRouter, hidden_LND: torch.Tensor, budgets_N: torch.Tensor) -> None:
    """Shift the logarithms of worths to mean 0 in every layer: the static router decides what each layer gets."""
    device = router.out_LR.device
    for layer, shift_NR in enumerate(router.shifts(budgets_N.to(device))):
        worths_N = router.log_worths(layer, hidden_LND[layer].to(device).float()[:, None], shift_NR)
        router.out_bias_L[layer] -= worths_N.mean()


@torch.no_grad()
def _fit_scale(router: TokenRouter, hidden_LND: torch.Tensor) -> None:
    """Scale what the networks read to a variance of about 1, whatever the size of the hidden states."""
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
    """Set the router's offsets to log prices so that its mean cost on `blocks` meets each of ascending budgets."""
    offsets, plans = [], []
    offset = 0.0
    with bar(len(budgets), description="calibrate", show=show) as advance:
        for budget, subnet in zip(budgets, static_answers(static, table, budgets), strict=True):

            def used_at(offset: float, budget: float = budget, subnet: Subnet = subnet) -> TokenRouting:
                router.offsets_C, router.budgets_C = torch.full((2,), offset), torch.full((2,), budget)
                router.plan_CL = torch.arange(2.0)[:, None].expand(-1, router.layers)
                routing = TokenRouting(model, router, [budget], [subnet])
                casts = torch.autocast(
                    model.device.type, dtype=arithmetic or model.dtype, enabled=_casts(model, arithmetic)
                )
                with routing.use(), casts, torch.inference_mode():
                    for tokens_BT in blocks.batches(batch_tokens(model.device, 1024)):
                        body_of(model.lm)(input_ids=tokens_BT.to(model.device), use_cache=False)
                return routing

            offset, routing = _find_offset(used_at, budget, offset)
            offsets.append(offset)
            plans.append(routing.costs_of_layers)
            advance()
    router.budgets_C, router.offsets_C = torch.tensor(budgets), torch.tensor(offsets)
    router.plan_CL = torch.stack(plans).cpu()
    router.to(model.device)


def _find_offset(used_at: Callable[[float], TokenRouting], budget: float, offset: float) -> tuple[float, TokenRouting]:
    """Find the offset at which the average cost meets the budget, by false position; returns the best of TRIES."""
    tried: list[tuple[float, float, TokenRouting]] = []
    for _ in range(TRIES):
        routing = used_at(offset)
        tried.append((offset, routing.average_cost / budget - 1, routing))
        if abs(tried[-1][1]) < TOLERANCE:
            break
        offset = _next_offset(sorted((at, missed) for at, missed, _ in tried))
    offset, _, routing = min(tried, key=lambda item: abs(item[1]))
    return offset, routing


def _next_offset(tried: Sequence[tuple[float, float]]) -> float:
    """Return the next offset to try: between one too low and one too high, else beyond all tried.

    Args:
        tried: offsets, ascending, with the relative error of their cost; a cost above the budget means a price too low.
    """
    too_low = [pair for pair in tried if pair[1] > 0]
    too_high = [pair for pair in tried if pair[1] <= 0]
    step = FIRST_STEP * 2.0 ** len(tried)
    if not too_high:
        return min(too_low[-1][0] + step * too_low[-1][1], LARGEST_OFFSET)
    if not too_low:
        return max(too_high[0][0] + step * too_high[0][1], -LARGEST_OFFSET)
    (low, above), (high, below) = too_low[-1], too_high[0]
    return low + min(max(above / (above - below), 0.1), 0.9) * (high - low)
