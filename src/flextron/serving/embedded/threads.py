"""OpenMP's threads, which torch computes with on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_HARD_PAUSE = 2


def release_threads() -> None:
    """Let the calling thread's OpenMP threads go; it makes new ones when it computes again.

    GNU's OpenMP keeps threads for each thread that has computed. As soon as there are more of them than processors,
    they sleep between two operations instead of waiting awake: the steps of an engine in its own thread took 1.7 times
    as long, beside threads of the main thread that did nothing (two threads of an AMD EPYC). Without OpenMP, as on
    macOS, nothing happens.
    """
    folder = Path(torch.__file__).parent / "lib"
    for file in (*folder.glob("libgomp*"), *folder.glob("libiomp5*"), *folder.glob("libomp*")):
        pause = getattr(ctypes.CDLL(str(file)), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_HARD_PAUSE)
