"""What both kinds of router record about themselves, and the phase that a metric belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flextron.costs.latency import PHASES
from flextron.errors import RouterError


@dataclass(frozen=True)
class MadeFrom:
    """What a router was made from."""

    metric: str
    """Metric of its cost table."""
    conditions: dict[str, Any]
    """Conditions of its cost table: device, dtype, lengths, versions."""
    text: str
    """Source of the text that the router learnt from."""
    tokens: int
    """Number of tokens of the text that were measured."""


def phase_of(metric: str) -> str:
    """Return the phase (prefill or decode) whose time is `metric` (ttft or tpot).

    Raises:
        RouterError: `metric` is no time of a phase.
    """
    for phase, name in PHASES.items():
        if name == metric:
            return phase
    raise RouterError(f"routers are for {' or '.join(PHASES.values())}, not {metric}. Give a budget for one of these.")
