"""`flextron train-router`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from flextron.commands import shared
from flextron.config import TrainRouterConfig

_OPTIONS = ("phase", "evaluations", "tokens", "text", "lowest", "seed", "any_device")
"""Options that `make_router` takes as they are."""


def run(config: TrainRouterConfig) -> None:
    """Train a router, with --per-token for every token."""
    folder = shared.folder_of(config.model)
    from flextron.routers.static.making import describe_router, make_router, router_from_pairs
    from flextron.routers.static.pairs import FOLDER

    started = time.monotonic()
    if config.per_token:
        _train_token_router(config, folder)
        return
    asked = {option: getattr(config, option) for option in _OPTIONS}
    if config.evaluations:
        router = make_router(shared.load(config), folder, show=True, **asked)
    else:
        for measured in ("evaluations", "tokens", "text"):
            del asked[measured]
        router = router_from_pairs(shared.load(config), folder, show=True, **asked)
    print(describe_router(router))
    print(f"\nwrote {folder / FOLDER / router.about.metric} in {time.monotonic() - started:.0f} s.")
    budget = math.ceil(100 * max(0.6, router.net.lowest)) / 100
    print(f"try: flextron route {folder} --budget {router.about.metric}={budget:g}x")


def _train_token_router(config: TrainRouterConfig, folder: Path) -> None:
    from flextron.costs.timing import PHASES
    from flextron.routers.static.pairs import FOLDER
    from flextron.routers.static.router import metrics_with_router
    from flextron.routers.token.making import describe_token_router, make_token_router

    metric = PHASES[config.phase]
    if metric not in metrics_with_router(folder):
        print(f"{folder} has no router for {metric}, which a token router starts from; training it first")
        run(replace(config, per_token=False))
    started = time.monotonic()
    router, about = make_token_router(
        shared.load(config),
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
