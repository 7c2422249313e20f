"""Reading back what flextron wrote: JSON records of one version, and journals that only grow. No torch here."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flextron.atomic import write_text


class RecordError(ValueError):
    """Why a record cannot be used, as half a sentence: the caller names the file and the way out."""


def check_version(found: Any, version: int | str) -> None:
    """Pass if a record is of the version that this flextron reads.

    Raises:
        RecordError: another version, or none.
    """
    if found != version:
        raise RecordError(f"it has version {found!r}; this flextron reads {version}")


def parse_record(text: str, *, version: int, keys: Collection[str] | None = None) -> dict[str, Any]:
    """A JSON object, without its version.

    Args:
        keys: exactly those that it must have beside the version; None for any.

    Raises:
        RecordError: not JSON, not an object, of another version, or with other keys.
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
    """The JSON object that a file holds, without its version.

    Raises:
        RecordError: as `parse_record`, or not UTF-8.
        OSError: the file cannot be read.
    """
    try:
        text = Path(file).read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise RecordError(f"it is not UTF-8 ({error})") from None
    return parse_record(text, version=version, keys=keys)


class Journal:
    """JSON objects, one a line, in a file that grows: after a crash, all lines but the last one are whole."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def read(self, *, strict: bool = True) -> list[dict[str, Any]]:
        """All whole lines; a last line that a crash cut off is dropped from the file, too.

        Args:
            strict: raise for a whole line that is no JSON object, instead of leaving it out.

        Raises:
            RecordError: such a line; the message has its number.
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
        """Add one line; the file and its folder are made where they are missing."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf8") as file:
            file.write(json.dumps(record) + "\n")

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the file anew, whole or not at all."""
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
