"""Which rows the next step runs, at which levels, and how much of which prompts: it gives up width before time.

After SlackFit (SuperServe, NSDI 2025): a step's cap is the widest level whose predicted time fits the smallest slack.
Ours: the step is priced by what its rows read and compute; requests have floors; prompts are cut to what is left of the
step; and rows that may not be narrowed wait where they would make others late. No clock and no torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flextron.serving.embedded.prices import RowWork, StepPrices

RISE_SECONDS = 1.0
"""The cap rises by one level after so long without need for the present one."""
LEAST_PROMPT_TOKENS = 16
"""So much of a prompt is read in every step, however late others are."""
HORIZON = 16
"""Tokens over which a text may make up for a step that took long: objectives are averages."""
PATIENCE = 4
"""Steps that a wide row without a deadline lets pass for others."""


@dataclass(frozen=True)
class Text:
    """What the controller sees of one request."""

    level: int
    floor: int
    past: int
    """Tokens whose keys and values are written."""
    left: int
    """Tokens to run before its next token: 1 where it is writing, the rest of its prompt before."""
    deadline: float | None = None
    """When its next token is due, in seconds of the engine's clock."""
    objective_ms: float | None = None
    """Objective for the time to its first token."""
    pace_ms: float | None = None
    """Objective for the time of each further token."""
    writing: bool = True
    remaining: int = 1
    """Tokens that it may still write."""
    passed: int = 0
    """Steps in a row that it was left out of."""

    @property
    def fixed(self) -> bool:
        """Whether its level never changes."""
        return self.floor == self.level


@dataclass(frozen=True)
class Run:
    """One row of the next step."""

    index: int
    """Of the text."""
    level: int
    tokens: int


class Controller:
    """Plans one step after another."""

    def __init__(self, prices: StepPrices, levels: int, *, max_rows: int, max_tokens: int) -> None:
        """Begin with all levels allowed.

        Args:
            max_rows: texts in one step at most.
            max_tokens: tokens in one step at most; texts that are writing take one each.
        """
        self._prices = prices
        self._top = levels - 1
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._cap = self._top
        self._needed_since = 0.0
        self.limit: int | None = None
        """A cap from outside, which holds beside the controller's own."""

    @property
    def cap(self) -> int:
        """The widest level of texts that may be narrowed."""
        return self._cap if self.limit is None else min(self._cap, self.limit)

    def plan(self, now: float, texts: Sequence[Text]) -> list[Run]:
        """Choose the next step for texts in their order of arrival; the first `max_rows` take part.

        Args:
            now: seconds of the engine's clock.
        """
        chosen = list(enumerate(texts))[: self._max_rows]
        writing = [(index, text) for index, text in chosen if text.writing]
        reading = [(index, text) for index, text in chosen if not text.writing]
        self._move_cap(now, self._widest_in_time(now, [t for _, t in writing], [t for _, t in _waiting(texts)]))
        writing = self._without_wide_ones(now, writing)
        runs = [Run(index, self._level(text), 1) for index, text in writing]
        return runs + self._prompts(now, texts, runs, reading)

    def first_token_ms(self, texts: Sequence[Text], level: int, prompt: int) -> float:
        """Return the predicted time to the first token of one more text, if all that can is narrowed."""
        ahead = sum(text.left for text in texts if not text.writing) + prompt
        floors = [RowWork(text.floor, 1, text.past) for text in texts if text.writing]
        return self._reading_ms(ahead, level, floors)

    def step_ms(self, texts: Sequence[Text], level: int, past: int) -> float:
        """Return the predicted time of a step with one more text that writes, if all that can is narrowed."""
        floors = [RowWork(text.floor, 1, text.past) for text in texts[: self._max_rows - 1]]
        return self._prices.predict([*floors, RowWork(level, 1, past)])

    def _level(self, text: Text, cap: int | None = None) -> int:
        return min(text.level, max(text.floor, self.cap if cap is None else cap))

    def _widest_in_time(self, now: float, writing: Sequence[Text], reading: Sequence[Text]) -> int:
        """The widest cap that may be next, at which by prediction no text is late; 0 if there is none."""
        if all(text.deadline is None for text in (*writing, *reading)):
            return self._top
        for cap in range(min(self._cap + self._levels_to_rise(now), self._top), 0, -1):
            if self._in_time(now, cap, writing, reading):
                return cap
        return 0

    def _in_time(self, now: float, cap: int, writing: Sequence[Text], reading: Sequence[Text]) -> bool:
        rows = [RowWork(self._level(text, cap), 1, text.past) for text in writing]
        allowed = self._allowed_ms(now, writing)
        if allowed is not None and self._prices.predict(rows) > self._prices.margin * allowed:
            return False
        ahead = 0
        for text in reading:
            ahead += text.left
            if text.deadline is None or text.fixed:
                continue
            due = self._prices.margin * 1000 * (text.deadline - now)
            if self._reading_ms(ahead, self._level(text, cap), rows) > due and not self._is_hopeless(text):
                return False
        return True

    def _is_hopeless(self, text: Text) -> bool:
        """Whether a text that is late could not be in time on a server of its own, so that narrowing others is vain."""
        if text.writing:
            alone = self._prices.predict([RowWork(text.floor, 1, text.past)])
            return text.pace_ms is not None and alone > text.pace_ms
        return text.objective_ms is not None and self._reading_ms(text.left, text.floor, []) > text.objective_ms

    def _allowed_ms(self, now: float, texts: Sequence[Text]) -> float | None:
        """The time that each of the next steps may take, below 0 where a text is late for good; None: any."""
        return min((ms / steps for ms, steps in self._times_left(now, texts)), default=None)

    def _times_left(self, now: float, texts: Sequence[Text]) -> list[tuple[float, int]]:
        """For each text with a deadline, milliseconds until some of its next tokens are due, and how many tokens."""
        found = []
        for text in texts:
            if text.deadline is not None and not self._is_hopeless(text):
                tokens = max(1, min(text.remaining, HORIZON))
                pace = text.pace_ms or 0.0
                found.append((1000 * (text.deadline - now) + (tokens - 1) * pace, tokens))
        return found

    def _reading_ms(self, tokens: int, level: int, rows: Sequence[RowWork]) -> float:
        """The predicted time of reading so many tokens of prompts while `rows` write."""
        room = max(LEAST_PROMPT_TOKENS, self._max_tokens - len(rows))
        steps, rest = divmod(tokens, room)
        whole = self._prices.predict([*rows, RowWork(level, room, room)]) if steps else 0.0
        return steps * whole + (self._prices.predict([*rows, RowWork(level, rest, rest)]) if rest else 0.0)

    def _levels_to_rise(self, now: float) -> int:
        """One level, and more where nothing has run for a while, so that no one is narrowed for a load long gone."""
        return max(1, int((now - self._needed_since) / RISE_SECONDS))

    def _move_cap(self, now: float, wanted: int) -> None:
        """Fall at once; rise once a wider level has been in time for a while."""
        if wanted <= self._cap:
            self._cap, self._needed_since = wanted, now
        elif now - self._needed_since >= RISE_SECONDS:
            self._cap, self._needed_since = min(wanted, self._cap + self._levels_to_rise(now)), now

    def _without_wide_ones(self, now: float, writing: list[tuple[int, Text]]) -> list[tuple[int, Text]]:
        """Leave out texts with a fixed level above the cap where they would make others late, and can wait."""
        narrow = [pair for pair in writing if self._level(pair[1]) <= self.cap]
        allowed = self._allowed_ms(now, [text for _, text in narrow])
        if allowed is None or len(narrow) == len(writing):
            return writing
        together = self._prices.predict([RowWork(self._level(text), 1, text.past) for _, text in writing])
        if together <= self._prices.margin * allowed:
            return writing
        return [pair for pair in writing if pair in narrow or not _can_wait(now, pair[1], 2 * together)]

    def _prompts(
        self, now: float, texts: Sequence[Text], runs: Sequence[Run], reading: Sequence[tuple[int, Text]]
    ) -> list[Run]:
        """Fill the step with prompts, in order of arrival, as far as those that write stay in time."""
        works = [RowWork(run.level, 1, texts[run.index].past) for run in runs]
        limit_ms = self._step_limit(now, [texts[run.index] for run in runs], works)
        room = self._max_tokens - len(runs)
        found: list[Run] = []
        for index, text in reading:
            level = self._level(text)
            tokens = min(text.left, room)
            if limit_ms is not None:
                tokens = self._fitting(works, level, text, tokens, limit_ms)
                if found and tokens < min(text.left, LEAST_PROMPT_TOKENS):
                    break
                tokens = max(tokens, min(text.left, room, LEAST_PROMPT_TOKENS))
            if tokens <= 0:
                break
            found.append(Run(index, level, tokens))
            works.append(RowWork(level, tokens, text.past))
            room -= tokens
        return found

    def _step_limit(self, now: float, writing: Sequence[Text], works: Sequence[RowWork]) -> float | None:
        """The time that the next step may take, if those after it read no prompts; at least a token's time."""
        left = self._times_left(now, writing)
        if not left:
            return None
        after = self._prices.predict(works)
        pace = min((text.pace_ms for text in writing if text.pace_ms is not None), default=0.0)
        return self._prices.margin * max(pace, min(ms - (steps - 1) * after for ms, steps in left))

    def _fitting(self, works: Sequence[RowWork], level: int, text: Text, most: int, limit_ms: float) -> int:
        """The most tokens of a prompt with which the step is predicted to stay within `limit_ms`."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._prices.predict([*works, RowWork(level, middle, text.past)]) <= limit_ms
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _waiting(texts: Sequence[Text]) -> list[tuple[int, Text]]:
    """The texts whose prompts are still to be read, with their indices."""
    return [(index, text) for index, text in enumerate(texts) if not text.writing]


def _can_wait(now: float, text: Text, step_ms: float) -> bool:
    if text.deadline is None:
        return text.passed < PATIENCE
    return 1000 * (text.deadline - now) > step_ms
