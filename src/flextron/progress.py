"""Progress on standard error: a bar where a person looks on, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> Iterable[T]:
    """`items` as they are, with a bar and the time left."""
    return tqdm(items, description, total, mininterval=0.2 if sys.stderr.isatty() else 15.0, dynamic_ncols=True)
