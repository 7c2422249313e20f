"""`flextron env`."""

from __future__ import annotations

from flextron.config import EnvConfig


def run(config: EnvConfig) -> None:
    """Print versions and hardware."""
    del config
    from flextron.environment import describe_environment

    print(describe_environment())
