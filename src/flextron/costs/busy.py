"""How much of the processor other programs use while something is timed: exact on Linux, unknown elsewhere."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.25
"""Part of the processor that other programs may use, at most."""
FULL, COMPETING = 0.9, 0.5
"""The processor is full at this part of all cores; other programs compete for it from this many cores on."""


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds: by the clock, of all cores in this process, and of all cores in other programs."""

    wall: float
    own: float
    others: float | None
    """None where the system does not say."""

    def __sub__(self, earlier: ProcessorTime) -> ProcessorTime:
        others = None if self.others is None or earlier.others is None else self.others - earlier.others
        return ProcessorTime(self.wall - earlier.wall, self.own - earlier.own, others)

    def __add__(self, more: ProcessorTime) -> ProcessorTime:
        others = None if self.others is None or more.others is None else self.others + more.others
        return ProcessorTime(self.wall + more.wall, self.own + more.own, others)

    @property
    def share_of_others(self) -> float | None:
        """The part of the whole processor that other programs used, from 0 to 1; None where it is unknown."""
        if self.others is None or self.wall <= 0:
            return None
        return min(1.0, max(0.0, self.others / self.wall / _cores()))

    @property
    def is_busy(self) -> bool:
        """Whether other programs used much of the processor, or competed with this process for the last of it."""
        share = self.share_of_others
        if share is None:
            return False
        used = (self.own + (self.others or 0)) / self.wall
        return share >= BUSY or (share * _cores() >= COMPETING and used >= FULL * _cores())


def processor_time() -> ProcessorTime:
    """Times up to now, which count from some moment in the past: subtract an earlier reading."""
    own = time.process_time()
    everything = _everything()
    return ProcessorTime(time.perf_counter(), own, None if everything is None else everything - own)


def _everything() -> float | None:
    """Seconds for which all cores together have been busy, with what a host took from a virtual machine (steal)."""
    try:
        with Path("/proc/stat").open(encoding="utf8") as lines:
            user, nice, system, _, _, irq, softirq, steal = map(int, lines.readline().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def _cores() -> int:
    return os.cpu_count() or 1
