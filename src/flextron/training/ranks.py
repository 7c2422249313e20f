"""Work that all ranks of a job do together: if one fails, all raise, so that none waits forever."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from flextron.errors import CheckpointError

T = TypeVar("T")


def _ranks() -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(paths: Iterable[Path]) -> list[Path]:
    """This rank's part of some files, each of which one rank takes."""
    rank, ranks = _ranks()
    return sorted(paths)[rank::ranks]


def on_first_rank(work: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Call `work` on the first rank only."""
    if _ranks()[0] == 0:
        work(*args, **kwargs)


def gathered(mine: T) -> list[T]:
    """Return the values of all ranks, on each rank; wait for all."""
    values = [mine] * _ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, mine)
    return values


def together(doing: str, work: Callable[[], T]) -> T:
    """Run `work` on all ranks and wait for all. If one fails, all raise, so that none waits forever."""
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    problems = gathered(None if error is None else str(error))
    if error is not None and not isinstance(error, _EXPECTED):
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise CheckpointError(f"{doing}: {_where(rank)}{problem}") from error
    return result


@contextmanager
def clear_errors_of_all(doing: str) -> Iterator[None]:
    """Raise the first error of any rank as a CheckpointError, and silence DCP's warning about a single process.

    DCP wraps the errors of all ranks, even Ctrl-C, and raises them on all ranks.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
            )
            yield
    except CheckpointException as wrapped:
        rank, (error, _) = min(wrapped.failures.items())
        if not isinstance(error, _EXPECTED):
            raise error from None
        raise CheckpointError(f"{doing}: {_where(rank)}{error}") from error


_EXPECTED = (OSError, SafetensorError, CheckpointError)


def _where(rank: int) -> str:
    return f"rank {rank}: " if _ranks()[1] > 1 else ""
