"""The options of `flextron env`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnvConfig:
    """Print the versions and hardware that a bug report needs.

    Example: flextron env
    """
