"""`Budget`: what a sub-network may cost, as users write it: `12ms`, `0.6x`, `e2e=3s@512+128,80M`. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from flextron.errors import BudgetError

_TIME = {"ms": 1, "s": 1000}
_COUNT = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_FLOPS = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS = {
    "tpot": _TIME,
    "ttft": _TIME,
    "e2e": _TIME,
    "parameters": _COUNT,
    "weights": _BYTES,
    "kv": _BYTES,
    "flops": _FLOPS,
}
"""For each metric, the size of its units in ms, parameters, bytes or FLOPs."""
_EXAMPLES = {
    "tpot": "tpot=12ms",
    "ttft": "ttft=200ms@512",
    "e2e": "e2e=3s@512+128",
    "parameters": "parameters=80M",
    "weights": "weights=150MB",
    "kv": "kv=20MB@4096",
    "flops": "flops=200M",
}
_BARE = ("tpot", "parameters", "weights")
"""Metrics that need no name, because their units tell them apart."""
_SPELLINGS = {other: unit for unit in ("x", "k", *_BYTES) for other in (unit.lower(), unit.upper())}
"""Accepted spellings in all small or all capital letters. m, Mb and MS are missing because they are ambiguous."""
_LIMIT = re.compile(r"([+-]?(?:\.?[0-9][0-9.]*|nan|inf(?:inity)?))?\s*([^@]*?)\s*(?:@\s*(.*?))?", re.IGNORECASE)
_LENGTHS = re.compile(r"([0-9]{1,12})(?:\s*\+\s*([0-9]{1,12}))?")

FORMS = (
    "12ms (time per output token), 0.6x (0.6 times the full model's), ttft=200ms (time to first token), "
    "e2e=3s@512+128 (a whole answer: 512 prompt tokens, 128 output tokens), 80M (parameters), 150MB (weights), "
    "kv=20MB@4096 (KV cache of 4,096 tokens) or flops=200M (for each token); separate several limits by commas"
)


@dataclass(frozen=True)
class Limit:
    """The most that one metric may be, for one sequence at a time."""

    metric: str
    """tpot (time per output token), ttft (time to first token), e2e (time of a whole answer), parameters, weights,
    kv (the KV cache) or flops (of one token's forward pass)."""
    value: float
    """In ms, parameters, bytes or FLOPs. If `relative`, a multiple of the full model's value, such as 0.6."""
    relative: bool = False
    prompt_tokens: int | None = None
    """For e2e and ttft, tokens of the prompt. For kv, tokens in the cache."""
    new_tokens: int | None = None
    """For e2e, tokens of the answer."""

    def __post_init__(self) -> None:
        if self.metric not in _UNITS:
            raise BudgetError(f"there is no metric {self.metric!r}; choose one of {', '.join(_UNITS)}.")
        if not (math.isfinite(self.value) and self.value > 0):
            raise BudgetError(
                f"{self.metric} is {self.value:g}; a limit is a number above 0, such as {_EXAMPLES[self.metric]}."
            )
        self._check_lengths()

    def _check_lengths(self) -> None:
        example = _EXAMPLES[self.metric]
        lengths = (self.prompt_tokens, self.new_tokens)
        if any(length is not None and length < 1 for length in lengths):
            raise BudgetError(f"the lengths of {self.metric} must be whole numbers from 1 up, such as {example}.")
        if self.metric == "e2e" and None in lengths:
            raise BudgetError(f"e2e needs the lengths of prompt and output, such as {example}.")
        if self.metric == "kv" and not self.relative and self.prompt_tokens is None:
            raise BudgetError(f"kv needs the number of tokens in the cache, such as {example}.")
        if self.metric != "e2e" and self.new_tokens is not None:
            raise BudgetError(f"{self.metric} takes no output length; only e2e does, such as {_EXAMPLES['e2e']}.")
        if self.metric not in ("e2e", "ttft", "kv") and self.prompt_tokens is not None:
            raise BudgetError(f"{self.metric} takes no length; write {example}. Only ttft, e2e and kv take one.")

    def __str__(self) -> str:
        lengths = "+".join(str(length) for length in (self.prompt_tokens, self.new_tokens) if length is not None)
        return f"{self.metric}={self._amount()}{'@' if lengths else ''}{lengths}"

    def _amount(self) -> str:
        """The shortest number and unit that read back as the value. A number of at least 1 goes before a fraction."""
        value = Decimal(repr(float(self.value)))
        units = {"x": 1} if self.relative else _UNITS[self.metric]
        numbers = {unit: value / factor for unit, factor in units.items()}
        exact = {unit: number for unit, number in numbers.items() if float(number * units[unit]) == self.value}
        unit = min(exact, key=lambda unit: (exact[unit] < 1, len(_plain(exact[unit]) + unit), exact[unit]))
        return _plain(exact[unit]) + unit


@dataclass(frozen=True)
class Budget:
    """Limits that must all hold, at most one for each metric."""

    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", tuple(self.limits))
        if not self.limits:
            raise BudgetError(f"a budget needs at least one limit: {FORMS}.")
        seen: dict[str, Limit] = {}
        for limit in self.limits:
            if limit.metric in seen:
                raise BudgetError(f"{limit.metric} is limited twice, by {seen[limit.metric]} and {limit}. Keep one.")
            seen[limit.metric] = limit

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read limits separated by commas, as in `FORMS`. Capital letters matter where they tell units apart.

        MB is 10**6 bytes, MiB is 2**20 bytes. Limits of e2e always need lengths; limits of kv need one unless relative.

        Raises:
            BudgetError: a part cannot be read, or two limit the same metric.
        """
        if not text.strip():
            raise BudgetError(f"the budget is empty; write {FORMS}.")
        try:
            return cls(tuple(_limit(part.strip()) for part in text.split(",")))
        except BudgetError as error:
            raise BudgetError(f"cannot read the budget {text!r}: {error}") from None

    def __str__(self) -> str:
        return ",".join(map(str, self.limits))


def _limit(part: str) -> Limit:
    name, equals, amount = (piece.strip() for piece in part.rpartition("="))
    if equals and name not in _UNITS:
        raise BudgetError(f"there is no metric {name!r}; choose one of {', '.join(_UNITS)}.")
    match = _LIMIT.fullmatch(amount)
    if match is None or match[1] is None:
        raise BudgetError(f"{part!r} has no number where one belongs; write {_EXAMPLES.get(name, FORMS)}.")
    number, unit, lengths = _number(match[1], part), _SPELLINGS.get(match[2], match[2]), match[3]
    metric = name or next((metric for metric in _BARE if unit in {"x": 1, **_UNITS[metric]}), "")
    factor = {"x": 1, **_UNITS.get(metric, {})}.get(unit)
    if factor is None:
        raise BudgetError(_wrong_unit(part, metric, number, unit))
    return Limit(metric, float(number * factor), unit == "x", *_lengths(lengths, metric))


def _number(text: str, part: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise BudgetError(f"{text!r} in {part!r} is not a number; write one such as 1.5.") from None


def _lengths(text: str | None, metric: str) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = _LENGTHS.fullmatch(text)
    if match is None:
        raise BudgetError(
            f"cannot read the lengths {text!r}; write the tokens of the prompt, and for e2e + the tokens of the "
            f"output, such as {_EXAMPLES['e2e' if metric == 'e2e' else 'ttft']}."
        )
    return int(match[1]), None if match[2] is None else int(match[2])


def _wrong_unit(part: str, metric: str, number: Decimal, unit: str) -> str:
    """The message for a wrong unit, with what to write instead."""
    if unit == "%":
        share, part = _plain(number), f"{metric or 'tpot'}={_plain(number / 100)}x"
        return f"{share}% is a share of the layers' weights: use --subnet {share}%. For a part of a cost write {part}."
    prefix = f"{metric}=" if metric else ""
    if not unit:
        example = _EXAMPLES[metric] if metric else "a unit, such as 12ms or 80M"
        return (
            f"{part!r} has no unit; write {prefix}{_plain(number)}x for a multiple of the full model's, or {example}."
        )
    if metric:
        return f"{metric} cannot be in {unit}; use {', '.join(_UNITS[metric])} or x, such as {_EXAMPLES[metric]}."
    of_others = [metric for metric, units in _UNITS.items() if unit in units]
    if of_others:
        return f"{part!r} needs a name, such as {of_others[0]}={part}."
    units = "; ".join(f"{metric}: {', '.join(_UNITS[metric])}" for metric in _BARE)
    return f"{unit!r} in {part!r} is no unit (m and M differ). Use x for a multiple of the full model's; {units}."


def _plain(number: Decimal) -> str:
    return format(number.normalize(), "f")
