"""Write files and folders that appear whole or not at all, by one process at a time."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from flextron.errors import CheckpointError
from flextron.locks import check_unlocked, locked


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, needs_bytes: int = 0, kind: str = "config.json"
) -> Iterator[Path]:
    """Yield an empty folder beside `path`. If the block succeeds, the folder is renamed to `path`; else it is removed.

    A killed process leaves `.NAME.partial-*` or `.NAME.old-*` behind; the next writer of `path` removes them, or brings
    the old folder back. `overwrite` replaces an older folder only at the very end, and only if it contains the file
    `kind`.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false, another process writes it, the disk has too little
            space, or a write fails.
    """
    target = _absolute(path)
    with reserved(path):
        check_new(path, overwrite=overwrite, kind=kind)
        with clear_errors(path):
            check_space(path, needs_bytes)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            with clear_errors(path):
                yield partial
                _make_readable(partial)
                check_new(path, overwrite=overwrite, kind=kind)  # what appeared meanwhile
                _replace_folder(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def reserved(path: str | Path, *, grows: bool = False) -> Iterator[None]:
    """Keep other processes from writing `path` inside the block, and clean up after killed ones.

    Enter it before a long stage: it also shows that the place can be written. Folders above `path` are made, and
    removed at the end if nothing was put there.

    Args:
        grows: `path` is a folder that gets one file after the other. It is made, and its lock lies in it.

    Raises:
        CheckpointError: another process writes `path`, or nothing can be written there.
    """
    target = _absolute(path)
    folder = Path(path) if grows else Path(path).parent
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with ExitStack() as held:
            with clear_errors(path):
                folder.mkdir(parents=True, exist_ok=True)
                if held.enter_context(locked(target, inside=grows)) and not grows:
                    _clean_up(target)
            yield
    finally:
        for each in made:
            with suppress(OSError):  # it holds something
                each.rmdir()


def check_new(path: str | Path, *, overwrite: bool = False, kind: str = "config.json") -> None:
    """Raise an error if `new_folder` could not write `path`. Call this before a long stage starts.

    Raises:
        CheckpointError: `path` exists, and `overwrite` is false, the file `kind` is not in it, or another process
            writes into it.
    """
    target = _absolute(path)
    if target.is_dir() and overwrite:
        if any(target.iterdir()) and not (target / kind).is_file():
            what = "a checkpoint" if kind == "config.json" else "what flextron writes there"
            raise CheckpointError(f"{path} is not {what} (no {kind}), so it is not replaced. Name another.")
        check_unlocked(target)
        return
    if os.path.lexists(target):
        way_out = "Name another folder." if not target.is_dir() else "Name another folder or pass --overwrite."
        raise CheckpointError(f"{path} exists. {way_out}")


def check_apart(path: str | Path, *reads: str | Path | None) -> None:
    """Check that none of `reads` is `path` or lies in it: replacing `path` would delete what is read.

    Raises:
        CheckpointError: one does.
    """
    target = _absolute(path)
    for read in reads:
        if read is None or not target.exists() or not Path(read).exists():
            continue
        place = Path(read).resolve()
        if target.samefile(place):
            raise CheckpointError(f"OUT is {read} itself, which this run reads, so it is not replaced. Name another.")
        if any(target.samefile(parent) for parent in place.parents):
            raise CheckpointError(f"{path} holds a file that this run reads: {read}. Name another place.")


def tell_dropped(folder: Path, option: str) -> None:
    """Say in one line on standard error what `option` deletes in `folder` beside the model, if anything."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if not _MODEL_FILES.fullmatch(name)]
    if others:
        more = f" and {len(others) - 12} more" if len(others) > 12 else ""
        said = f"note: {option} deletes in {folder}: {', '.join(others[:12])}{more}"
        print(said, file=sys.stderr, flush=True)


_MODEL_FILES = re.compile(
    r"(generation_)?config\.json|(model|ranking|quantized).*\.safetensors(\.index\.json)?|(flextron|rank)\.json|tokenizer.*|vocab\.json|"
    r"merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template.*|README\.md|modeling_flextron\.py|\.lock"
)
"""Names of files that make up a saved or an exported model."""


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False, needs_bytes: int = 0, magic: bytes = b"") -> Iterator[Path]:
    """Yield a path beside `path` to write to. If the block succeeds, it is renamed to `path`; else it is removed.

    `overwrite` replaces an older file only at the very end, and only if it begins with `magic`.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false, another process writes it, the disk has too little
            space, or a write fails.
    """
    target = _absolute(path)
    with reserved(path):
        check_new_file(path, overwrite=overwrite, magic=magic)
        check_space(path, needs_bytes)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            with clear_errors(path):
                yield partial
                check_new_file(path, overwrite=overwrite, magic=magic)  # what appeared meanwhile
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def check_new_file(path: str | Path, *, overwrite: bool = False, magic: bytes = b"") -> None:
    """Raise an error if `new_file` could not write `path`.

    Raises:
        CheckpointError: `path` exists, and `overwrite` is false or the file does not begin with `magic`.
    """
    target = _absolute(path)
    if not target.exists():
        return
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder. Name a file.")
    if not overwrite:
        raise CheckpointError(f"{path} exists. Name another file or pass --overwrite.")
    with clear_errors(path), target.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise CheckpointError(f"{path} is not a {magic.decode()} file, so it is not replaced. Name another.")


def check_space(path: str | Path, needs_bytes: int) -> None:
    """Check that the disk of `path` has room for so many bytes.

    Raises:
        CheckpointError: it has not.
    """
    target = _absolute(path)
    disk = next(parent for parent in target.parents if parent.is_dir())
    free_bytes = shutil.disk_usage(disk).free
    if free_bytes < needs_bytes:
        raise CheckpointError(
            f"no space for {path}: it needs about {needs_bytes / 1e6:.0f} MB, {free_bytes / 1e6:.0f} MB are free. "
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
        with clear_errors(target):
            partial.write_text(text, encoding="utf8")
            partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def clear_errors(target: str | Path, kept: str = "Nothing of it was kept.") -> Iterator[None]:
    """Turn a failed write inside the block into one line; `kept` says what is not lost.

    Raises:
        CheckpointError: a write failed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {reason(error)}. {kept}") from error


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Add to a failed write inside the block what of the work is kept.

    Raises:
        CheckpointError: a write failed.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error} {what}") from error


def reason(error: Exception) -> str:
    """What the system says about a failed read or write, without numbers and hidden names."""
    if isinstance(error, FileExistsError):
        return f"{error.filename} is a file, not a folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    inner = re.search(r'message: "([^"]+)"|I/O error: ([^(]+)', str(error))  # of safetensors
    return (inner[1] or inner[2]).strip() if inner else str(error).rstrip(".")


def lost(path: str | Path) -> str:
    """Where the old folder is that a killed run was about to replace, and how it comes back; "" if `path` is there."""
    target = _absolute(path)
    old = [] if target.exists() else _old_ones(target)
    if not old:
        return ""
    return f" A killed run left the old one in {old[0].parent.name}; bring it back: mv {old[0]} {target}"


def _absolute(path: str | Path) -> Path:
    """The path with a name and real folders above it; where it is a link, it stays one."""
    given = Path(path)
    return given.resolve() if given.name in ("", "..") else given.parent.resolve() / given.name


def _old_ones(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{_plain(target.name)}.old-*/{_plain(target.name)}"))


def _plain(name: str) -> str:
    """A name for `glob`, in which no character has a meaning."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _clean_up(target: Path) -> None:
    """Bring the old folder back, or remove it where the new one is there, and what else killed runs have left."""
    for old in _old_ones(target):
        if not os.path.lexists(target):
            old.rename(target)
            print(f"note: {target} is back; a run was killed while it replaced it", file=sys.stderr)
    name = _plain(target.name)
    for leftover in (*target.parent.glob(f".{name}.partial-*"), *target.parent.glob(f".{name}.old-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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
