"""Read and write JSON records that have a version, and journals with one JSON object per line; imports no torch."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from flextron.atomic import clear_errors, write_text

T = TypeVar("T")
LARGEST_BYTES = 100_000_000
"""Bytes of a record, which is read whole."""
MAY_BE_NAN = "may be NaN"
"""Annotates a float that may be undefined: `Annotated[float, MAY_BE_NAN]`."""


class RecordError(ValueError):
    """A record cannot be used. The message gives the reason; the caller adds the file and the way out."""


def check_version(found: Any, version: int | str) -> None:
    """Check that a record has the version that this flextron reads.

    Raises:
        RecordError: it has another version, or none.
    """
    if type(found) is not type(version) or found != version:
        raise RecordError(f"it has version {_short(found)}; this flextron reads {version}")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        RecordError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        data: Any = json.loads(text if isinstance(text, str) else text.decode("utf8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise RecordError(f"it holds a {type(data).__name__} instead of an object")
    return data


def parse_record(text: str | bytes, *, version: int, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return a JSON object without its version.

    Args:
        keys: the exact keys that it must have besides the version; None allows any.

    Raises:
        RecordError: as `parse_object`, or it has another version or other keys.
    """
    data = parse_object(text)
    check_version(data.pop("version", None), version)
    if keys is not None and set(data) != set(keys):
        raise RecordError(f"it has the keys {_short(sorted(data))} instead of {sorted(keys)}")
    return data


def read_record(file: str | Path, *, version: int, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file, without its version.

    Raises:
        RecordError: as `parse_record`, or the file is too large.
        OSError: the file cannot be read.
    """
    size_bytes = Path(file).stat().st_size
    if size_bytes > LARGEST_BYTES:
        raise RecordError(f"it has {size_bytes} bytes; such a file has at most {LARGEST_BYTES}")
    return parse_record(Path(file).read_bytes(), version=version, keys=keys)


def checked(data: Any, kind: type[T], place: str = "") -> T:
    """Return what came from JSON as a `kind`: a dataclass, a TypedDict, or a type that their fields may have.

    These are tuple[X, ...], dict[str, X], X | None, Any, and Python's own types. Numbers must be finite. A dataclass
    has exactly the keys of its fields; a TypedDict may have further ones. Lists become tuples.

    Args:
        place: name of `data` for the message, such as "checks[0].loss".

    Raises:
        RecordError: a key is missing or unknown, a value has another type, or a number is not finite.
        ValueError: as the dataclass raises.
    """
    try:
        value: T = _checked(data, kind, place)
    except RecursionError:
        raise RecordError(f"{place or 'it'} is nested too deeply") from None
    return value


def _checked(data: Any, kind: Any, place: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        nan = MAY_BE_NAN in inner and isinstance(data, float) and math.isnan(data)
        return data if nan else _checked(data, inner[0], place)
    if origin in (Union, UnionType):
        return None if data is None else _checked(data, inner[0], place)
    if kind is Any:
        return _checked_any(data, place)
    if is_dataclass(kind) or is_typeddict(kind):
        return _object(data, kind, place)
    if origin is tuple and isinstance(data, list):
        return tuple(_checked(item, inner[0], f"{place}[{index}]") for index, item in enumerate(data))
    if origin is not None and origin is not tuple and isinstance(data, dict):
        return {key: _checked(value, inner[1], _inside(place, key)) for key, value in data.items()}
    return _scalar(data, kind, place)


def _checked_any(data: Any, place: str) -> Any:
    """Return the data as it is; only numbers and text are looked at, and a whole number may have any size."""
    for key, value in data.items() if isinstance(data, dict) else ():
        _checked_any(value, _inside(place, key))
    for index, value in enumerate(data) if isinstance(data, list) else ():
        _checked_any(value, f"{place}[{index}]")
    if isinstance(data, (float, str)):
        _scalar(data, type(data), place)
    return data


def _object(data: Any, kind: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise RecordError(f"{place or 'it'} is {_short(data)}, not an object")
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        needed = kind.__required_keys__
        unknown = set()
    else:
        needed = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}
        unknown = data.keys() - hints.keys()
    for problem, names in (("lacks", needed - data.keys()), ("has the unknown keys", unknown)):
        if names:
            raise RecordError(f"{place or 'it'} {problem} {_short(sorted(names))}")
    values = {key: _checked(value, hints.get(key, Any), _inside(place, key)) for key, value in data.items()}
    return values if is_typeddict(kind) else kind(**values)


def _scalar(data: Any, kind: Any, place: str) -> Any:
    if kind is float and type(data) in (int, float):
        if not abs(data) <= sys.float_info.max:
            raise RecordError(f"{place} is {_short(data)}, not a finite number")
        return float(data)
    huge = kind is int and type(data) is int and abs(data) >= 2**63
    if type(data) is not kind or huge or (kind is str and _has_surrogates(data)):
        raise RecordError(f"{place or 'it'} is {_short(data)}, not {_WORDS.get(get_origin(kind) or kind, 'an object')}")
    return data


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _inside(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _short(value: Any) -> str:
    """The beginning of a value from a file, for a message."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}…"


class Journal:
    """A growing file with one JSON object per line. After a crash, only the last line can be incomplete."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def read(self, make: Callable[[dict[str, Any]], Any] = dict) -> list[Any]:
        """Return what `make` makes of the records of all complete lines; cut an incomplete last line off the file.

        A line that is no JSON object, or of which `make` can make nothing, is left out; a note on standard error tells
        its number. It stays in the file.

        Args:
            make: raises ValueError, KeyError or TypeError where a record is not as it should be.

        Raises:
            OSError: the file cannot be read.
        """
        if not self.file.is_file():
            return []
        *whole, rest = self.file.read_bytes().split(b"\n")
        records, broken = [], []
        for number, line in enumerate(whole, start=1):
            try:
                records.append(make(parse_object(line)))
            except (ValueError, KeyError, TypeError) as error:
                broken.append(f"line {number} is left out, because {str(error)[:200].rstrip('.')}")
        if broken:
            more = f"; so are {len(broken) - 1} more lines" if len(broken) > 1 else ""
            print(f"note: in {self.file}, {broken[0]}{more}.", file=sys.stderr)
        if rest:
            os.truncate(self.file, self.file.stat().st_size - len(rest))
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
