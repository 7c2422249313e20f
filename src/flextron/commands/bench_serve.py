"""`flextron bench-serve`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from flextron.commands import shared
from flextron.config import BenchServeConfig
from flextron.errors import FlextronError

if TYPE_CHECKING:
    from flextron.serving.bench import Arrival, Target


def run(config: BenchServeConfig) -> None:
    """Replay a trace against a server."""
    with shared.outputs(config.out):
        _run(config)


def _run(config: BenchServeConfig) -> None:
    from flextron.progress import bar
    from flextron.serving.bench import Summary, losses_of_levels, replay, save

    arrivals, target = _arrivals(config), _target(config)
    losses = losses_of_levels(target)
    print(f"{len(arrivals)} requests in {arrivals[-1].at:.0f} s to {target.model} at {target.url}", file=sys.stderr)
    start = time.perf_counter()
    with bar(len(arrivals), description="answered") as advance:
        outcomes = replay(target, arrivals, progress=lambda _: advance())
    summary = Summary.of(outcomes, target, time.perf_counter() - start, losses)
    print("\n".join(summary.lines()))
    for error in sorted({outcome.error for outcome in outcomes if outcome.error is not None})[:3]:
        shared.note(f"an answer was: {error[:200]}")
    if config.out is not None:
        save(config.out, target, outcomes, summary)
        print(f"wrote {config.out}", file=sys.stderr)


def _arrivals(config: BenchServeConfig) -> list[Arrival]:
    from flextron.serving.bench import burst_trace, load_trace, sample_prompts

    if config.trace is not None:
        return load_trace(config.trace)
    return burst_trace(
        sample_prompts(config.prompt_tokens, config.seed),
        rates=config.rates,
        seconds=config.seconds,
        new_tokens=config.new_tokens,
        seed=config.seed,
    )


def _target(config: BenchServeConfig) -> Target:
    from flextron.serving.bench import Target, ask_server

    options = (config.budget, config.ttft_ms, config.tpot_ms, config.send_objectives, config.api_key)
    target = Target(config.url, config.served_name or "", *options)
    models = ask_server(target, "/v1/models")
    if config.served_name is not None:
        return target
    try:
        return Target(config.url, models["data"][0]["id"], *options)
    except (TypeError, KeyError, IndexError):
        raise FlextronError(f"{config.url} lists no models at /v1/models. Name one: --served-name NAME") from None
