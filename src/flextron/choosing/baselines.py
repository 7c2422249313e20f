"""Baselines for the router: other ways to choose a sub-network within one limit, with equally many measured losses.

Shapes: S sub-layers, K choices, L layers; B blocks in a batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from flextron.choosing.routing import greedy_answer
from flextron.costs.pricing import Ceiling, check_possible, format_cost, meets
from flextron.costs.table import CostTable
from flextron.data.blocks import TokenBlocks, batch_tokens
from flextron.elastic.model import ElasticModel
from flextron.errors import BudgetError, FlextronError, SubnetError
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.choices import (
    Floats,
    Indices,
    allowed,
    choice_counts,
    cost_matrix,
    increase_matrix,
    prices,
    to_indices,
    to_subnet,
)
from flextron.routers.static.answering import TOLERANCE
from flextron.subnet import AXES, Subnet

SOLVER_SECONDS = 30.0
"""Time limit of the knapsack solver; 60 sub-layers of 25 choices take well under one second."""
SCALE = 1000.0
"""Factor on costs and losses in the knapsack, because the solver's tolerances are absolute, 1e-6."""
SLACK = 1e-5
"""Margin below the limit, as a fraction of the full model's cost, if the solver's tolerance exceeded the limit."""
POPULATION = 16
"""Number of best sub-networks from which evolution draws parents."""
MOVES = 4
"""Largest number of sub-layers that a mutation moves; it grows while proposals are not new."""
CROSSED = 0.5
"""Share of children with two parents."""
ATTEMPTS = 200
"""A search ends after this many proposals in a row that were measured before."""

Meter = Callable[[Subnet], float]
"""Returns the loss of a sub-network, for example `routers.static.pairs.LossMeter`."""


def equal_widths(table: CostTable, limit: float) -> Subnet:
    """Return the largest equal widths within the limit, keeping about the same fraction of every axis.

    It maximises the fraction kept of the axis that keeps least, then that of the next. The named sub-models of
    MatFormer (Devvrit et al., 2023, arXiv 2310.07707) have one width in all layers too.

    Args:
        limit: highest cost of the sub-network in the table's unit, in all functions of this module.

    Raises:
        BudgetError: the limit is below the smallest sub-network, in all functions of this module.
    """
    return equal_widths_within([_ceiling(table, limit)])


def equal_widths_within(ceilings: Sequence[Ceiling], fits: Callable[[Subnet], bool] = lambda _: True) -> Subnet:
    """Return the largest equal widths within several limits, ordered as in `equal_widths`.

    Args:
        fits: whether a sub-network may be chosen, for example because an export format can express it.

    Raises:
        BudgetError: no allowed sub-network is within all limits.
    """
    space = ceilings[0].table.search_space

    def fractions(widths: tuple[int, ...]) -> list[float]:
        return sorted(width / space[axis][-1] for axis, width in zip(AXES, widths, strict=True))

    sizes = sorted(product(*(space[axis] for axis in AXES)), key=fractions, reverse=True)
    for subnet in (space.uniform(**dict(zip(AXES, size, strict=True))) for size in sizes):
        if meets(ceilings, subnet) and fits(subnet):
            return subnet
    limits = ", ".join(ceiling.text for ceiling in ceilings)
    raise BudgetError(f"no usable equal widths are within {limits}. Raise the budget.")


@torch.inference_mode()
def block_influence(model: ElasticModel, blocks: TokenBlocks) -> Floats:
    """Return how much each layer of the full model changes the hidden states, [L]: 1 - mean cosine similarity.

    This is Block Influence of ShortGPT (Men et al., 2024, arXiv 2403.03853). It takes one forward pass over the text.
    """
    sums_L = np.zeros(len(model.layers))

    def compare(layer: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before_BTD = args[0] if args else kwargs["hidden_states"]
        after_BTD = output[0] if isinstance(output, tuple) else output
        sums_L[layer] += F.cosine_similarity(before_BTD.double(), after_BTD.double(), dim=-1).sum().item()

    hooks = [
        layer.module.register_forward_hook(partial(compare, index), with_kwargs=True)
        for index, layer in enumerate(model.layers)
    ]
    try:
        with model.use(model.search_space.full):
            for tokens_BT in blocks.batches(batch_tokens(model.device)):
                model(tokens_BT.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return 1 - sums_L / blocks.tokens.numel()


def drop_layers(influence: Floats, table: CostTable, limit: float) -> Subnet:
    """Return the full model without as many of its least influential layers as needed to meet the limit.

    Follows ShortGPT (Men et al., 2024, arXiv 2403.03853). Of layers with equal influence, the lower one is dropped
    first. The rest of the limit stays unused.

    Args:
        influence: influence of each layer, [L], for example from `block_influence`.

    Raises:
        SubnetError: the search space has no width 0, or `influence` has another number of layers.
    """
    ceiling, space = _ceiling(table, limit), table.search_space
    if any(space[axis][0] for axis in AXES):
        raise SubnetError("whole layers cannot be dropped in a search space without width 0 on every axis.")
    if len(influence) != space.layers:
        raise SubnetError(f"got influences of {len(influence)} layers; the table is for a model of {space.layers}.")
    kept_L = np.ones(space.layers, dtype=bool)
    for layer in np.argsort(influence, kind="stable"):
        if meets([ceiling], _of_layers(table, kept_L)):
            break
        kept_L[layer] = False
    return _of_layers(table, kept_L)


def _of_layers(table: CostTable, kept_L: NDArray[np.bool_]) -> Subnet:
    """Return the sub-network that keeps the layers of `kept_L` at full width and drops the others."""
    space = table.search_space
    return Subnet(**{axis: tuple(space[axis][-1] * int(kept) for kept in kept_L) for axis in AXES})


def greedy(sensitivity: Sensitivity, table: CostTable, limit: float) -> Subnet:
    """Return the greedy choice by least loss increase per cost, which `flextron.route` gives without a router."""
    return greedy_answer(sensitivity, [_ceiling(table, limit)])


def knapsack(sensitivity: Sensitivity, table: CostTable, limit: float) -> Subnet:
    """Return the exact minimum of summed loss increases within the limit, from a multiple-choice knapsack.

    HALP (Shen et al., 2021, arXiv 2110.10811) prunes by a knapsack over a latency table. Here HiGHS
    (`scipy.optimize.milp`) solves an integer program to a relative gap of 1e-6.

    Raises:
        FlextronError: the solver proves no optimum in SOLVER_SECONDS, or its answer exceeds the limit by rounding.
    """
    ceiling, space = _ceiling(table, limit), table.search_space
    sub_layers, choices = np.nonzero(allowed(space))
    increases = increase_matrix(sensitivity, counted=True)[sub_layers, choices]
    costs = cost_matrix(table)[sub_layers, choices]
    for margin in (0.0, SLACK):
        taken = _solve(sub_layers, increases, costs / table.full, (limit - table.fixed) / table.full - margin)
        indices_S = np.zeros(len(AXES) * space.layers, dtype=np.int64)
        indices_S[sub_layers[taken]] = choices[taken]
        subnet = to_subnet(space, indices_S)
        if meets([ceiling], subnet):
            return subnet
    raise FlextronError(f"the knapsack solver exceeds {ceiling.text} by rounding. Use another limit, or greedy.")


def _solve(sub_layers: Indices, increases: Floats, costs: Floats, most: float) -> Indices:
    """Return the chosen items, one per sub-layer, with the least sum of increases at a cost of `most` or less."""
    items = np.arange(len(sub_layers))
    one_each = csr_array((np.ones(len(items)), (sub_layers, items)))
    result = milp(
        increases / (increases.max() or 1) * SCALE,
        integrality=np.ones(len(items), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] * SCALE, ub=most * SCALE)],
        options={"mip_rel_gap": 1e-6, "time_limit": SOLVER_SECONDS},
    )
    if not result.success:
        raise FlextronError(
            f"the knapsack was not solved in {SOLVER_SECONDS:g} s: {result.message} "
            "Use greedy, or a search space with fewer widths."
        )
    return np.flatnonzero(result.x > 0.5)


def random_search(table: CostTable, limit: float, meter: Meter, *, evaluations: int, seed: int) -> Subnet:
    """Return the best of `evaluations` measured random sub-networks, each widened until the limit is used up.

    Random search is the control of architecture search (Li and Talwalkar, 2019, arXiv 1902.07638). It measures fewer
    only if ATTEMPTS draws in a row are not new.
    """
    draw = np.random.default_rng(seed)
    bound = _Limit.of(_ceiling(table, limit))

    def propose(_measured: dict[Subnet, float], _attempt: int) -> Subnet:
        return to_subnet(table.search_space, bound.repaired(draw.integers(0, bound.last_S + 1), draw))

    return _best(propose, meter, evaluations)


def evolve(
    sensitivity: Sensitivity, table: CostTable, limit: float, meter: Meter, *, evaluations: int, seed: int
) -> Subnet:
    """Return the best of `evaluations` measured sub-networks that evolve from the greedy choice.

    Once-for-all (Cai et al., 2020, arXiv 1908.09791) evolves with a predictor; here every sub-network is measured, and
    none twice. Tournaments of two choose parents among the POPULATION best so far. A child crosses two parents or
    copies one, moves a few sub-layers up or down, and is repaired to use the limit up. If half of ATTEMPTS in a row are
    not new, random sub-networks are tried; if all are not new, the search ends early.
    """
    first, space = greedy(sensitivity, table, limit), table.search_space
    bound, draw = _Limit.of(_ceiling(table, limit)), np.random.default_rng(seed)

    def propose(measured: dict[Subnet, float], attempt: int) -> Subnet:
        if not measured:
            return first
        if attempt > ATTEMPTS // 2:
            return to_subnet(space, bound.repaired(draw.integers(0, bound.last_S + 1), draw))
        # The first generation descends from the greedy choice.
        best = sorted(measured, key=measured.__getitem__)[:POPULATION] if len(measured) >= POPULATION else [first]
        mother_S, father_S = to_indices(space, [best[draw.integers(len(best), size=2).min()] for _ in range(2)])
        if draw.random() < CROSSED:
            mother_S = np.where(draw.random(len(mother_S)) < 0.5, mother_S, father_S)
        return to_subnet(space, bound.repaired(_moved(mother_S, bound.last_S, MOVES + attempt, draw), draw))

    return _best(propose, meter, evaluations)


def _moved(indices_S: Indices, last_S: Indices, most: int, draw: np.random.Generator) -> Indices:
    """Move one to `most` random sub-layers up or down, by at most a quarter of their choices."""
    count = min(int(draw.integers(1, most + 1)), len(indices_S))
    which = draw.choice(len(indices_S), count, replace=False)
    steps = draw.integers(1, np.maximum(1, last_S[which] // 4) + 1) * draw.choice([-1, 1], count)
    moved_S = indices_S.copy()
    moved_S[which] = np.clip(moved_S[which] + steps, 0, last_S[which])
    return moved_S


def _best(propose: Callable[[dict[Subnet, float], int], Subnet], meter: Meter, evaluations: int) -> Subnet:
    """Measure `evaluations` new proposals and return the best.

    `propose` gets the measured losses, and the number of proposals in a row that were not new.
    """
    if evaluations < 1:
        raise ValueError(f"evaluations is {evaluations}; a search measures at least 1 sub-network. Pass 1 or more.")
    measured: dict[Subnet, float] = {}
    attempt = 0
    while len(measured) < evaluations and attempt < ATTEMPTS:
        subnet = propose(measured, attempt)
        attempt += 1
        if subnet not in measured:
            measured[subnet] = meter(subnet)
            attempt = 0
    return min(measured, key=measured.__getitem__)


@dataclass(frozen=True)
class _Limit:
    """A limit on the cost of choices, as arrays."""

    costs_SK: Floats
    fixed: float
    last_S: Indices
    """Index of the widest choice of each sub-layer."""
    limit: float
    """Highest allowed cost, in the table's unit."""

    @classmethod
    def of(cls, ceiling: Ceiling) -> _Limit:
        table = ceiling.table
        last_S = choice_counts(table.search_space) - 1
        return cls(cost_matrix(table), table.fixed, last_S, ceiling.limit * (1 + TOLERANCE))

    def exceeds(self, indices_S: Indices) -> bool:
        return bool(prices(self.costs_SK, self.fixed, indices_S[None])[0] > self.limit)

    def repaired(self, indices_S: Indices, draw: np.random.Generator) -> Indices:
        """Narrow random sub-layers, one choice at a time, until the limit is met; then widen random ones that fit."""
        indices_S, every_S = indices_S.copy(), np.arange(len(indices_S))
        while self.exceeds(indices_S) and indices_S.any():
            indices_S[draw.choice(np.flatnonzero(indices_S))] -= 1
        while True:
            wider_S = np.minimum(indices_S + 1, self.last_S)
            steps_S = self.costs_SK[every_S, wider_S] - self.costs_SK[every_S, indices_S]
            left = self.limit - prices(self.costs_SK, self.fixed, indices_S[None])[0]
            able = np.flatnonzero((wider_S > indices_S) & (steps_S <= left))
            if not len(able):
                return indices_S
            indices_S[draw.choice(able)] += 1


def _ceiling(table: CostTable, limit: float) -> Ceiling:
    """Return the limit as a Ceiling, after checking that the smallest sub-network meets it."""
    ceiling = Ceiling(table, limit, format_cost(limit, table.unit))
    check_possible([ceiling])
    return ceiling
