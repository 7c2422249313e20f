"""From a budget to cost tables with ceilings, measured ones scaled to what was asked; and costs for people to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context
from typing import Any

from flextron.budget import Budget, Limit
from flextron.costs.formulas import formula_table
from flextron.costs.table import CostTable
from flextron.costs.timing import trust_warning
from flextron.elastic.model import ElasticModel
from flextron.errors import BudgetError, CostError
from flextron.subnet import Subnet

_ROUNDING = 1e-9
"""Relative: sums in another order may differ by it."""
_SCALES = {
    "ms": ((1e3, "s"), (1, "ms")),
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")),
    "parameters": ((1e12, "T parameters"), (1e9, "B parameters"), (1e6, "M parameters"), (1e3, "k parameters")),
    "FLOPs": ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs")),
}

Latency = Callable[[str, int | None], CostTable]
"""The measured table for "tpot" or "ttft", the nearest to these tokens of prompt or context if there are several."""


@dataclass(frozen=True)
class Ceiling:
    """What a sub-network may cost at most by one table."""

    table: CostTable
    limit: float
    """In the table's unit."""
    text: str
    """The part of the budget that it comes from, for messages."""


def ceilings(model: ElasticModel, budget: Budget | str, latency: Latency) -> tuple[Ceiling, ...]:
    """A table and what it may give at most, for each limit of `budget`, in its order.

    e2e is the time to the first token plus that of all further ones. Where a prompt's length differs from the one that
    was measured, all times to the first token are scaled by the ratio of lengths, though attention grows faster. A
    relative limit is a part of the full model's cost by the same table; of kv without a length, that of one token.

    Args:
        latency: gives the measured table for "tpot" or "ttft" and the prompt tokens asked for, None for any.

    Raises:
        BudgetError: a text that cannot be read.
        CostError: no measured table for a time.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    return tuple(_ceiling(model, limit, latency) for limit in budget.limits)


def _ceiling(model: ElasticModel, limit: Limit, latency: Latency) -> Ceiling:
    table = _table(model, limit, latency)
    return Ceiling(table, limit.value * table.full if limit.relative else limit.value, str(limit))


def _table(model: ElasticModel, limit: Limit, latency: Latency) -> CostTable:
    if limit.metric == "tpot":
        return latency("tpot", None)
    if limit.metric == "ttft":
        return _first_token(limit.prompt_tokens, latency)
    if limit.metric == "e2e":
        further = latency("tpot", limit.prompt_tokens).scaled((limit.new_tokens or 1) - 1)
        return _first_token(limit.prompt_tokens, latency).plus(further, metric="e2e")
    return formula_table(model, limit.metric, context_tokens=limit.prompt_tokens or 1)


def _first_token(prompt_tokens: int | None, latency: Latency) -> CostTable:
    table = latency("ttft", prompt_tokens)
    measured = table.conditions.get("prompt_tokens")
    if prompt_tokens is None or prompt_tokens == measured:
        return table
    if not measured:
        raise CostError(
            "this table of times to the first token does not say for how many prompt_tokens. Measure again."
        )
    scaled = table.scaled(prompt_tokens / measured)
    return replace(scaled, conditions={**table.conditions, "scaled_to_prompt_tokens": prompt_tokens})


def check_possible(ceilings: Iterable[Ceiling]) -> list[str]:
    """A sentence for each ceiling that the full model meets.

    Costs rise with widths, so that the smallest sub-network meets all ceilings at once if it meets each.

    Raises:
        BudgetError: a ceiling below the smallest sub-network of the search space.
    """
    notes = []
    for ceiling in ceilings:
        table = ceiling.table
        if not _within(table.smallest, ceiling.limit):
            raise BudgetError(_impossible(ceiling))
        if _within(table.full, ceiling.limit):
            full = format_cost(table.full, table.unit)
            much = "all" if _within(ceiling.limit, table.full) else "more than"
            notes.append(f"{ceiling.text} is {much} the full model needs ({full}): the full model meets it.")
    return notes


def doubts(ceilings: Iterable[Ceiling]) -> list[str]:
    """A sentence for each metric whose latency table is not to be trusted."""
    tables = {ceiling.table.metric: ceiling.table for ceiling in ceilings}
    return [
        f"the latency table of {metric} was {warning}. Measure it again on an idle machine: flextron measure-latency"
        for metric, table in tables.items()
        if (warning := trust_warning(table.conditions)) is not None
    ]


def _impossible(ceiling: Ceiling) -> str:
    """What cannot be, with numbers that can: they are rounded up."""
    table = ceiling.table
    smallest = format_cost(table.smallest, table.unit, rounding=ROUND_CEILING)
    part = _three_digits(table.smallest / table.full, ROUND_CEILING)
    space = table.search_space
    way_out = ", or rank with a search space that has narrower widths."
    if space.neurons[0] == space.kv_groups[0] == 0:
        way_out = ": here every layer is skipped already, and what is left are embeddings and norms."
    return (
        f"budget {ceiling.text} is below the smallest sub-network of the search space "
        f"({smallest}{_where(table.conditions)}; {part}x of the full model). Raise the budget{way_out}"
    )


def _where(conditions: Any) -> str:
    """Device, dtype and threads, as far as they are known."""
    device, dtype, threads = (conditions.get(key) for key in ("device", "dtype", "threads"))
    named = f" on {device}" if device else ""
    named += f", {dtype}" if dtype else ""
    return named + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")


def meets(ceilings: Iterable[Ceiling], subnet: Subnet) -> bool:
    """Whether `subnet` is within all ceilings, up to rounding.

    Raises:
        SubnetError: not in the search space of the tables.
    """
    return all(_within(ceiling.table.price(subnet), ceiling.limit) for ceiling in ceilings)


def _within(cost: float, limit: float) -> bool:
    return cost <= limit * (1 + _ROUNDING)


def format_cost(value: float, unit: str, *, rounding: str = ROUND_HALF_EVEN) -> str:
    """Three digits and a unit for people: `12.3 ms`, `80.1 M parameters`, `150 MB`, `212 MFLOPs`."""
    rounded = float(_three_digits(value, rounding))
    scale, name = next(((scale, name) for scale, name in _SCALES[unit] if rounded >= scale), (1, unit))
    return f"{_three_digits(value / scale, rounding)} {name}"


def _three_digits(value: float, rounding: str) -> str:
    number = Context(prec=3, rounding=rounding).create_decimal(repr(float(value)))
    return format(number.normalize(), "f")
