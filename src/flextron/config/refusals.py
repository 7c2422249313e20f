"""What to say about arguments that do not fit: one plain line, instead of tyro's frame of ten or more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import dropwhile, takewhile
from typing import Any, get_type_hints

from flextron.config.fields import option

LONGEST = 200
"""Characters of a word or argument that a message repeats whole."""
SHORTENED = 80
"""Characters of a longer one that a message repeats."""
LARGEST = 1e15
"""Largest number that an option takes: more tokens than any text has."""
LEAST_ALIKE = 0.72
"""How much a known word must resemble a wrong one to be suggested, 0 to 1."""
_LONG = re.compile(rf"(?:(?<=')[^']{{{LONGEST + 1},}}(?=')|\S{{{LONGEST + 1},}})")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys instead of showing them."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NAME_INDENT = 4
"""Columns by which tyro indents the name of a missing argument; its help stands further in."""
_RULE = re.compile(r"\s*[─━-]{5,}\s*")
_REWORDED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"Unrecognized options: (.*)", r"{prog} takes no such argument: \1."),
    (r"Missing value for argument '(--\S+)'. Expected 1 values\.", r"\1 needs a value."),
    (r"Missing value for argument '(--\S+)'. Expected (\d+) values\.", r"\1 needs \2 values."),
    (r"Missing value for argument '(.+?)'.*", lambda found: f"{{prog}} needs {found[1].upper()}."),
    (r"Missing from .*?: (.*)", r"{prog} needs \1."),
    (r"invalid choice (.*) for argument '(\S+)'. Expected one of \((.*?),?\)\.", r"\2 is \1; it must be one of \3."),
    (r"Error parsing (\S+): .*invalid literal for int\(\) with base 10: (.*)", r"\1 is \2; it must be a whole number."),
    (r"Error parsing (\S+): .*could not convert string to float: (.*)", r"\1 is \2; it must be a number."),
    (r"Error parsing (\S+): Could not parse arguments \[(.*)\] into .*float.*", r"\1 is \2; it must be numbers."),
    (r"Error parsing (?!--)\S+: (.*)", r"\1"),
)
"""What tyro says, and what is said instead."""


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that is most like this one; None if none is like it."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=LEAST_ALIKE)), None)


def unknown_option(kind: type, arguments: Sequence[str], prog: str) -> str | None:
    """The message about the first option that `kind`, a command's dataclass, does not have; None if it has all."""
    known = [f"{no}{option(field)[2:]}" for field in _field_names(kind) for no in ("", "no-")]
    for word in arguments:
        name = word.partition("=")[0][2:].replace("_", "-")
        if word.startswith("--") and name and name not in known:
            near = nearest(name, known)
            way_out = f"did you mean --{near}?" if near else f"`{prog} --help` lists its options."
            return f"unknown option --{name} for {prog}; {way_out}"
    return None


def absurd_number(config: Any) -> str | None:
    """The message about the first number that no machine could work with; None if all are possible."""
    for field in fields(config):
        value = getattr(config, field.name)
        inner = absurd_number(value) if is_dataclass(value) else None
        if inner:
            return inner
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not abs(number) <= LARGEST:
                return f"{option(field.name)} is {number}; it must be a number of at most {LARGEST:.0e}."
    return None


def plain(frame: str, prog: str) -> str:
    """The message inside one of tyro's frames, as one line in plain words."""
    inside = [line.strip("│┃") for line in _COLOUR.sub("", frame).splitlines()[1:]]  # the first line is the title
    said = list(takewhile(lambda line: not _RULE.fullmatch(line), dropwhile(_RULE.fullmatch, inside)))
    if said and said[0].strip().startswith("Missing from"):
        names = [line.strip() for line in said[1:] if _indent(line) == _indent(said[0]) + _NAME_INDENT]
        said = [said[0], " and ".join(names)]
    text = " ".join(" ".join(said).split())
    for pattern, plainer in _REWORDED:
        if re.fullmatch(pattern, text):
            return re.sub(pattern, plainer, text).replace("{prog}", prog)
    return text or f"these arguments do not fit; `{prog} --help` explains them."


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def shortened(message: str, arguments: Sequence[str]) -> str:
    """The message as one line, with long arguments, and other long words and quotations, cut to their beginning."""
    for argument in arguments:
        if len(argument) > LONGEST:
            message = message.replace(argument, f"{argument[:SHORTENED]}…")
    message = _LONG.sub(lambda found: f"{found[0][:SHORTENED]}…", " ".join(message.splitlines()))
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), message)


def _field_names(kind: type) -> Iterator[str]:
    hints: dict[str, Any] = get_type_hints(kind)
    for field in fields(kind):
        inner = hints[field.name]
        if is_dataclass(inner) and isinstance(inner, type):
            yield from _field_names(inner)
        else:
            yield field.name
