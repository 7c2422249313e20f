"""What both kinds of router record about themselves, and the phase that a metric belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from flextron.costs.timing import PHASES, phase_of
from flextron.errors import RouterError
from flextron.records import RecordError, checked


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


About = TypeVar("About", bound=MadeFrom)


def checked_about(data: dict[str, Any], kind: type[About], metric: str) -> About:
    """Return the record of a router that lies in the folder of a metric.

    Raises:
        ValueError: as `records.checked`, or it is of another metric.
    """
    about = checked(data, kind)
    if about.metric != metric:
        raise RecordError(f"it is for {about.metric[:60]}, not for {metric}")
    return about


def routed_phase(metric: str) -> str:
    """Return the phase (prefill or decode) whose time is `metric` (ttft or tpot).

    Raises:
        RouterError: `metric` is no time of a phase.
    """
    if metric not in PHASES.values():
        known = " or ".join(PHASES.values())
        raise RouterError(f"routers are for {known}, not {metric}. Give a budget for one of these.")
    return phase_of(metric)
