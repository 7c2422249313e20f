"""`flextron measure-latency`, `train-router` and `route`."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flextron.commands import loading
from flextron.config import MeasureLatencyConfig, RouteConfig, TrainRouterConfig

if TYPE_CHECKING:
    from flextron.costs.table import CostTable
    from flextron.elastic.model import ElasticModel


def run_measure_latency(config: MeasureLatencyConfig) -> None:
    """Measure latency tables, or read one from a CSV file."""
    from flextron.costs.saved import describe, save_table

    folder = loading.folder_of(config.model)
    if config.from_csv is not None:
        tables = iter([_table_of_csv(config, config.from_csv)])
    else:
        model = loading.load(config)
        tables = (_measured(model, phase, config) for phase in config.phase)
    for table in tables:
        file = save_table(folder, table)
        print(f"{describe(table)}\nwrote {file}", flush=True)


def _measured(model: ElasticModel, phase: str, config: MeasureLatencyConfig) -> CostTable:
    from flextron.costs.latency import measure_latency

    how = partial(
        measure_latency, model, phase=phase, batch=config.batch, tokens=config.tokens, rounds=config.rounds, show=True
    )
    if not config.in_llamacpp:
        return how()
    from flextron.exporting.gguf.timing import in_llamacpp

    with in_llamacpp(model, phase=phase, tokens=config.tokens, quantize=config.quantize) as runner:
        return how(runner=runner)


def _table_of_csv(config: MeasureLatencyConfig, file: Path) -> CostTable:
    from flextron.costs.latency import PHASES, TOKENS
    from flextron.costs.saved import LLAMA_CPP, table_from_csv
    from flextron.elastic.checkpoint import load_metadata

    (phase,) = config.phase
    space = load_metadata(config.model, {})[0] or loading.load(config).search_space
    engine = LLAMA_CPP if config.engine == "llamacpp" else config.engine
    given = {"engine": engine, "device": config.device_name, "batch": config.batch}
    given |= {TOKENS[PHASES[phase]]: config.tokens, "dtype": None if config.dtype == "auto" else config.dtype}
    conditions = {key: value for key, value in given.items() if value is not None}
    return table_from_csv(file, space, phase=phase, conditions=conditions)


def run_train_router(config: TrainRouterConfig) -> None:
    """Train a router, with --per-token for every token."""
    from flextron.routers.static.making import describe_router, make_router
    from flextron.routers.static.pairs import FOLDER

    started = time.monotonic()
    folder = loading.folder_of(config.model)
    if config.per_token:
        _train_token_router(config, folder)
        return
    router = make_router(
        loading.load(config),
        folder,
        phase=config.phase,
        evaluations=config.evaluations,
        tokens=config.tokens,
        text=config.text,
        lowest=config.lowest,
        seed=config.seed,
        any_device=config.any_device,
        show=True,
    )
    print(describe_router(router))
    print(f"\nwrote {folder / FOLDER / router.about.metric} in {time.monotonic() - started:.0f} s.")
    budget = math.ceil(100 * max(0.6, router.net.lowest)) / 100
    print(f"try: flextron route {folder} --budget {router.about.metric}={budget:g}x")


def _train_token_router(config: TrainRouterConfig, folder: Path) -> None:
    from flextron.costs.latency import PHASES
    from flextron.routers.static.pairs import FOLDER
    from flextron.routers.static.router import metrics_with_router
    from flextron.routers.token.making import describe_token_router, make_token_router

    metric = PHASES[config.phase]
    if metric not in metrics_with_router(folder):
        print(f"{folder} has no router for {metric}, which a token router starts from; training it first")
        run_train_router(replace(config, per_token=False))
    started = time.monotonic()
    router, about = make_token_router(
        loading.load(config),
        folder,
        phase=config.phase,
        tokens=config.token_tokens,
        text=config.token_text or config.text,
        seed=config.seed,
        any_device=config.any_device,
        show=True,
    )
    print(describe_token_router(router, about))
    print(f"\nwrote {folder / FOLDER / f'{metric}-per-token'} in {time.monotonic() - started:.0f} s.")
    print(f"try: flextron evaluate {folder} --budget {metric}=0.6x --per-token --picture tokens.html")


def run_route(config: RouteConfig) -> None:
    """Answer a budget, as text or JSON, with a picture."""
    from flextron.atomic import write_text
    from flextron.choosing.explaining import as_json, as_text, explain
    from flextron.choosing.routing import route
    from flextron.pictures.widths import save_figure, widths_figure

    folder = loading.folder_of(config.model)
    model = loading.load(config)
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
