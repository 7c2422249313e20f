"""`flextron route`."""

from __future__ import annotations

import sys

from flextron.commands import shared
from flextron.config import RouteConfig


def run(config: RouteConfig) -> None:
    """Answer a budget, as text or JSON, with a picture."""
    from flextron.atomic import write_text
    from flextron.choosing.explaining import as_json, as_text, explain
    from flextron.choosing.routing import route
    from flextron.pictures.widths import save_figure, widths_figure

    folder = shared.folder_of(config.model)
    model = shared.load(config)
    warnings: list[str] = []
    routed = route(
        model,
        config.budget,
        folder,
        any_device=config.any_device,
        neuron_step=config.neuron_step,
        warn=warnings.append,
    )
    explained = explain(model, routed, folder, measure=config.measure, warnings=warnings)
    print(as_json(config.budget, explained) if config.json else as_text(routed, explained, folder))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(config.out, routed.subnet.to_json() + "\n")
    if config.picture is not None:
        title = f"{folder.resolve().name} within {config.budget}"
        save_figure(widths_figure({config.budget: routed.subnet}, model.search_space, title), config.picture)
    for file in (config.out, config.picture):
        if file is not None:
            print(f"wrote {file}", file=sys.stderr)
