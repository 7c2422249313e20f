"""What lies in a folder, a disk that is full, and another writer: for tests of what is written."""

import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


def content(path: Path) -> dict[str, str]:
    """All files below a folder, hidden ones too."""
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


@contextmanager
def files_of_at_most(size_bytes: int):
    """Let the operating system itself refuse larger writes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


_HOLD = """
import sys
sys.argv[0] = "flextron"
from pathlib import Path
from flextron.locks import locked
with locked(Path(sys.argv[1]), inside=sys.argv[2] == "inside"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(target: Path, where: str = "beside"):
    """Another process that writes `target` during the block; yields the process, to kill it before its time."""
    command = [sys.executable, "-c", _HOLD, str(target), where]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


@contextmanager
def writer_inside(target: Path):
    """Another process that writes into the folder `target` during the block."""
    target.mkdir(parents=True, exist_ok=True)
    with writer(target, "inside") as process:
        yield process
