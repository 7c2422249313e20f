"""Compare predicted with measured times of sub-networks that the latency table was not fitted to, interleaved.

python benchmarks/latency.py
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro

from flextron import measure_latency
from flextron.costs.fitting import random_subnets
from flextron.costs.saved import describe
from flextron.costs.timing import REPEATS, time_interleaved, timed_run, trust_warning
from model import load_smollm2, write_results


@dataclass(frozen=True)
class Settings:
    """Measure latency tables, then check them."""

    phases: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
    """Phases to time."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16", "float32")
    """Types of the weights, one per phase, in the order of --phases."""
    tokens: int = 512
    """Number of tokens in the prompt or context."""
    unseen: int = 20
    """Number of random sub-networks to check."""
    rounds: int = 3
    """Number of interleaved rounds of the check."""
    seed: int = 1000
    """Seed of the checked sub-networks; the tables are fitted to those of seed 0."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Measure and check every phase, and print the results."""
    results = [
        _check(phase, getattr(torch, dtype), settings)
        for phase, dtype in zip(settings.phases, settings.dtypes, strict=True)
    ]
    write_results(settings.out, {"phases": results})


def _check(phase: str, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    model = load_smollm2(dtype)
    start = time.perf_counter()
    table = measure_latency(model, phase=phase, tokens=settings.tokens, show=True)
    seconds = time.perf_counter() - start
    draw = np.random.default_rng(settings.seed)
    subnets = random_subnets(model.search_space, settings.unseen, draw)
    timing = time_interleaved(
        timed_run(model, phase, batch=1, tokens=settings.tokens),
        model.search_space.full,
        subnets,
        rounds=settings.rounds,
        repeats=REPEATS[phase],
        draw=draw,
        show=True,
    )
    parts = [table.price(subnet) / table.full for subnet in subnets]
    relative = [abs(part / median(ratios) - 1) for part, ratios in zip(parts, timing.ratios, strict=True)]
    absolute = [abs(table.price(subnet) / ms - 1) for subnet, ms in zip(subnets, timing.milliseconds, strict=True)]
    print(f"\n{phase}, {dtype}, {settings.tokens} tokens: table measured in {seconds:.0f} s\n{describe(table)}")
    print(f"{settings.unseen} unseen sub-networks, {min(parts):.2f} to {max(parts):.2f} of the full model's time:")
    print(f"  relative to the full model's time: median error {median(relative):.1%}, worst {max(relative):.1%}")
    print(
        f"  in ms: median error {median(absolute):.1%}, worst {max(absolute):.1%} "
        f"(full model {table.full:.1f} ms in the table, {timing.full_ms:.1f} ms now, noise {timing.noise:.1%})"
    )
    warnings = [text for text in (trust_warning(table.conditions), timing.warning) if text is not None]
    for text in warnings:
        print(f"warning: {text}. These figures are no result; run again on an idle machine.")
    return {
        "phase": phase,
        "dtype": str(dtype),
        "seconds": seconds,
        "table": asdict(table),
        "warnings": warnings,
        "relative_errors": relative,
        "absolute_errors": absolute,
    }


if __name__ == "__main__":
    main(tyro.cli(Settings))
