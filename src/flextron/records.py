"""Read and write JSON records that have a version, and journals with one JSON object per line; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flextron.atomic import clear_errors, write_text

LARGEST_BYTES = 100_000_000
"""Bytes of a record, which is read whole."""


class RecordError(ValueError):
    """A record cannot be used. The message gives the reason; the caller adds the file and the way out."""


def check_version(found: Any, version: int | str) -> None:
    """Check that a record has the version that this flextron reads.

    Raises:
        RecordError: it has another version, or none.
    """
    if found != version:
        raise RecordError(f"it has version {found!r}; this flextron reads {version}")


def parse_record(text: str, *, version: int, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return a JSON object without its version.

    Args:
        keys: the exact keys that it must have besides the version; None allows any.

    Raises:
        RecordError: it is not JSON, not an object, or has another version or other keys.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise RecordError(f"it holds a {type(data).__name__} instead of an object with a version")
    check_version(data.pop("version", None), version)
    if keys is not None and set(data) != set(keys):
        raise RecordError(f"it has the keys {sorted(data)} instead of {sorted(keys)}")
    return data


def read_record(file: str | Path, *, version: int, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file, without its version.

    Raises:
        RecordError: as `parse_record`, or the file is not UTF-8 or too large.
        OSError: the file cannot be read.
    """
    size_bytes = Path(file).stat().st_size
    if size_bytes > LARGEST_BYTES:
        raise RecordError(f"it has {size_bytes} bytes; such a file has at most {LARGEST_BYTES}")
    try:
        text = Path(file).read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise RecordError(f"it is not UTF-8 ({error})") from None
    return parse_record(text, version=version, keys=keys)


class Journal:
    """A growing file with one JSON object per line. After a crash, only the last line can be incomplete."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def read(self, *, strict: bool = True) -> list[dict[str, Any]]:
        """Return the records of all complete lines; delete an incomplete last line from the file.

        Args:
            strict: raise if a complete line is not a JSON object, instead of skipping it.

        Raises:
            RecordError: with `strict`, a line is not a JSON object (the message gives its number); or the file is not
                UTF-8.
            OSError: the file cannot be read.
        """
        if not self.file.is_file():
            return []
        try:
            lines = self.file.read_text(encoding="utf8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise RecordError(f"it is not UTF-8 ({error})") from None
        whole = [line for line in lines if line.endswith("\n")]
        records = []
        for number, line in enumerate(whole, start=1):
            try:
                records.append(self._parse(line, number))
            except RecordError:
                if strict:
                    raise
        if len(whole) < len(lines):
            write_text(self.file, "".join(whole))
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record; create the file and its folder if they do not exist.

        Raises:
            CheckpointError: the write fails. Earlier records are kept.
        """
        kept = "Earlier records are kept: run the same command again to go on."
        with clear_errors(self.file, kept):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf8") as file:
                file.write(json.dumps(record) + "\n")

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace the whole file, completely or not at all."""
        with clear_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in records))

    @staticmethod
    def _parse(line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"line {number} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise RecordError(f"line {number} holds a {type(record).__name__} instead of an object")
        return record
