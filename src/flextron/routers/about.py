"""What both kinds of router record about themselves, and the phase that a metric belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flextron.costs.timing import PHASES, phase_of
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


def routed_phase(metric: str) -> str:
    """Return the phase (prefill or decode) whose time is `metric` (ttft or tpot).

    Raises:
        RouterError: `metric` is no time of a phase.
    """
    if metric not in PHASES.values():
        known = " or ".join(PHASES.values())
        raise RouterError(f"routers are for {known}, not {metric}. Give a budget for one of these.")
    return phase_of(metric)
