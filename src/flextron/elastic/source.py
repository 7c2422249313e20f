"""Where a checkpoint lies: a folder, a hub id or a GGUF file. No torch here, so that a wrong name is told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from flextron.atomic import lost
from flextron.elastic.sizes import check_folder, check_gguf
from flextron.errors import CheckpointError, FlextronError, first_line
from flextron.records import checked, read_record
from flextron.subnet import SearchSpace

VERSION = 1
METADATA_FILE = "flextron.json"
RANKING_FILE = "ranking.safetensors"
QUANTIZED_FILE = "quantized.safetensors"
"""Weights in few bits, under a name that transformers does not take for weights that it can load."""
PACK = "pack.json"
"""The file in a folder that is a pack (`elastic.pack`) and no checkpoint."""


def source_of(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub id to read, and for a GGUF file the option that transformers needs.

    Raises:
        CheckpointError: it is no folder with a checkpoint, no such file, and cannot be a hub id; or its weights cannot
            be what its config describes.
    """
    local = Path(path)
    if str(path).endswith(".gguf"):
        if not local.is_file():
            raise CheckpointError(f"no such file: {path}")
        check_gguf(local)
        return str(local.parent), {"gguf_file": local.name}
    if local.is_dir():
        check_whole(local)
        if not (local / "config.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no config.json.")
        check_folder(local)
    elif way_back := lost(local):
        raise CheckpointError(f"no such checkpoint: {path}.{way_back}")
    elif local.exists() or str(path).count("/") > 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"no such checkpoint: {path}. Name a folder, a hub id such as org/name, or a .gguf file.")
    return str(path), {}


class _Files(TypedDict, total=False):
    files: tuple[str, ...]


class _Quantized(_Files, total=False):
    quantization: str
    """Type of the weights, if they are quantised (`elastic.quantized_files`)."""
    fingerprint: str
    """Of the weights before."""


class Metadata(_Quantized):
    """What METADATA_FILE holds besides its version."""

    search_space: SearchSpace | None


def read_metadata(file: Path) -> Metadata:
    """Read METADATA_FILE.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    with clear_metadata(file):
        return checked(read_record(file, version=VERSION), Metadata)


def search_space_in(folder: str | Path) -> SearchSpace | None:
    """Return the search space of the elastic checkpoint in a local folder; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = Path(folder) / METADATA_FILE
    return read_metadata(file)["search_space"] if file.is_file() else None


def missing_files(folder: Path) -> list[str]:
    """The files that an elastic checkpoint was saved with and lacks now; weights may have other names since.

    Raises:
        CheckpointError: flextron.json cannot be read.
    """
    with clear_metadata(folder / METADATA_FILE):
        files = checked(read_record(folder / METADATA_FILE, version=VERSION), _Files).get("files", ())
    present = {file.name for file in folder.iterdir() if file.is_file()}
    return [name for name in files if not name.startswith("model") and name not in present]


def check_whole(folder: Path) -> None:
    """Check that no part of a checkpoint is missing: a copy that ended halfway, or a run that is not done.

    Raises:
        CheckpointError: one is; the message names it.
    """
    if not (folder / METADATA_FILE).is_file():
        for part, what in _SIGNS.items():
            if (folder / part).is_file():
                raise CheckpointError(f"{folder} has {part} but no {METADATA_FILE}: {what}.")
        return
    if missing := missing_files(folder):
        raise CheckpointError(f"{folder} is not whole: it lacks {', '.join(missing)}. {COPY_AGAIN}.")


COPY_AGAIN = "Copy the folder again, or make it again"
_SIGNS = {
    "train.json": "it is a training run that is not done. Run the same `flextron train` again to go on",
    RANKING_FILE: f"it is not whole. {COPY_AGAIN}",
    "rank.json": f"it is not whole. {COPY_AGAIN}",
}
"""Files that lie beside an elastic checkpoint, and what it means if that has no flextron.json."""


@contextmanager
def clear_metadata(file: Path, other: type[Exception] = ValueError) -> Iterator[None]:
    """Turn what a damaged flextron.json raises, and `other` errors, into a CheckpointError with a way out."""
    try:
        yield
    except FlextronError:
        raise
    except (OSError, ValueError, KeyError, TypeError, other) as error:
        way_out = "Install the flextron that wrote it, or rank the original again."
        raise CheckpointError(f"cannot read {file}: {first_line(error).rstrip('.')}. {way_out}") from error
