"""Budgets of requests: from what a body, a model's alias or a header names to levels of the engine. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flextron.budget import Budget, Limit
from flextron.errors import BudgetError
from flextron.serving.api.fields import Fields, shown
from flextron.serving.api.refusal import ApiError
from flextron.serving.engine import Level

TTFT_HEADER, TPOT_HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"
FULL = "full"
PHASES = ("thinking", "answer")
THINKING_ENDS = "</think>"
_EXAMPLES = '"0.6x", "full", "tpot=12ms" or "ttft=200ms"'
_SLACK = 1e-9
_LONGEST_TIME_MS = 1e7


@dataclass(frozen=True)
class Wish:
    """A budget as it was named, before it meets the levels of an engine."""

    text: str = FULL
    source: str = "default"
    """Where it was named: budget, model, headers or default."""
    share: float = 1.0
    """Most of the full model's cost."""
    tpot_ms: float | None = None
    ttft_ms: float | None = None

    @property
    def is_timed(self) -> bool:
        """Whether it holds an objective in time."""
        return self.tpot_ms is not None or self.ttft_ms is not None


@dataclass(frozen=True)
class Asked:
    """All that one request says about its budget."""

    wish: Wish | None = None
    """None where it names no budget."""
    answer: Wish | None = None
    """The budget after thinking, where `wish` is that of thinking."""
    after: str = THINKING_ENDS
    """The text that ends thinking."""
    floor: float | None = None
    """Share of the full model's cost below which it must not be narrowed."""
    strict: bool = False


@dataclass(frozen=True)
class Policy:
    """What a server does about budgets."""

    default: Wish = Wish()
    """Of requests that name none."""
    adaptive: bool = True
    """Whether requests that name no budget may be narrowed."""
    floor: int = 0
    """The narrowest level that a request is narrowed to, unless its body says otherwise."""


@dataclass(frozen=True)
class Grant:
    """A budget as levels of an engine."""

    asked: str
    level: int
    floor: int
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    strict: bool = False
    answer: int | None = None
    """The level after thinking."""
    answer_floor: int = 0
    after: str = ""


def parse_wish(text: str, source: str = "budget") -> Wish:
    """Read `full`, `0.6x`, `12ms`, `tpot=12ms`, `ttft=200ms`, or several of them with commas.

    Raises:
        ApiError: 400, it cannot be read, or names something that a server cannot keep.
    """
    if text.strip() == FULL:
        return Wish(FULL, source)
    try:
        limits = [limit for part in text.split(",") for limit in Budget.parse(part).limits]
    except BudgetError as error:
        raise _refused(str(error)) from None
    return replace(_combined(limits), text=text.strip(), source=source)


def _combined(limits: Sequence[Limit]) -> Wish:
    if len({(limit.metric, limit.relative) for limit in limits}) < len(limits):
        raise _refused("a budget limits something twice; keep one of each.")
    wish = Wish()
    for limit in limits:
        if limit.relative and limit.metric == "tpot":
            wish = replace(wish, share=limit.value)
        elif limit.metric == "tpot":
            wish = replace(wish, tpot_ms=limit.value)
        elif limit.metric == "ttft" and not limit.relative and limit.prompt_tokens is None:
            wish = replace(wish, ttft_ms=limit.value)
        else:
            raise _refused(f"a server keeps no budget of {limit}; name {_EXAMPLES}.")
    return wish


def _refused(message: str) -> ApiError:
    return ApiError(message, param="budget", code="invalid_budget")


def asked_of(body: Fields, alias: str | None, headers: Mapping[str, str]) -> Asked:
    """Find the budget of a request: in its body, else in its model's alias, else in its headers.

    Raises:
        ApiError: 400, a budget that cannot be read.
    """
    named: Any = body.values.get("budget")
    asked = Asked(floor=_share(body, "floor"), strict=body.flag("strict"))
    if isinstance(named, dict):
        return _in_phases(Fields(named, "budget."), asked)
    if named is not None:
        if not isinstance(named, str):
            body.unfit("budget", f"a string such as {_EXAMPLES}, or an object with thinking and answer")
        return replace(asked, wish=parse_wish(body.checked_text("budget", named)))
    if alias is not None:
        return replace(asked, wish=parse_wish(alias, "model"))
    return replace(asked, wish=_of_headers(headers))


def _in_phases(phases: Fields, asked: Asked) -> Asked:
    unknown = set(phases.values) - {*PHASES, "after"}
    if unknown or not all(name in phases for name in PHASES):
        raise _refused('a budget of phases is {"thinking": "0.6x", "answer": "full"}, with "after" if need be.')
    thinking, answer = (parse_wish(phases.text(name) or "") for name in PHASES)
    if thinking.is_timed or answer.is_timed:
        raise _refused('budgets of phases are shares, such as "0.6x" or "full"; name times for the whole answer.')
    after = phases.text("after", THINKING_ENDS) or ""
    if not after.strip() or len(after) > 100:
        phases.refuse("after", "must be a text of 1 to 100 characters, such as </think>.")
    text = f"thinking={thinking.text},answer={answer.text}"
    return replace(asked, wish=replace(thinking, text=text), answer=answer, after=after)


def _share(body: Fields, name: str) -> float | None:
    text = body.text(name)
    if text is None:
        return None
    wish = parse_wish(text)
    if wish.is_timed:
        body.refuse(name, f'is {shown(text)}; it must be a share, such as "0.5x".')
    return wish.share


def _of_headers(headers: Mapping[str, str]) -> Wish | None:
    ttft, tpot = (_milliseconds(headers, name) for name in (TTFT_HEADER, TPOT_HEADER))
    if ttft is None and tpot is None:
        return None
    named = {"tpot": tpot, "ttft": ttft}
    text = ",".join(f"{metric}={value:g}ms" for metric, value in named.items() if value is not None)
    return Wish(text, "headers", tpot_ms=tpot, ttft_ms=ttft)


def _milliseconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= _LONGEST_TIME_MS:
        raise ApiError(
            f"the header {name} is {shown(text)}; it must be milliseconds above 0.", param=name, code="invalid_value"
        )
    return value


def grant(asked: Asked, policy: Policy, levels: Sequence[Level], prompt_tokens: int) -> Grant:
    """Find the levels that a request gets: the widest within its budget, and the narrowest that it may fall to.

    A share is kept exactly: both are the same, unless the body names a floor. A budget of time may fall to the
    server's floor.

    Raises:
        ApiError: 400, a budget below the smallest level, or one of time where the levels have no times.
    """
    wish = asked.wish or policy.default
    level = min(_by_share(wish, levels, policy.floor), _by_time(wish, asked.strict, levels, policy, prompt_tokens))
    may_fall = wish.is_timed or (asked.wish is None and policy.adaptive)
    floor = min(policy.floor, level) if may_fall else level
    if asked.floor is not None:
        floor = _floor(asked.floor, level, levels, policy.floor)
    if asked.strict and not wish.is_timed:
        raise ApiError(
            "strict needs an objective in time, such as tpot=12ms or a header x-slo-tpot-ms; leave it out.",
            param="strict",
            code="invalid_value",
        )
    granted = Grant(wish.text, level, floor, wish.tpot_ms, wish.ttft_ms, asked.strict)
    return granted if asked.answer is None else _with_answer(granted, asked, levels, policy)


def _with_answer(granted: Grant, asked: Asked, levels: Sequence[Level], policy: Policy) -> Grant:
    assert asked.answer is not None  # noqa: S101 - as the caller saw
    level = _by_share(asked.answer, levels, policy.floor)
    floor = level if asked.floor is None else _floor(asked.floor, level, levels, policy.floor)
    return replace(granted, answer=level, answer_floor=floor, after=asked.after)


def _by_share(wish: Wish, levels: Sequence[Level], floor: int) -> int:
    """Return the widest level within the share."""
    fit = _widest(levels, lambda level: level.share <= wish.share + _SLACK, floor)
    if fit is None:
        least = levels[floor]
        raise _refused(
            f"budget {wish.text} is below the smallest sub-network of this server, {least.name} "
            f"({least.share:.3f} of the full model's cost). Ask for {least.name} or more."
        )
    return fit


def _by_time(wish: Wish, strict: bool, levels: Sequence[Level], policy: Policy, prompt_tokens: int) -> int:
    """Return the widest level that is predicted to keep the times.

    A first token that no level gives in time depends on the prompt, so that it is refused only where `strict` is.
    """
    if not wish.is_timed:
        return len(levels) - 1
    _check_tables(wish, levels[-1])
    tpot = _widest(levels, lambda level: _fits(level.step_ms, wish.tpot_ms), policy.floor)
    if tpot is None:
        raise _too_fast(wish, "a token", levels[policy.floor], levels[policy.floor].step_ms)
    ttft = _widest(levels, lambda level: _fits(_first_ms(level, prompt_tokens), wish.ttft_ms), policy.floor)
    if ttft is None and strict:
        least = levels[policy.floor]
        raise _too_fast(wish, f"a prompt of {prompt_tokens} tokens", least, _first_ms(least, prompt_tokens))
    return min(tpot, policy.floor if ttft is None else ttft)


def _check_tables(wish: Wish, full: Level) -> None:
    lacks_tpot = wish.tpot_ms is not None and full.step_ms is None
    if lacks_tpot or (wish.ttft_ms is not None and full.prefill_ms_per_token is None):
        raise _refused(
            f"budget {wish.text} needs levels with predicted times of {'decode' if lacks_tpot else 'prefill'}, which "
            'this engine does not give; name a share such as "0.6x".'
        )


def _widest(levels: Sequence[Level], fits: Callable[[Level], bool], floor: int) -> int | None:
    return next((place for place in range(len(levels) - 1, floor - 1, -1) if fits(levels[place])), None)


def _fits(predicted_ms: float | None, limit_ms: float | None) -> bool:
    return limit_ms is None or (predicted_ms is not None and predicted_ms <= limit_ms)


def _first_ms(level: Level, prompt_tokens: int) -> float | None:
    return None if level.prefill_ms_per_token is None else level.prefill_ms_per_token * prompt_tokens


def _too_fast(wish: Wish, what: str, least: Level, takes_ms: float | None) -> ApiError:
    return _refused(
        f"budget {wish.text} cannot be kept: the smallest sub-network of this server, {least.name}, takes "
        f"{takes_ms or 0:.3g} ms for {what}. Ask for more time."
    )


def _floor(share: float, level: int, levels: Sequence[Level], least: int) -> int:
    floor = _by_share(Wish(f"floor {share:g}x", share=share), levels, least)
    if floor > level:
        raise ApiError(
            f"floor is {levels[floor].name}, above the budget's level {levels[level].name}; lower the floor.",
            param="floor",
            code="invalid_value",
        )
    return floor
