"""`CostTable`: the cost of a sub-network, as a fixed part plus a part for each layer's widths. No torch here.

Flextron (Cai et al., ICML 2024), section 4.2, looks latency up in a table. Ours: the additive form, and one table type
for milliseconds, parameters, bytes and FLOPs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from flextron.atomic import clear_errors, write_text
from flextron.errors import CostError
from flextron.records import checked, read_record
from flextron.subnet import AXES, SearchSpace, Subnet

VERSION = 1
CostRows: TypeAlias = tuple[tuple[float, ...], ...]
UNITS = {"tpot": "ms", "ttft": "ms", "kv": "bytes", "weights": "bytes", "parameters": "parameters", "flops": "FLOPs"}
"""The unit of each metric that a saved table may have."""


class Conditions(TypedDict, total=False):
    """Those conditions of a table that are computed with; there may be others."""

    device: str
    dtype: str
    engine: str
    quantization: str
    batch: int
    prompt_tokens: int
    context_tokens: int
    held_out: int | None
    error_median: float | None
    error_worst: float | None
    machine_noise: float | None
    other_programs: float | None
    warning: str | None


@dataclass(frozen=True)
class CostTable:
    """Additive costs: `fixed` plus, for each layer, the cost of its MLP's width and of its KV groups.

    `neurons[l][i]` is the cost of layer l at `search_space.neurons[i]` neurons, `kv_groups[l][i]` likewise; neither
    falls as the width grows. `conditions` record what was measured and where, or the formula of a computed table.
    """

    search_space: SearchSpace
    metric: str
    """tpot (time per output token), ttft (time to first token), parameters, weights, kv or flops."""
    unit: str
    """ms, bytes, parameters or FLOPs."""
    fixed: float
    neurons: CostRows
    kv_groups: CostRows
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", dict(self.conditions))
        for axis in AXES:
            object.__setattr__(self, axis, tuple(tuple(map(float, row)) for row in self[axis]))
            self._check_rows(axis)
        if not (math.isfinite(self.fixed) and self.fixed >= 0):
            raise CostError(f"the fixed cost is {self.fixed}; it must be a number from 0 up.")

    def _check_rows(self, axis: str) -> None:
        rows = self[axis]
        layers, widths = self.search_space.layers, len(self.search_space[axis])
        if len(rows) != layers or any(len(row) != widths for row in rows):
            raise CostError(
                f"a cost table of this search space has {layers} rows of {widths} {axis}, not {list(rows)}."
            )
        for layer, row in enumerate(rows):
            if not all(math.isfinite(cost) and cost >= 0 for cost in row):
                raise CostError(f"the costs of {axis} must be numbers from 0 up; layer {layer} has {list(row)}.")
            if any(low > high for low, high in pairwise(row)):
                raise CostError(
                    f"the costs of {axis} must rise or stay as the width grows; layer {layer} has {list(row)}."
                )

    def __getitem__(self, axis: str) -> CostRows:
        """Return the costs on one of AXES: a row for each layer, with a cost for each width of the search space."""
        rows: CostRows = getattr(self, axis)
        return rows

    def price(self, subnet: Subnet) -> float:
        """Return the cost of `subnet`, in `unit`.

        Raises:
            SubnetError: `subnet` is not in the table's search space.
        """
        self.search_space.check(subnet)
        parts: list[float] = [
            row[choices.index(width)]
            for axis in AXES
            for choices in (self.search_space[axis],)
            for row, width in zip(self[axis], subnet[axis], strict=True)
        ]
        return self.fixed + sum(parts)

    @property
    def full(self) -> float:
        """Cost of the full model."""
        return self.price(self.search_space.full)

    @property
    def smallest(self) -> float:
        """Cost of the smallest sub-network of the search space."""
        return self.price(self.search_space.smallest)

    def scaled(self, factor: float) -> CostTable:
        """Return the table with all costs times `factor` (at least 0), for instance the time of 127 tokens."""

        def times(rows: CostRows) -> CostRows:
            return tuple(tuple(factor * cost for cost in row) for row in rows)

        rows: dict[str, Any] = {axis: times(self[axis]) for axis in AXES}
        return replace(self, fixed=factor * self.fixed, **rows)

    def plus(self, other: CostTable, *, metric: str) -> CostTable:
        """Return the sum of two tables, for instance end-to-end time from both phases.

        It has this one's conditions, and a warning from either.

        Raises:
            CostError: units or search spaces differ.
        """
        if (other.unit, other.search_space) != (self.unit, self.search_space):
            raise CostError(f"cannot add {other.unit} to {self.unit}, or tables of different search spaces.")

        def sums(rows: CostRows, others: CostRows) -> CostRows:
            return tuple(tuple(map(sum, zip(*pair, strict=True))) for pair in zip(rows, others, strict=True))

        rows: dict[str, Any] = {axis: sums(self[axis], other[axis]) for axis in AXES}
        warning = {key: text for key, text in other.conditions.items() if key == "warning"}
        conditions = {**warning, **self.conditions}
        return replace(self, metric=metric, fixed=self.fixed + other.fixed, conditions=conditions, **rows)

    def save(self, file: str | Path) -> None:
        """Write the table as JSON, whole or not at all (docs/formats.md)."""
        with clear_errors(file):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> CostTable:
        """Read what `save` wrote.

        Raises:
            CostError: the file is missing, damaged, of another version or in another unit than flextron's.
        """
        try:
            table = checked(read_record(file, version=VERSION, keys=cls.__dataclass_fields__), cls)
            checked(table.conditions, Conditions, "conditions")
            if UNITS.get(table.metric) != table.unit:
                known = ", ".join(f"{metric} in {unit}" for metric, unit in UNITS.items())
                raise CostError(f"it has {table.metric[:60]!r} in {table.unit[:60]!r}; flextron keeps {known}")
            if not 0 < table.full < math.inf:
                raise CostError(f"the full model costs {table.full}; it must be above 0")
            return table
        except (OSError, ValueError, CostError) as error:
            reason = str(error).rstrip(".")
            raise CostError(
                f"cannot read the cost table {file}: {reason}. Measure again, or delete the file."
            ) from None


def linear_table(
    search_space: SearchSpace,
    *,
    metric: str,
    unit: str,
    fixed: float,
    per_neuron: Sequence[float],
    per_kv_group: Sequence[float],
    conditions: Mapping[str, Any],
) -> CostTable:
    """Return a table of costs proportional to the width.

    Args:
        per_neuron, per_kv_group: cost of one unit in each layer.
    """
    return CostTable(
        search_space,
        metric,
        unit,
        fixed,
        tuple(tuple(cost * width for width in search_space.neurons) for cost in per_neuron),
        tuple(tuple(cost * width for width in search_space.kv_groups) for cost in per_kv_group),
        conditions,
    )
