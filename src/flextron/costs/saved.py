"""Latency tables beside a checkpoint: saved, found for the device at hand, read from a CSV, described."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from flextron.costs.fitting import fit, price_errors
from flextron.costs.table import CostTable
from flextron.costs.timing import PHASES, TOKENS, check_phase, phase_of, present_conditions
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device
from flextron.errors import CostError
from flextron.subnet import SearchSpace, Subnet

FOLDER = "latency"
LLAMA_CPP = "llama.cpp"
"""What the name of the engine begins with in tables that were measured in llama.cpp."""
_COLUMNS = ("neurons", "kv_groups", "ms")


def table_file(folder: str | Path, table: CostTable) -> Path:
    """Where a table lies beside a checkpoint: one file for each set of conditions."""
    parts = {"engine": "", "quantization": "", "device": "", "dtype": "", "batch": "b", TOKENS[table.metric]: "t"}
    about = table.conditions
    name = "-".join([table.metric, *(f"{prefix}{about[key]}" for key, prefix in parts.items() if key in about)])
    return Path(folder) / FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def save_table(folder: str | Path, table: CostTable) -> Path:
    """Write a table beside a checkpoint, in place of one of the same conditions; returns the file."""
    file = table_file(folder, table)
    table.save(file)
    return file


def find_table(
    model: ElasticModel,
    folder: str | Path,
    metric: str,
    *,
    tokens: int | None = None,
    foreign: bool = False,
    engine: str | None = None,
    quantization: str | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> CostTable:
    """The table of a checkpoint for this device, type and these versions, of the text length nearest to `tokens`.

    Of several, that of the smallest batch; without `tokens`, that of the shortest text.

    Args:
        metric: "ttft" or "tpot".
        engine: prefer a table of this outside engine, such as `LLAMA_CPP`, and `warn` where there is none; by default
            one that was measured in this process.
        quantization: with `engine`, prefer a table of weights of this type, and `warn` where there is none.
        foreign: take one of another device or version if there is no other, the same device first, and `warn`.

    Raises:
        CostError: a file that cannot be read, none measured, or none for what is here and `foreign` is false; the
            message says what to do.
    """
    way_out = f"Measure one: flextron measure-latency {folder} --phase {phase_of(metric)}"
    tables = _candidates(model, folder, metric, way_out)
    present = present_conditions(model)
    if engine == LLAMA_CPP:  # which is timed on the CPU, wherever the model is
        present["device"] = describe_device("cpu")
        way_out += " --engine llamacpp"
    wanted = _Wanted(present, engine, quantization, tokens or 0)
    nearest = min(tables, key=wanted.distance)
    for text in wanted.engine_differs(nearest):
        warn(text)
    differ = "; ".join(foreign_conditions(nearest, present))
    if differ and not foreign:
        raise CostError(
            f"no latency table of {phase_of(metric)} in {folder} was measured here ({differ}). "
            f"{way_out}, or allow it: --any-device"
        )
    if differ:
        warn(f"using a latency table that was measured elsewhere: {differ}.")
    return nearest


def _candidates(model: ElasticModel, folder: str | Path, metric: str, way_out: str) -> list[CostTable]:
    """The tables of a metric for the model's search space.

    Raises:
        CostError: none.
    """
    named = f"{phase_of(metric)} ({metric})"
    saved = (CostTable.load(file) for file in sorted((Path(folder) / FOLDER).glob("*.json")))
    tables = [table for table in saved if table.metric == metric]
    if not tables:
        raise CostError(f"{folder} has no latency table of {named}. {way_out}")
    tables = [table for table in tables if table.search_space == model.search_space]
    if not tables:
        raise CostError(f"the latency tables of {phase_of(metric)} in {folder} are of another search space. {way_out}")
    return tables


@dataclass(frozen=True)
class _Wanted:
    """What a table should have been measured with."""

    present: dict[str, Any]
    engine: str | None
    quantization: str | None
    tokens: int

    def distance(self, table: CostTable) -> tuple[list[bool], int, int]:
        """How far a table is from it, to compare: first what differs, then the batch, then the length of the text."""
        differs = [_differs(table, *item) for item in self.present.items()]
        nameless = "device" not in table.conditions  # of an outside engine: only where none was measured here
        return (
            [not is_of(table, self.engine), self._other_weights(table), *differs, nameless],
            _batch(table),
            abs(_length(table) - self.tokens),
        )

    def engine_differs(self, table: CostTable) -> list[str]:
        """A sentence where the table is of another engine, or of other weights in this one."""
        named = f"the latency table of {phase_of(table.metric)} was measured"
        if not is_of(table, self.engine):
            where = table.conditions.get("engine", "another engine")
            return [f"{named} in {where}, not in {self.engine or 'flextron'}, where times differ."]
        if self._other_weights(table):
            return [f"{named} with weights in {table.conditions['quantization']}, not in {self.quantization}."]
        return []

    def _other_weights(self, table: CostTable) -> bool:
        return self.quantization is not None and _differs(table, "quantization", self.quantization)


def foreign_conditions(table: CostTable, present: dict[str, Any]) -> list[str]:
    """What differs between a table's conditions and the present ones; what a table does not name is not compared."""
    return [
        f"its {key} is {table.conditions[key]}, here it is {value}"
        for key, value in present.items()
        if _differs(table, key, value)
    ]


def is_of(table: CostTable, engine: str | None) -> bool:
    """Whether a table is of an outside engine, such as `LLAMA_CPP`; None: whether it is not of llama.cpp."""
    name = str(table.conditions.get("engine", ""))
    return not name.startswith(LLAMA_CPP) if engine is None else name.startswith(engine)


def _differs(table: CostTable, key: str, value: Any) -> bool:
    return bool(table.conditions.get(key, value) != value)


def _batch(table: CostTable) -> int:
    return int(table.conditions.get("batch", 1))


def _length(table: CostTable) -> int:
    return int(table.conditions.get(TOKENS[table.metric], 0))


def table_from_csv(file: str | Path, space: SearchSpace, *, phase: str, conditions: dict[str, Any]) -> CostTable:
    """A table fitted to times that another engine was measured at.

    The CSV has the columns `neurons`, `kv_groups` and `ms`; widths are one number for all layers, or one for each
    layer with spaces in between.

    Raises:
        CostError: not readable, columns missing, widths that are not in the search space, or too few of them; the
            message has the file and the line.
        ValueError: another phase.
    """
    check_phase(phase)
    subnets, times = _read_csv(file, space)
    try:
        table = fit(space, subnets, times, metric=PHASES[phase])
    except CostError as error:
        raise CostError(f"{file}: {error}") from None
    error_median = median(price_errors(table, subnets, times))
    about = {"phase": phase, "engine": f"as in {Path(file).name}", **conditions, "error_median": error_median}
    return replace(table, conditions=about)


def _read_csv(file: str | Path, space: SearchSpace) -> tuple[list[Subnet], list[float]]:
    """Sub-networks and ms, line by line; a byte order mark, as spreadsheets write, and blanks may be there."""
    subnets, times = [], []
    try:
        with Path(file).open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, restval="", skipinitialspace=True)
            found = list(reader.fieldnames or ())
            missing = [column for column in _COLUMNS if column not in found]
            if missing:
                raise CostError(f"{file} lacks the columns {missing}; it has {found}.")
            for row in reader:
                subnets.append(_subnet_of(space, row))
                times.append(_milliseconds(row["ms"]))
    except (OSError, UnicodeDecodeError) as error:
        raise CostError(f"cannot read {file}: {error}") from None
    except (ValueError, csv.Error) as error:
        raise CostError(f"{file}, line {reader.line_num}: {error}") from None
    return subnets, times


def _subnet_of(space: SearchSpace, row: dict[str, str]) -> Subnet:
    def widths(text: str) -> tuple[int, ...]:
        numbers = tuple(map(int, text.split()))
        return numbers * space.layers if len(numbers) == 1 else numbers

    subnet = Subnet(widths(row["neurons"]), widths(row["kv_groups"]))
    space.check(subnet)
    return subnet


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"ms is {text}; it must be a number above 0.")
    return value


def describe(table: CostTable) -> str:
    """A table in a few lines: costs of the full and the smallest model, error of the fit, conditions."""
    conditions = dict(table.conditions)
    error = conditions.get("error_median")
    lines = [f"{table.metric}: full model {table.full:.2f} ms, smallest {table.smallest:.2f} ms"]
    if conditions.get("error_worst") is not None:
        lines.append(
            f"on {conditions['held_out']} sub-networks that the fit has not seen: "
            f"median error {error:.1%}, worst {conditions['error_worst']:.1%}"
        )
    elif error is not None:
        lines.append(f"median error on the sub-networks that it was fitted to: {error:.1%}")
    if conditions.get("machine_noise") is not None:
        others = conditions.get("other_programs")
        load = "" if others is None else f"; other programs used {others:.0%} of the processor"
        lines.append(f"the full model's own time varied by {conditions['machine_noise']:.1%} meanwhile{load}")
    lines.append(
        json.dumps({key: conditions[key] for key in ("device", "dtype", "engine", "batch") if key in conditions})
    )
    return "\n".join(lines)
