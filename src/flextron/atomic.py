"""Write files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flextron.errors import CheckpointError


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, needs_bytes: int = 0, kind: str = "config.json"
) -> Iterator[Path]:
    """Yield an empty folder beside `path`. If the block succeeds, the folder is renamed to `path`; else it is removed.

    A killed process leaves `.NAME.partial-*` behind, which nothing reads. `overwrite` replaces an older folder only at
    the very end, and only if it contains the file `kind`.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false, the disk has too little space, or a write fails.
    """
    target = Path(path)
    check_new(target, overwrite=overwrite, kind=kind)
    with _clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, needs_bytes)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with _clear_errors(target):
            yield partial
            _make_readable(partial)
            _replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(path: str | Path, *, overwrite: bool = False, kind: str = "config.json") -> None:
    """Raise an error if `new_folder` could not write `path`. Call this before a long stage starts.

    Raises:
        CheckpointError: `path` exists, and `overwrite` is false or the file `kind` is not in it.
    """
    target = Path(path)
    if target.is_dir() and overwrite:
        if any(target.iterdir()) and not (target / kind).is_file():
            what = "a checkpoint" if kind == "config.json" else "what flextron writes there"
            raise CheckpointError(f"{target} is not {what} (no {kind}), so it is not replaced. Name another.")
        return
    if target.exists():
        way_out = "Name another folder." if not target.is_dir() else "Name another folder or pass --overwrite."
        raise CheckpointError(f"{target} exists. {way_out}")


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False, needs_bytes: int = 0, magic: bytes = b"") -> Iterator[Path]:
    """Yield a path beside `path` to write to. If the block succeeds, it is renamed to `path`; else it is removed.

    `overwrite` replaces an older file only at the very end, and only if it begins with `magic`.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false, the disk has too little space, or a write fails.
    """
    target = Path(path)
    check_new_file(target, overwrite=overwrite, magic=magic)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with _clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, needs_bytes)
    try:
        with _clear_errors(target):
            yield partial
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_new_file(path: str | Path, *, overwrite: bool = False, magic: bytes = b"") -> None:
    """Raise an error if `new_file` could not write `path`.

    Raises:
        CheckpointError: `path` exists, and `overwrite` is false or the file does not begin with `magic`.
    """
    target = Path(path)
    if not target.exists():
        return
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder. Name a file.")
    if not overwrite:
        raise CheckpointError(f"{target} exists. Name another file or pass --overwrite.")
    with _clear_errors(target), target.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise CheckpointError(f"{target} is not a {magic.decode()} file, so it is not replaced. Name another.")


def _check_space(target: Path, needs_bytes: int) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needs_bytes:
        raise CheckpointError(
            f"no space for {target}: it needs about {needs_bytes / 1e6:.0f} MB, {free_bytes / 1e6:.0f} MB are free. "
            "Free some space or name a place on another disk; nothing was written."
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file. Readers see the old file or the new one, never a part.

    Raises:
        CheckpointError: the write fails. An old file stays as it was.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with _clear_errors(target):
            partial.write_text(text, encoding="utf8")
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _make_readable(folder: Path) -> None:
    """Let everyone read a checkpoint. Temporary folders and safetensors files are readable by their owner only."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _replace_folder(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        target.rename(old / target.name)
        partial.rename(target)
    except BaseException:  # Ctrl-C too: the old folder comes back
        if not target.exists():
            (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _clear_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}. Nothing of it was kept.") from error
