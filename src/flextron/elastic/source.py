"""Where a checkpoint lies: a folder, a hub id or a GGUF file. No torch here, so that a wrong name is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron.elastic.sizes import check_folder, check_gguf
from flextron.errors import CheckpointError


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
        if not (local / "config.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no config.json.")
        check_folder(local)
    elif local.exists() or str(path).count("/") > 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"no such checkpoint: {path}. Name a folder, a hub id such as org/name, or a .gguf file.")
    return str(path), {}
