"""What `flextron env` is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnvConfig:
    """Print versions and hardware, for a bug report."""
