"""Progress of a training run: the bar, losses by size class, values for trackers, and stopping with Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

CLASSES = (("full", 1.0), ("large", 0.8), ("medium", 0.6), ("small", 0.0))
"""Size classes of the bar, each with its lowest share of the layers' weights."""


def numbers(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a flat record for trackers: numbers and text by name, and one loss per size class from `visits`."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if key == "visits" and value and isinstance(value[0], dict):
            flat.update({f"loss/{size_class(visit['share'])}": visit["loss"] for visit in value})
        elif isinstance(value, dict):
            flat.update(numbers(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str)) else json.dumps(value, default=str)
    return flat


def size_class(share: float) -> str:
    """Return the name of the size class for a share of the layers' weights, 0 to 1."""
    return next(name for name, least in CLASSES if share >= least)


class Bar:
    """A progress bar with a running loss per size class, tokens per second and the time left."""

    def __init__(self, *, steps: int, done: int, show: bool) -> None:
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar: Any = tqdm(
            total=steps, initial=done, desc="train", unit="step", mininterval=interval, dynamic_ncols=True,
            disable=not show,
        )  # fmt: skip
        self._losses: dict[str, float] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, record: dict[str, Any]) -> None:
        """Advance by one step, given its record."""
        for visit in record["visits"]:
            name = size_class(visit["share"])
            before = self._losses.get(name, visit["loss"])
            self._losses[name] = 0.8 * before + 0.2 * visit["loss"]
        losses = " ".join(f"{name} {self._losses[name]:.3f}" for name, _ in CLASSES if name in self._losses)
        self._bar.set_postfix_str(f"{losses} · {record['tokens_per_second']:.0f} tokens/s", refresh=False)
        self._bar.update()


class Stop:
    """A request to stop."""

    asked = False
    """Whether Ctrl-C or SIGTERM has been received."""


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; the second one stops at once."""
    stop = Stop()

    def ask(_number: int, _frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        tqdm.write("stopping after this step and a checkpoint; press Ctrl-C again to stop at once.", file=sys.stderr)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # outside the main thread, signals are the caller's business
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
