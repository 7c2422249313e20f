"""`Levels`: nested sub-networks that a server runs, and their file levels.json beside a checkpoint. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from flextron.atomic import write_text
from flextron.errors import BudgetError, CheckpointError
from flextron.records import RecordError, checked, read_record
from flextron.serving.engine import Level
from flextron.subnet import AXES, SearchSpace

VERSION = 1
FILE = "levels.json"
FULL = "full"
"""Name of the last level."""
LOSSES = ("router", "pairs", "sensitivities")
"""What predicts the losses of levels."""
_ROUNDING = 1e-9
"""Relative: a share that a user writes may be this much below a level's."""
_SHARE = re.compile(r"[0-9]*\.?[0-9]+x")


@dataclass(frozen=True)
class Levels(Sequence[Level]):
    """Levels from the smallest to the full model; each one runs at least the units of the one before."""

    levels: tuple[Level, ...]
    metric: str
    """What the shares are of: tpot, ttft, parameters, weights, kv or flops."""
    losses: str | None
    """Where `loss` comes from: "router" and "pairs" (measured ones) predict the loss itself; "sensitivities" predict
    the increase over the full model; None where no level has one."""
    search_space: SearchSpace
    fingerprint: str
    """`ElasticModel.fingerprint()` of the weights."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Of the latency tables that priced the levels, by metric; empty where none did."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "conditions", dict(self.conditions))
        if not self.levels:
            raise ValueError("there must be at least one level, the full model")
        names = [level.name for level in self.levels]
        if len(set(names)) < len(names) or names[-1] != FULL or any(re.search(r"[\s:]", name) for name in names):
            raise ValueError(f"names of levels must differ, hold no space or colon, and end with {FULL!r}, not {names}")
        if self.losses not in (None, *LOSSES):
            raise ValueError(f"losses come from {' or '.join(LOSSES)}, not from {self.losses!r}")
        if self.levels[-1].subnet != self.search_space.full:
            raise ValueError(f"the level {FULL!r} must be the full model")
        for level in self.levels:
            self.search_space.check(level.subnet)
            _check_numbers(level)
        for low, high in pairwise(self.levels):
            _check_nested(low, high)

    def __len__(self) -> int:
        return len(self.levels)

    @overload
    def __getitem__(self, index: int) -> Level: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Level, ...]: ...
    def __getitem__(self, index: int | slice) -> Level | tuple[Level, ...]:
        return self.levels[index]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels, from the smallest to "full"."""
        return tuple(level.name for level in self.levels)

    def find(self, budget: str | int) -> int:
        """Return the index of the level for a budget.

        Args:
            budget: a level's index or name; or a share such as "0.73x", for the largest level within it.

        Raises:
            BudgetError: there is no such level, or the share is below the smallest one's.
        """
        if isinstance(budget, str):
            return self._find(budget.strip())
        if type(budget) is not int or not 0 <= budget < len(self):
            names = ", ".join(self.names)
            raise BudgetError(f"there is no level {str(budget)[:60]}; levels are 0 to {len(self) - 1} ({names}).")
        return budget

    def _find(self, budget: str) -> int:
        if budget in self.names:
            return self.names.index(budget)
        known = f"Levels are {', '.join(self.names)}; a share such as 0.73x gives the largest level within it."
        if not _SHARE.fullmatch(budget):
            raise BudgetError(f"there is no level for the budget {budget[:60]!r}. {known}")
        share = float(budget[:-1]) * (1 + _ROUNDING)
        within = [index for index, level in enumerate(self.levels) if level.share <= share]
        if not within:
            raise BudgetError(f"{budget} is below the smallest level, {self[0].name} ({self[0].share:.3f}x). {known}")
        return within[-1]

    def save(self, folder: str | Path) -> Path:
        """Write levels.json into a checkpoint's folder, whole or not at all; returns the file."""
        file = Path(folder) / FILE
        write_text(file, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        return file

    @classmethod
    def load(cls, folder: str | Path, *, fingerprint: str | None = None) -> Levels:
        """Read what `save` wrote.

        Args:
            fingerprint: of the model to serve, if it is at hand.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or of other weights than `fingerprint`'s.
        """
        file = Path(folder) / FILE
        way_out = f"Write it again: flextron.serving.levels.make_levels(model).save({str(folder)!r})"
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {FILE}. {way_out.replace(' again', '')}")
        try:
            levels = checked(read_record(file, version=VERSION), cls)
            if fingerprint not in (None, levels.fingerprint):
                raise RecordError("it belongs to other weights")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {str(error).rstrip('.')}. {way_out}") from None
        return levels


def _check_numbers(level: Level) -> None:
    if not 0 < level.share <= 1 + _ROUNDING:
        raise ValueError(f"the level {level.name} has a share of {level.share}; it must be above 0 and at most 1")
    for name in ("step_ms", "prefill_ms_per_token"):
        value: float | None = getattr(level, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} of the level {level.name} is {value}; it must be above 0")


def _check_nested(low: Level, high: Level) -> None:
    narrower = any(
        small > large for axis in AXES for small, large in zip(low.subnet[axis], high.subnet[axis], strict=True)
    )
    if narrower or low.subnet == high.subnet or low.share > high.share * (1 + _ROUNDING):
        raise ValueError(f"the level {high.name} must contain the level {low.name}, and more")
