"""Show progress on standard error: a live bar in a terminal, a line every 15 seconds in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """Return `items` unchanged, and show a bar with the time left while they are iterated."""
    return tqdm(items, description, mininterval=_interval(), dynamic_ncols=True)


@contextmanager
def bar(total: int, *, description: str, show: bool = True) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a bar of `total` steps by one."""
    with tqdm(total=total, desc=description, mininterval=_interval(), dynamic_ncols=True, disable=not show) as shown:

        def advance() -> None:
            shown.update()

        yield advance


def _interval() -> float:
    return 0.2 if sys.stderr.isatty() else 15.0
