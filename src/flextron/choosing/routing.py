"""From a budget to a sub-network: tables and router of a checkpoint are found, the answer is chosen and explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from flextron.budget import Budget
from flextron.costs.pricing import Ceiling, ceilings, check_possible, doubts, format_cost
from flextron.costs.saved import find_table
from flextron.costs.table import CostTable
from flextron.elastic.model import ElasticModel
from flextron.errors import BudgetError
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.router import Router, metrics_with_router, route_along
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.making import load_token_router
from flextron.subnet import Subnet

GREEDY_LOWEST = 0.2
"""Where the untrained router's grid of budgets begins; it goes on below, more coarsely."""


@dataclass(frozen=True)
class Routed:
    """The answer to a budget."""

    subnet: Subnet
    ceilings: tuple[Ceiling, ...]
    notes: tuple[str, ...]
    """What a user should know, such as that the budget is more than the full model needs."""
    router: Router | None
    """None where the greedy choice by sensitivities stood in for a trained router."""

    def costs(self) -> list[str]:
        """What it is predicted to cost, a line for each limit."""
        return [
            f"{ceiling.text}: {format_cost(ceiling.table.price(self.subnet), ceiling.table.unit)} predicted, "
            f"{ceiling.table.price(self.subnet) / ceiling.table.full:.3f}x of the full model's "
            f"{format_cost(ceiling.table.full, ceiling.table.unit)}; "
            f"the limit is {format_cost(ceiling.limit, ceiling.table.unit)}"
            for ceiling in self.ceilings
        ]


def route(
    model: ElasticModel,
    budget: Budget | str,
    folder: str | Path | None = None,
    *,
    any_device: bool = False,
    sensitivity: Sensitivity | None = None,
    engine: str | None = None,
    quantization: str | None = None,
    neuron_step: int | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Routed:
    """The best sub-network of `model` within a budget such as "12ms", "0.6x" or "ttft=200ms,150MB".

    By the router of the checkpoint, that of the budget's first metric if there are several; without one, by the
    sensitivities alone (greedy). No limit is exceeded by the tables' prediction.

    Args:
        folder: the elastic checkpoint with its latency tables and routers; by default where `model` was loaded from.
        any_device: use a latency table of another device or version if there is no other, and `warn`.
        sensitivity: to use instead of the folder's, where there is no router.
        engine: whose latency table a budget means, such as `tables.LLAMA_CPP`; by default one measured in this process.
        quantization: with `engine`, the type of weights whose table is preferred, such as "q8_0".
        neuron_step: let every MLP's width be a multiple of it, such as 64 for tensor cores or 256 for k-quants.

    Raises:
        BudgetError: a budget that cannot be read, or that is below the smallest sub-network.
        CostError: no latency table for it.
        RouterError: a router that is damaged or of another checkpoint.
        ValueError: a step of which the search space has no multiples.
    """
    folder = model.folder if folder is None else folder
    budget = Budget.parse(budget) if isinstance(budget, str) else budget

    def latency(metric: str, tokens: int | None) -> CostTable:
        if folder is None:
            raise BudgetError(f"a budget of time ({metric}) needs the folder of a checkpoint with a latency table.")
        return find_table(
            model,
            folder,
            metric,
            tokens=tokens,
            foreign=any_device,
            engine=engine,
            quantization=quantization,
            warn=warn,
        )

    limits = ceilings(model, budget, latency)
    notes = [*doubts(limits), *check_possible(limits)]
    metric = _metric_with_router(budget, folder)
    if metric is None or folder is None:
        return Routed(_greedy(limits, folder, sensitivity, neuron_step), limits, tuple(notes), None)
    router = Router.load(folder, metric, model)
    notes += _clamped(router, limits)
    return Routed(router.choose(limits, neuron_step=neuron_step), limits, tuple(notes), router)


def route_tokens(
    model: ElasticModel,
    budgets: str | Sequence[str],
    folder: str | Path | None = None,
    *,
    hard: bool = False,
    any_device: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> TokenRouting:
    """How every token gets a sub-network of its own, each budget kept on average over tokens.

        with flextron.route_tokens(model, "0.6x").use():
            text = model.generate(input_ids)

    By the token router of the budgets' metric (`flextron train-router --per-token`). Above the full model's cost, all
    runs. Requests with different budgets share a batch: name one for each row.

    Args:
        hard: no forward pass costs more than the budgets of its rows together, by the table's prediction.

    Raises:
        BudgetError: a budget that cannot be read, is below the router's range, or has several limits or other metrics.
        CostError: no latency table for it.
        RouterError: no token router, or one that is damaged or of another checkpoint.
        ValueError: no budget.
    """
    folder = model.folder if folder is None else folder
    wishes = [budgets] if isinstance(budgets, str) else list(budgets)
    if folder is None or not wishes:
        raise ValueError("routing tokens needs a budget, and a model from a folder with a token router.")

    def latency(metric: str, tokens: int | None) -> CostTable:
        return find_table(model, folder, metric, tokens=tokens, foreign=any_device, warn=warn)

    limits = [_only_limit(model, wish, latency) for wish in wishes]
    for doubt in doubts(limits):
        warn(doubt)
    metrics = {limit.table.metric for limit in limits}
    if len(metrics) > 1:
        raise BudgetError(f"one batch has budgets of {' and '.join(sorted(metrics))}; name budgets of one metric.")
    router, _ = load_token_router(folder, metrics.pop(), model)
    shares = [min(1.0, limit.limit / limit.table.full) for limit in limits]
    for limit, share in zip(limits, shares, strict=True):
        if share < router.static.lowest * (1 - 1e-6):
            raise BudgetError(
                f"{limit.text} is {share:.2f}x of the full model, below the token router's lowest budget "
                f"({router.static.lowest:.2f}x). Raise the budget, or route without per-token."
            )
    subnets = [
        route_along(router.static, model.search_space, [replace(limit, limit=share * limit.table.full)])
        for limit, share in zip(limits, shares, strict=True)
    ]
    return TokenRouting(model, router, shares, subnets, hard=hard)


def _only_limit(model: ElasticModel, wish: str, latency: Callable[[str, int | None], CostTable]) -> Ceiling:
    """The one limit of a budget.

    Raises:
        BudgetError: several.
    """
    limits = ceilings(model, Budget.parse(wish), latency)
    if len(limits) > 1:
        raise BudgetError(f"{wish} has {len(limits)} limits; tokens are routed within one, which holds on average.")
    return limits[0]


def _metric_with_router(budget: Budget, folder: str | Path | None) -> str | None:
    """The first metric of the budget for which there is a router, else any, else none."""
    found = [] if folder is None else metrics_with_router(folder)
    asked = [limit.metric for limit in budget.limits if limit.metric in found]
    return next(iter([*asked, *found]), None)


def _clamped(router: Router, limits: tuple[Ceiling, ...]) -> list[str]:
    lowest = router.net.lowest
    return [
        f"{limit.text} is {limit.limit / limit.table.full:.2f}x of the full model, below the router's lowest budget "
        f"({lowest:.2f}x): its lowest answer is narrowed further, greedily."
        for limit in limits
        if limit.table.metric == router.about.metric and limit.limit < lowest * limit.table.full
    ]


def _greedy(
    limits: tuple[Ceiling, ...], folder: str | Path | None, sensitivity: Sensitivity | None, neuron_step: int | None
) -> Subnet:
    if sensitivity is None:
        if folder is None or not Sensitivity.is_in(folder):
            raise BudgetError(
                f"a budget needs the router or the sensitivities of an elastic checkpoint, and {folder} has neither. "
                "Make them with `flextron rank MODEL OUT` and `flextron train-router OUT`."
            )
        sensitivity = Sensitivity.load(folder)
    return greedy_answer(sensitivity, limits, neuron_step=neuron_step)


def greedy_answer(sensitivity: Sensitivity, limits: Sequence[Ceiling], *, neuron_step: int | None = None) -> Subnet:
    """The untrained router's answer: by sensitivities and costs, of several limits each cost as a part of its limit.

    Raises:
        RouterError: sensitivities of another search space than the tables'.
    """
    parts = [replace(limit.table.scaled(1 / limit.limit), unit="parts of the limit") for limit in limits]
    table = reduce(lambda sum_, part: sum_.plus(part, metric="limits"), parts)
    lowest = min(0.99, max(GREEDY_LOWEST, 1.05 * table.smallest / table.full))
    router = StaticRouter.of(sensitivity, table, lowest=lowest)
    return route_along(router, table.search_space, limits, neuron_step=neuron_step)
