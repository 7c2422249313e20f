"""`Fields`: a JSON object whose values are read with their types and ranges. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from flextron.serving.api.refusal import ApiError

_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a body as a JSON object.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        found = json.loads(body.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise ApiError("the body is nested too deeply to read; send flatter JSON.", code="invalid_json") from None
    except ValueError as error:  # also of UnicodeDecodeError and of numbers with thousands of digits
        raise ApiError(f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(f"the body is {kind_of(found)}; it must be a JSON object.", code="invalid_json")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def kind_of(value: Any) -> str:
    """Return what JSON calls the type of a value, with an article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


def shown(value: Any) -> str:
    """Return the beginning of a value, as JSON."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class Fields:
    """Reads fields by name. An absent field and null both give the default."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, name: str, message: str, code: str = "invalid_value") -> NoReturn:
        """Raise the error about one field; `message` goes on from its name."""
        raise ApiError(f"{self.prefix}{name} {message}", param=f"{self.prefix}{name}", code=code)

    def unfit(self, name: str, wanted: str) -> NoReturn:
        """Raise the error about a field of another type."""
        value = self.values.get(name)
        self.refuse(name, f"is {kind_of(value)}, {shown(value)}; it must be {wanted}.", "invalid_type")

    def flag(self, name: str) -> bool:
        """Read true or false; absent is false."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.unfit(name, "true or false")
        return bool(value)

    def text(self, name: str, default: str | None = None) -> str | None:
        """Read a string."""
        value = self.values.get(name)
        if value is None:
            return default
        return self.checked_text(name, value)

    def checked_text(self, name: str, value: Any) -> str:
        """Return `value` if it is a string that UTF-8 can hold."""
        if not isinstance(value, str):
            raise ApiError(
                f"{self.prefix}{name} is {kind_of(value)}; it must be a string.", param=f"{self.prefix}{name}"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(name, "holds half of a surrogate pair; send whole characters.")
        return value

    def whole(self, name: str, low: int, high: int, limit: str = "") -> int | None:
        """Read a whole number between `low` and `high`; `limit` says what sets the upper one, and the way out."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.unfit(name, "a whole number")
        self._check_range(name, value, low, high, limit)
        return int(value)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """Read a number between `low` and `high`."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.unfit(name, "a number")
        self._check_range(name, value, low, high, "")
        return float(value)

    def _check_range(self, name: str, value: float, low: float, high: float, limit: str) -> None:
        if not low <= value <= high:  # as is NaN
            given = value if abs(value) < 10**_SHOWN else "too large a number"
            self.refuse(name, f"is {given}; it must lie between {low} and {high}{limit or '.'}")

    def one_of(self, name: str, choices: Collection[str], default: str) -> str:
        """Read one of a few words."""
        value = self.text(name, default)
        if value not in choices:
            self.refuse(name, f"is {shown(value)}; it must be one of {', '.join(choices)}.")
        assert value is not None  # noqa: S101 - a choice
        return value

    def inner(self, name: str) -> Fields:
        """Read an object; absent is an empty one."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.unfit(name, "an object")
        return Fields({} if value is None else value, f"{self.prefix}{name}.")

    def items(self, name: str, read: Callable[[str, Any], Any], most: int) -> list[Any]:
        """Read a list of at most `most` values with `read(name, value)`; absent is an empty list."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.unfit(name, "a list")
        if len(value) > most:
            self.refuse(name, f"has {len(value)} items; it may have at most {most}. Send fewer.")
        return [read(f"{name}[{place}]", item) for place, item in enumerate(value)]
