"""One writer at a time: lock files that the kernel frees when their process ends, however it ends.

A folder that is replaced as a whole has its lock beside it (`.NAME.lock`); one that grows has it inside (`.lock`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flextron.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

INSIDE = ".lock"
_own: set[Path] = set()
"""Lock files that this process holds. As the kernel's locks do, they belong to the whole process."""


@contextmanager
def locked(target: Path, *, inside: bool = False) -> Iterator[bool]:
    """Keep other processes from writing `target` inside the block; yields whether nobody else can be writing it.

    That is not certain where the disk or the system has no locks, or where this process holds the lock already.

    Raises:
        CheckpointError: another process holds the lock; the message names it.
        OSError: the lock file cannot be made.
    """
    file = target / INSIDE if inside else target.with_name(f".{target.name}.lock")
    file = file.parent.resolve() / file.name
    if fcntl is None or file in _own:
        yield False
        return
    stream, certain = _taken(file, target)
    _own.add(file)
    try:
        yield certain
    finally:
        _own.discard(file)
        with suppress(OSError):
            file.unlink()
        stream.close()


def check_unlocked(folder: Path) -> None:
    """Check that no other process writes `folder` or below it, before it is replaced or deleted.

    Raises:
        CheckpointError: one does; the message names it.
    """
    for file in folder.rglob("*.lock") if fcntl is not None else ():
        if file.resolve() in _own:
            continue
        with suppress(OSError), file.open(encoding="utf8") as stream:
            if not _take(stream):
                raise _held(folder, stream)


def _taken(file: Path, target: Path) -> tuple[IO[str], bool]:
    """Return the lock file, open, and whether it is locked."""
    while True:
        stream = file.open("a+", encoding="utf8")
        try:
            if not _take(stream):
                raise _held(target, stream)
            certain = True
        except OSError:  # a disk without locks
            certain = False
        except BaseException:
            stream.close()
            raise
        if _is_there(file, stream):
            _sign(stream)
            return stream, certain
        stream.close()  # its last owner has deleted it meanwhile


def _take(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(file: Path, stream: IO[str]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    return False


def _sign(stream: IO[str]) -> None:
    """Write who holds the lock, for the message of others. A full disk is for the real writes to tell."""
    with suppress(OSError):
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        stream.flush()


def _held(target: Path, stream: IO[str]) -> CheckpointError:
    stream.seek(0)
    owner = stream.read(200) or "another process"
    return CheckpointError(f"{target} is being written by {owner}. Wait for it, stop it, or name another folder.")
