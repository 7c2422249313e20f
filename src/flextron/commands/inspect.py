"""`flextron inspect`."""

from __future__ import annotations

from flextron.commands import shared
from flextron.config import InspectConfig


def run(config: InspectConfig) -> None:
    """Print what of a model is elastic."""
    model = shared.load(config)

    from flextron.elastic.inspecting import inspect
    from flextron.exporting.trying import exports_of

    print(inspect(model))
    print(f"\nexports: {', '.join(exports_of(model.config, model.family)) or 'none'}")
