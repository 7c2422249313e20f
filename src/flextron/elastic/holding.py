"""One thread at a time chooses a model's widths. Others that run it meanwhile get an error instead of wrong numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch

from flextron.errors import FlextronError

_ACTS_FOR: ContextVar[Callable[[], int]] = ContextVar("the thread that this one acts for", default=get_ident)


class Holder:
    """Which thread has chosen a model's widths, and which ones run it. A copy of the model starts without any."""

    def __init__(self) -> None:
        self._owner: dict[str, set[int]] = {}  # a dict, because its `setdefault` lets only one thread be first
        self._depth = 0
        self._running: list[set[int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the model for this thread inside the block.

        Raises:
            FlextronError: another thread keeps it, or runs it now.
        """
        mine = _mine()
        _check(self._owner.setdefault("threads", mine), mine)
        self._depth += 1
        try:
            for other in list(self._running):
                _check(other, mine)
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._owner.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let no other thread choose widths inside the block.

        Raises:
            FlextronError: another thread keeps the model.
        """
        mine = _mine()
        self._running.append(mine)
        try:
            self.check()
            yield
        finally:
            self._running.remove(mine)

    def check(self, *_: Any) -> None:
        """Pass unless another thread keeps the model; a hook before each forward pass.

        Raises:
            FlextronError: one does.
        """
        if not torch.compiler.is_compiling():
            mine = _mine()
            _check(self._owner.get("threads", mine), mine)


@contextmanager
def acting_for(thread: Callable[[], int]) -> Iterator[None]:
    """Let this thread pass inside the block where the one that it works for may."""
    token = _ACTS_FOR.set(thread)
    try:
        yield
    finally:
        _ACTS_FOR.reset(token)


def acted_for() -> int:
    """The thread that this one acts for: by default itself."""
    return _ACTS_FOR.get()()


def _mine() -> set[int]:
    return {get_ident(), acted_for()}


def _check(owner: set[int], mine: set[int]) -> None:
    if not owner & mine:
        raise FlextronError(
            "another thread runs this model as a sub-network now, and the choice is the model's own. "
            "Load one model for each thread, or let a lock keep `use` and the calls inside it to one thread at a time."
        )
