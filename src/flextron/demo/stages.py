"""Stages of the tour: each says what it does, why, and how long it takes; it is done once and then kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One step of the tour."""

    what: str
    why: str
    is_done: Callable[[], bool]
    """Whether what the stage makes is there already."""
    work: float
    """Tokens of the full model's forward pass that take as long as the stage."""
    make: Callable[[], str]
    """Do the work; return what came of it, in one line."""


@dataclass
class Pace:
    """Seconds for one token of the full model's forward pass: measured first, and corrected by every stage."""

    seconds: float
    tokens: float

    def __call__(self, work: float) -> float:
        """Seconds that `work` tokens take."""
        return work * self.seconds / self.tokens

    def learn(self, work: float, seconds: float) -> None:
        """Count a stage that took `seconds`."""
        self.seconds += seconds
        self.tokens += work


def run_stages(stages: list[Stage], pace: Pace, say: Callable[[str], None] = print) -> None:
    """Run the stages in order, without those whose file is there.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the stage at work is named.
    """
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{len(stages)}] {stage.what}"
        if stage.is_done():
            say(f"{head}: kept from before")
            continue
        say(f"\n{head}, about {in_words(pace(stage.work))}\n      Why: {stage.why}")
        started = time.monotonic()
        try:
            result = stage.make()
        except KeyboardInterrupt:
            say(f"\nStopped in stage {number} of {len(stages)}: {stage.what}.")
            raise
        seconds = time.monotonic() - started
        pace.learn(stage.work, seconds)
        say(f"      Done in {in_words(seconds)}: {result}")


def time_left(stages: list[Stage], pace: Pace) -> float:
    """Seconds that the stages take that are not done."""
    return sum(pace(stage.work) for stage in stages if not stage.is_done())


def in_words(seconds: float) -> str:
    """A duration as a person says it: 8 s, 2 min 10 s, 15 min."""
    whole = max(1, round(seconds))
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
