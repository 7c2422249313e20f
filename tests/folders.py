"""What lies in a folder, and a disk that is full: for tests of what is written."""

import resource
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
