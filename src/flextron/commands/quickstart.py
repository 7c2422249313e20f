"""`flextron quickstart`."""

from __future__ import annotations

from flextron.config import QuickstartConfig


def run(config: QuickstartConfig) -> None:
    """The whole way on one model."""
    from flextron.demo.quickstart import quickstart

    quickstart(config)
