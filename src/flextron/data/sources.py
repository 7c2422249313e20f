"""Read training text from files, folders, globs, parquet and datasets, as documents in order."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from itertools import chain
from pathlib import Path
from typing import Any

from flextron.data.blocks import ENDINGS, PIECE, SAMPLES, Piece, in_pieces, pieces
from flextron.errors import FlextronError, raised_as

_DATASET = "datasets:"
_TEXT_FILE = re.compile(r"\.((jsonl|txt|md)(\.xz|\.gz|\.bz2)?|parquet)$")
_ENDINGS = f"{ENDINGS} or .parquet"
_STRINGS = re.compile(r"(dictionary<values=)?(large_)?string")
"""Types of a parquet file's column that hold text."""
_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 24
"""Rows of a parquet file that are read at once, and what they may take."""


@dataclass(frozen=True)
class Source:
    """A text, and its share of the training data."""

    path: str
    """A file (.parquet, .jsonl, .txt or .md, the last three also as .xz or .gz), a folder with such files at any depth
    or a glob (read in the order of their names), a sample such as sample/train, or datasets:NAME[,CONFIG[,SPLIT]]."""
    weight: float = 1.0
    """Share of the blocks, relative to the weights of the other sources."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source of text has an empty path; write PATH or PATH@WEIGHT.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight {self.weight} of {self.path} is not a finite number above 0.")

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read a source from PATH or PATH@WEIGHT. An @ before a / belongs to the path.

        Raises:
            ValueError: the weight is not a finite number above 0.
        """
        path, at, weight = text.rpartition("@")
        if not at or "/" in weight or Path(text).exists():
            return cls(text)
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(
                f"weight {weight!r} of {path!r} is no number. Write PATH@0.3, or PATH@1 if PATH itself has an @."
            ) from None
        return cls(path, number)


def open_source(path: str) -> tuple[Callable[[], Iterator[Piece]], Any]:
    """Return a function that reads a source's documents from the start, and what identifies the source."""
    if path.startswith(_DATASET):
        name, *options = path.removeprefix(_DATASET).split(",")
        if not name or len(options) > 2:
            raise ValueError(f"cannot read {path!r} as a dataset; write datasets:NAME[,CONFIG[,SPLIT]].")
        config, split = [option.strip() or None for option in (*options, "", "")[:2]]
        files = [file for file in sorted(Path(name).rglob("*")) if file.is_file()]
        identity = [name if not files else _stats(files), config, split or "train"]
        return lambda: _strings(_rows(path, name, config, split or "train"), path), identity
    files = _files(path)
    return lambda: chain.from_iterable(map(_pieces, files)), _stats(files)


def _stats(files: list[Path]) -> list[tuple[Any, ...]]:
    """The path, size in bytes and last change in nanoseconds of each file.

    Of a text that is too large for one piece, the size of pieces, too: where it is cut, its tokens may differ.
    """
    stats = [(file.resolve(), file.stat()) for file in files]
    return [
        (str(place), stat.st_size, stat.st_mtime_ns, *([PIECE] if stat.st_size > PIECE else []))
        for place, stat in stats
    ]


def _files(path: str) -> list[Path]:
    if path in SAMPLES:
        return [Path(str(resources.files("flextron") / f"{path}.jsonl.xz"))]
    if Path(path).is_file():
        return [Path(path)]
    inside = Path(path).is_dir()
    pattern = f"{glob.escape(path)}/**" if inside else path
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - also takes absolute patterns
    files = sorted(Path(name) for name in found if _TEXT_FILE.search(name) and Path(name).is_file())
    if not files:
        raise FlextronError(f"no text at {path}. Name a file ({_ENDINGS}), a folder or glob of them, or {SAMPLES[0]}.")
    return files


def _pieces(file: Path) -> Iterator[Piece]:
    return _strings(_parquet(file), str(file)) if file.suffix == ".parquet" else pieces(file)


def _strings(values: Iterable[Any], name: str) -> Iterator[Piece]:
    """Yield the values of a text column, checked: each is a string, and at least one is not blank."""
    empty = True
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise FlextronError(f'{name}, row {number}: "text" is a {type(value).__name__}, not a string.')
        empty = empty and not value.strip()
        yield from in_pieces(value)
    if empty:
        raise FlextronError(f"{name} is empty.")


def _parquet(file: Path) -> Iterator[Any]:
    parquet = _extra("pyarrow.parquet", file)
    with raised_as(FlextronError, f"cannot read {file}"):
        about = parquet.read_metadata(file)
        schema = about.schema.to_arrow_schema()
        _check_column(schema.names, file)
        if about.num_rows and not _STRINGS.match(str(schema.field("text").type)):
            raise FlextronError(f'{file}: the column "text" is of type {schema.field("text").type}, not string.')
        groups = map(about.row_group, range(about.num_row_groups))
        row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // (1 + row_bytes)))
        with parquet.ParquetFile(file, metadata=about, read_dictionary=["text"]) as table:
            for batch in table.iter_batches(batch_size=rows, columns=["text"]) if about.num_rows else ():
                words, places = batch.column(0).dictionary, batch.column(0).indices
                for place in places.to_pylist():  # one by one: all of them may be far more than the words
                    yield None if place is None else words[place].as_py()


def _rows(path: str, name: str, config: str | None, split: str) -> Iterator[Any]:
    datasets = _extra("datasets", path)
    with raised_as(FlextronError, f"cannot read {path}"):
        for row in datasets.load_dataset(name, config, split=split, streaming=True):
            _check_column(row, path)
            yield row["text"]


def _check_column(names: Iterable[str], path: str | Path) -> None:
    if "text" not in names:
        raise FlextronError(f'{path} has no column "text" but {", ".join(names)}. Rename the one that holds the text.')


def _extra(module: str, path: str | Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise FlextronError(f'cannot read {path}: {error}. Run: pip install "flextron[data]"') from None
