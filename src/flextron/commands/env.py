"""`flextron env`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flextron.config import EnvConfig

if TYPE_CHECKING:
    pass


def run(config: EnvConfig) -> None:
    """Print versions and hardware."""
    del config
    from flextron.environment import describe_environment

    print(describe_environment())
