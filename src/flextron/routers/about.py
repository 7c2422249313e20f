"""What both kinds of router say about themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MadeFrom:
    """What a router was made from."""

    metric: str
    """Metric of its cost table."""
    conditions: dict[str, Any]
    """Conditions of its cost table: device, dtype, lengths, versions."""
    text: str
    """Where the text came from that it learnt from."""
    tokens: int
    """Tokens of it that were measured on."""
