"""`flextron route`."""

from __future__ import annotations

import sys
from pathlib import Path

from flextron.commands import shared
from flextron.config import RouteConfig
from flextron.errors import CheckpointError
from flextron.subnet import Subnet


def run(config: RouteConfig) -> None:
    """Answer a budget, as text or JSON, with a picture."""
    folder = shared.folder_of(config.model)
    _check_replaceable(config.out)
    with shared.outputs(config.out, config.picture):
        _run(config, folder)


def _check_replaceable(file: Path | None) -> None:
    """Check that an older file at --out is a sub-network too.

    Raises:
        CheckpointError: it is something else.
    """
    if file is None or not file.is_file():
        return
    try:
        Subnet.from_json(file.read_text(encoding="utf8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{file} is not a sub-network that flextron wrote. Name another file.") from None


def _run(config: RouteConfig, folder: Path) -> None:
    from flextron.atomic import write_text
    from flextron.choosing.explaining import as_json, as_text, explain
    from flextron.choosing.routing import route
    from flextron.pictures.widths import save_figure, widths_figure

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
        write_text(config.out, routed.subnet.to_json() + "\n")
    if config.picture is not None:
        title = f"{folder.resolve().name} within {config.budget}"
        save_figure(widths_figure({config.budget: routed.subnet}, model.search_space, title), config.picture)
    for file in (config.out, config.picture):
        if file is not None:
            print(f"wrote {file}", file=sys.stderr)
