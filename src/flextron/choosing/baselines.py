"""Other ways to choose a sub-network within one limit: what the router is compared with, at as many measured losses.

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
"""After which the knapsack is given up; 60 sub-layers of 25 choices take well under one."""
SCALE = 1000.0
"""Of costs and losses in the knapsack: the solver's tolerances are absolute, 1e-6."""
SLACK = 1e-5
"""Part of the full model's cost to stay below the limit where the solver's tolerance let it be exceeded."""
POPULATION = 16
MOVES = 4
"""Most sub-layers that a mutation moves at first; more where it finds nothing new."""
CROSSED = 0.5
"""Share of children that have two parents."""
ATTEMPTS = 200
"""Proposals in a row that were all measured before, after which a search ends."""

Meter = Callable[[Subnet], float]
"""Loss of a sub-network, such as `routers.pairs.LossMeter`."""


def equal_widths(table: CostTable, limit: float) -> Subnet:
    """The same widths in every layer, and about the same part of both axes: as much as fits of the one kept least.

    MatFormer (Devvrit et al., 2023, arXiv 2310.07707), whose named sub-models have one width in all layers.

    Args:
        limit: what the sub-network may cost at most, in the table's unit; so for all functions here.

    Raises:
        BudgetError: a limit below the smallest sub-network; so for all functions here.
    """
    return equal_widths_within([_possible(table, limit)])


def equal_widths_within(ceilings: Sequence[Ceiling], fits: Callable[[Subnet], bool] = lambda _: True) -> Subnet:
    """The same widths in every layer as `equal_widths` has them, within several limits.

    Args:
        fits: which of them may be taken, such as those that an export format can state.

    Raises:
        BudgetError: none of those that may be taken keeps all limits.
    """
    space = ceilings[0].table.search_space

    def parts(widths: tuple[int, ...]) -> list[float]:
        return sorted(width / space[axis][-1] for axis, width in zip(AXES, widths, strict=True))

    sizes = sorted(product(*(space[axis] for axis in AXES)), key=parts, reverse=True)
    for subnet in (space.uniform(**dict(zip(AXES, size, strict=True))) for size in sizes):
        if meets(ceilings, subnet) and fits(subnet):
            return subnet
    limits = ", ".join(ceiling.text for ceiling in ceilings)
    raise BudgetError(f"no equal widths that can be used are within {limits}. Raise the budget.")


@torch.inference_mode()
def block_influence(model: ElasticModel, blocks: TokenBlocks) -> Floats:
    """How much each layer of the full model changes the hidden states, [L]: 1 - their mean cosine similarity.

    ShortGPT (Men et al., 2024, arXiv 2403.03853), Block Influence; one forward pass over the text.
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
    """The full model without its least influential layers, as many as it takes; of equal ones the lower goes first.

    ShortGPT (Men et al., 2024, arXiv 2403.03853). What is left of the limit stays unused.

    Args:
        influence: of each layer, such as `block_influence`.

    Raises:
        SubnetError: a search space without width 0, or influences of another number of layers.
    """
    ceiling, space = _possible(table, limit), table.search_space
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
    """Some layers full, the others left out."""
    space = table.search_space
    return Subnet(**{axis: tuple(space[axis][-1] * int(kept) for kept in kept_L) for axis in AXES})


def greedy(sensitivity: Sensitivity, table: CostTable, limit: float) -> Subnet:
    """The untrained router's answer, as `flextron.route` gives it where there is no router: least increase per cost."""
    return greedy_answer(sensitivity, [_possible(table, limit)])


def knapsack(sensitivity: Sensitivity, table: CostTable, limit: float) -> Subnet:
    """The least sum of loss increases within the limit, exactly: a multiple-choice knapsack as an integer program.

    HALP (Shen et al., 2021, arXiv 2110.10811) prunes by a knapsack over a latency table. Solved by HiGHS, in
    `scipy.optimize.milp`, to a relative gap of 1e-6.

    Raises:
        FlextronError: the solver proves no optimum in SOLVER_SECONDS.
    """
    ceiling, space = _possible(table, limit), table.search_space
    sub_layers, choices = np.nonzero(allowed(space))
    increases = increase_matrix(sensitivity)[sub_layers, choices]
    costs = cost_matrix(table)[sub_layers, choices]
    for less in (0.0, SLACK):
        taken = _solve(sub_layers, increases, costs / table.full, (limit - table.fixed) / table.full - less)
        indices_S = np.zeros(len(AXES) * space.layers, dtype=np.int64)
        indices_S[sub_layers[taken]] = choices[taken]
        subnet = to_subnet(space, indices_S)
        if meets([ceiling], subnet):
            return subnet
    raise FlextronError(f"the knapsack's solver exceeds {ceiling.text} by rounding. Use another limit, or greedy.")


def _solve(sub_layers: Indices, increases: Floats, costs: Floats, most: float) -> Indices:
    """Which items are taken, one for each sub-layer: at a cost of `most` or less, with the least sum of increases."""
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
    """The best measured of `evaluations` random sub-networks that use the limit up.

    The control of every architecture search (Li and Talwalkar, 2019, arXiv 1902.07638). Fewer are measured only where
    ATTEMPTS draws in a row bring nothing new.
    """
    ceiling, draw = _possible(table, limit), np.random.default_rng(seed)
    within = _Within.of(ceiling)

    def propose(_measured: dict[Subnet, float], _attempt: int) -> Subnet:
        return to_subnet(table.search_space, within.repaired(draw.integers(0, within.last_S + 1), draw))

    return _best(propose, meter, evaluations)


def evolve(
    sensitivity: Sensitivity, table: CostTable, limit: float, meter: Meter, *, evaluations: int, seed: int
) -> Subnet:
    """The best measured of `evaluations` sub-networks that evolve from the greedy choice; none is measured twice.

    Once-for-all (Cai et al., 2020, arXiv 1908.09791) evolves with a predictor; here each is measured.
    Parents are drawn from the POPULATION best so far, by tournaments of two; a child crosses two of them or copies
    one, moves a few sub-layers up or down, and is repaired to use the limit up. Where children bring nothing new any
    more, random sub-networks stand in; fewer are measured only where ATTEMPTS in a row bring nothing new.
    """
    first, space = greedy(sensitivity, table, limit), table.search_space
    within, draw = _Within.of(_possible(table, limit)), np.random.default_rng(seed)

    def propose(measured: dict[Subnet, float], attempt: int) -> Subnet:
        if not measured:
            return first
        if attempt > ATTEMPTS // 2:
            return to_subnet(space, within.repaired(draw.integers(0, within.last_S + 1), draw))
        # The first generation are the greedy choice's own children.
        best = sorted(measured, key=measured.__getitem__)[:POPULATION] if len(measured) >= POPULATION else [first]
        mother_S, father_S = to_indices(space, [best[draw.integers(len(best), size=2).min()] for _ in range(2)])
        if draw.random() < CROSSED:
            mother_S = np.where(draw.random(len(mother_S)) < 0.5, mother_S, father_S)
        return to_subnet(space, within.repaired(_moved(mother_S, within.last_S, MOVES + attempt, draw), draw))

    return _best(propose, meter, evaluations)


def _moved(indices_S: Indices, last_S: Indices, most: int, draw: np.random.Generator) -> Indices:
    """One to `most` random sub-layers moved up or down, by at most a quarter of their choices."""
    count = min(int(draw.integers(1, most + 1)), len(indices_S))
    which = draw.choice(len(indices_S), count, replace=False)
    steps = draw.integers(1, np.maximum(1, last_S[which] // 4) + 1) * draw.choice([-1, 1], count)
    moved_S = indices_S.copy()
    moved_S[which] = np.clip(moved_S[which] + steps, 0, last_S[which])
    return moved_S


def _best(propose: Callable[[dict[Subnet, float], int], Subnet], meter: Meter, evaluations: int) -> Subnet:
    """The best of `evaluations` proposals, which are told what was measured and how many of the last were not new."""
    if evaluations < 1:
        raise ValueError(f"evaluations is {evaluations}; a search measures at least 1 sub-network.")
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
class _Within:
    """A limit over choices as arrays."""

    costs_SK: Floats
    fixed: float
    last_S: Indices
    """The widest choice of each sub-layer."""
    limit: float

    @classmethod
    def of(cls, ceiling: Ceiling) -> _Within:
        table = ceiling.table
        last_S = choice_counts(table.search_space) - 1
        return cls(cost_matrix(table), table.fixed, last_S, ceiling.limit * (1 + TOLERANCE))

    def exceeds(self, indices_S: Indices) -> bool:
        return bool(prices(self.costs_SK, self.fixed, indices_S[None])[0] > self.limit)

    def repaired(self, indices_S: Indices, draw: np.random.Generator) -> Indices:
        """Random sub-layers narrowed, one choice at a time, until all fits; then random ones widened until none can."""
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


def _possible(table: CostTable, limit: float) -> Ceiling:
    """The limit, once the smallest sub-network keeps it."""
    ceiling = Ceiling(table, limit, format_cost(limit, table.unit))
    check_possible([ceiling])
    return ceiling
