"""`Job`: the texts of one HTTP request, from the engine's thread to the event loop.

What a slow reader has not taken waits here. It cannot fill the memory: a text has at most `max_new_tokens` events,
the limits bound texts and tokens of a request, the engine's queue and batch bound the requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import anyio

from flextron.serving.api.metrics import Metrics
from flextron.serving.api.refusal import ApiError, of_engine
from flextron.serving.api.wishes import Grant
from flextron.serving.api.writing import Writer, Written
from flextron.serving.engine import End, Engine, Event, Handler, Level, RefusedError, Request, Token


class Mailbox:
    """Events from the engine's thread for the event loop, which is woken once for all that have gathered."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._is_woken = False
        self._woken = asyncio.Event()

    def handler(self, place: int) -> Handler:
        """Return what the engine calls with the events of the text at `place`; it may call from any thread."""

        def handle(event: Event) -> None:
            self._events.append((place, event))
            if not self._is_woken:
                self._is_woken = True
                with suppress(RuntimeError):  # the loop has ended, and with it whoever would read
                    self._loop.call_soon_threadsafe(self._woken.set)

        return handle

    def wake(self) -> None:
        """Let `take` return, from the event loop's thread."""
        self._woken.set()

    async def take(self, seconds: float) -> list[tuple[int, Event]]:
        """Wait for events, at most so many seconds, and return all that are there."""
        if not self._events:
            with anyio.move_on_after(max(0.0, seconds)):
                await self._woken.wait()
        self._woken.clear()
        self._is_woken = False  # before they are taken, so that one that comes meanwhile wakes again
        return [self._events.popleft() for _ in range(len(self._events))]


@dataclass
class Text:
    """One text of a request, as far as it is written."""

    request: Request
    grant: Grant
    writer: Writer
    begun: float
    """`time.perf_counter()` when it was asked for."""
    levels: Counter[int] = field(default_factory=Counter)
    """Tokens by level."""
    first_at: float | None = None
    last_at: float | None = None
    finish: str | None = None
    """Why it ended, in OpenAI's words; None while it goes on."""
    end: End | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return sum(self.levels.values())

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token."""
        return None if self.first_at is None else 1000 * (self.first_at - self.begun)

    @property
    def tpot_ms(self) -> float | None:
        """Time of each further token."""
        if self.first_at is None or self.last_at is None or self.tokens < 2:
            return None
        return 1000 * (self.last_at - self.first_at) / (self.tokens - 1)

    def met(self) -> dict[str, bool | None]:
        """Whether the objectives were kept; None where there is none, or nothing to measure."""
        ours = {"ttft": (self.ttft_ms, self.grant.ttft_ms), "tpot": (self.tpot_ms, self.grant.tpot_ms)}
        return {
            name: None if limit is None or taken is None else taken <= limit for name, (taken, limit) in ours.items()
        }


class Job:
    """Submits the texts of a request and follows them to their ends."""

    def __init__(self, engine: Engine, metrics: Metrics, texts: Sequence[Text], *, seconds: float) -> None:
        self.texts = texts
        self._engine, self._metrics = engine, metrics
        self._mailbox = Mailbox()
        self._until = time.perf_counter() + seconds
        self._seconds = seconds
        self.gone = False
        """Whether the client has left."""
        self._late = False

    def submit(self) -> None:
        """Hand all texts to the engine, or none.

        Raises:
            ApiError: 429, 503 or 400, one is not taken.
        """
        try:
            for place, text in enumerate(self.texts):
                self._engine.submit(text.request, self._mailbox.handler(place))
        except (RefusedError, ValueError) as error:
            self.cancel()
            raise of_engine(error) from None

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes."""
        return self.gone or all(text.finish is not None for text in self.texts)

    def abandon(self) -> None:
        """The client has left: cancel what is not written."""
        if not self.is_done:
            self.gone = True
            self._metrics.cancelled.inc(sum(text.finish is None for text in self.texts))
            self.cancel()
            self._mailbox.wake()

    def cancel(self) -> None:
        """Let the engine end all texts that go on."""
        for text in self.texts:
            if text.finish is None:
                self._engine.cancel(text.request.id)

    async def take(self, seconds: float) -> list[tuple[int, list[Written]]]:
        """Wait for what is written next, at most so long: for each text that went on, what can be sent of it.

        Raises:
            ApiError: 500 or 503, the engine has failed or stops.
        """
        left = self._until - time.perf_counter()
        events = await self._mailbox.take(min(seconds, left))
        written: dict[int, list[Written]] = {}
        for place, event in events:
            written.setdefault(place, []).extend(self._one(self.texts[place], event))
        if left <= 0 and not self.is_done:
            self._end_late(written)
        return list(written.items())

    def _one(self, text: Text, event: Event) -> list[Written]:
        if text.finish is not None or self.gone:
            return []
        if isinstance(event, Token):  # after a stop string, it came before the engine heard of the end
            return [] if text.writer.stopped else self._token(text, event)
        text.end = event
        rest = text.writer.end()
        text.finish = self._reason(text, event)
        self._count(text)
        return rest

    def _token(self, text: Text, token: Token) -> list[Written]:
        if text.last_at is None:
            text.first_at = token.at
            self._metrics.first[token.level].observe(max(0.0, token.at - text.begun))
        else:
            self._metrics.token[token.level].observe(max(0.0, token.at - text.last_at))
        text.last_at = token.at
        text.levels[token.level] += 1
        written = text.writer.push(token)
        if text.writer.stopped:
            self._engine.cancel(text.request.id)
        return written

    def _reason(self, text: Text, end: End) -> str:
        if text.writer.stopped:
            return "stop"
        if end.reason == "error":
            raise ApiError(f"the model failed: {end.error or 'no reason given'}.", status=500, code="engine_error")
        if end.reason == "cancelled":
            if self._late:
                return "length"
            raise ApiError("the server stops; send the request again.", status=503, code="stopped", retry_after=5)
        return end.reason

    def _end_late(self, written: dict[int, list[Written]]) -> None:
        """End all texts at the limit of time, with what they have."""
        self._late = True
        self.cancel()
        if not any(text.tokens for text in self.texts):
            raise ApiError(
                f"no token within {self._seconds:g} s, the limit of this server; try again later.",
                status=503,
                code="timeout",
                retry_after=10,
            )
        for place, text in enumerate(self.texts):
            if text.finish is None:
                written.setdefault(place, []).extend(text.writer.end())
                text.finish = "length"
                self._count(text)

    def _count(self, text: Text) -> None:
        metrics = self._metrics
        for level, tokens in text.levels.items():
            metrics.tokens.labels(self._engine.levels[level].name).inc(tokens)
        if text.end is not None:
            metrics.queue[text.grant.level].observe(text.end.queued_ms / 1000)
        asked = max(text.grant.level, text.grant.answer or 0)
        if text.grant.answer is None and any(level < asked for level in text.levels):
            metrics.degraded.inc()
        for name, met in text.met().items():
            metrics.objective(name, met)

    def usage(self) -> dict[str, object]:
        """Return the request's `usage`: OpenAI's counts and, as `flextron`, what was promised and kept."""
        prompts = {text.request.prompt: text for text in self.texts}
        prompt = sum(len(tokens) for tokens in prompts)
        answer = sum(text.tokens for text in self.texts)
        cached = sum(text.end.cached_tokens for text in prompts.values() if text.end is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
            "flextron": self._report(self._engine.levels),
        }

    def _report(self, levels: Sequence[Level]) -> dict[str, object]:
        """Return what was asked for and what came of it; of several texts, the slowest counts."""
        asked = self.texts[0].grant
        used = sum((text.levels for text in self.texts), Counter())
        met = [text.met() for text in self.texts]
        return {
            "asked": asked.asked,
            "level": levels[asked.level].name,
            "floor": levels[asked.floor].name,
            "levels": {levels[level].name: used[level] for level in sorted(used)},
            "ttft_ms": _slowest(text.ttft_ms for text in self.texts),
            "tpot_ms": _slowest(text.tpot_ms for text in self.texts),
            "queue_ms": _slowest(text.end.queued_ms for text in self.texts if text.end is not None),
            "met": {name: _all_met([each[name] for each in met]) for name in ("ttft", "tpot")},
        }


def _slowest(times: Iterable[float | None]) -> float | None:
    return max((round(each, 3) for each in times if each is not None), default=None)


def _all_met(met: Sequence[bool | None]) -> bool | None:
    known = [each for each in met if each is not None]
    return all(known) if known else None
