"""`flextron quickstart`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flextron.config import QuickstartConfig

if TYPE_CHECKING:
    pass


def run(config: QuickstartConfig) -> None:
    """The whole way on one model."""
    from flextron.demo.quickstart import quickstart

    quickstart(config)
