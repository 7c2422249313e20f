"""The engine inside the server: one elastic model, one thread, one batch of requests at different levels.

Each turn of the loop takes new requests, lets the controller plan a step, runs it, and hands out tokens. The thread
owns the model and the cache; other threads only reach the queue of what is new.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Condition, Thread
from typing import Any

import torch

from flextron.elastic.model import ElasticModel
from flextron.serving.embedded.attention import Batch, Row
from flextron.serving.embedded.controller import Controller, Run, Text
from flextron.serving.embedded.mixed import MixedModel
from flextron.serving.embedded.pages import PAGE_TOKENS, Held, NoPagesError, PagedCache, PagePool
from flextron.serving.embedded.prices import LevelCosts, RowWork, StepPrices
from flextron.serving.embedded.sampling import Drawn, Sampler
from flextron.serving.embedded.threads import release_threads
from flextron.serving.engine import (
    CannotMeetError,
    End,
    EndReason,
    Event,
    Handler,
    Level,
    QueueFullError,
    Request,
    Stats,
    StoppedError,
    Token,
)

MOST_FAILURES = 3
"""Steps that may fail one after another before the engine gives up."""
_IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on."""

    max_rows: int = 16
    """Texts in one step."""
    max_step_tokens: int = 512
    """Tokens in one step; longer prompts are read in parts."""
    cache_tokens: int = 16_384
    """Tokens whose keys and values are kept, of all texts together."""
    max_waiting: int = 256
    """Requests that wait; further ones are refused."""


class _Text:
    """One request while it is in the engine."""

    def __init__(self, request: Request, handler: Handler, held: Held, now: float) -> None:
        self.request = request
        self.handler = handler
        self.sampler = Sampler(request.sampling, request.prompt, request.constraint)
        self.tokens = list(request.prompt)
        self.held = held
        self.level, self.floor = request.level, request.floor
        self.ceiling = request.level if request.then is None else max(request.level, request.then.level)
        self.submitted = now
        self.started: float | None = None
        self.first_token: float | None = None
        self.written = 0
        self.cached = 0
        self.passed = 0
        self.ran_at: int | None = None
        self.phase = request.then

    @property
    def left(self) -> int:
        """Tokens to run before the next one can be drawn."""
        return len(self.tokens) - len(self.held.tokens)

    @property
    def writing(self) -> bool:
        """Whether its next step gives a token after one token."""
        return self.written > 0 and self.left == 1

    @property
    def deadline(self) -> float | None:
        """When its next token is due: objectives are for the first token, and for the others on average."""
        request = self.request
        if self.first_token is None:
            return None if request.ttft_ms is None else self.submitted + request.ttft_ms / 1000
        return None if request.tpot_ms is None else self.first_token + self.written * request.tpot_ms / 1000

    def view(self) -> Text:
        """What the controller sees of it."""
        past = len(self.held.tokens)
        return Text(
            level=self.level,
            floor=self.floor,
            past=past,
            left=self.left,
            deadline=self.deadline,
            objective_ms=self.request.ttft_ms,
            pace_ms=self.request.tpot_ms,
            writing=self.writing,
            remaining=self.request.max_new_tokens - self.written,
            passed=self.passed,
        )

    def take(self, drawn: Drawn, level: int, now: float) -> EndReason | None:
        """Note a token and hand it out; returns why the text ends with it, if it does."""
        if drawn.token in self.request.stop_tokens:
            return "stop"
        self.first_token = self.first_token or now
        self.tokens.append(drawn.token)
        self.written += 1
        if self.phase is not None and tuple(self.tokens[-len(self.phase.after) :]) == self.phase.after:
            self.level, self.floor, self.phase = self.phase.level, self.phase.floor, None
        self.tell(Token(drawn.token, level, now, drawn.logprob, drawn.top))
        return "length" if self.written >= self.request.max_new_tokens else None

    def end(self, reason: EndReason, error: str | None = None) -> None:
        """Hand out the last event."""
        queued = (self.started or time.perf_counter()) - self.submitted
        self.tell(End(reason, error, self.cached, 1000 * queued))

    def tell(self, event: Event) -> None:
        """Call the handler, whose errors are its own affair."""
        try:
            self.handler(event)
        except Exception as error:
            print(f"flextron: a handler of request {self.request.id} failed: {error!r}", flush=True)


class EmbeddedEngine:
    """Runs requests in a thread of its own; see `engine.Engine`."""

    def __init__(
        self,
        model: ElasticModel,
        levels: Sequence[Level],
        options: EngineOptions = EngineOptions(),
    ) -> None:
        """Prepare an engine; it begins to work with `start`.

        Args:
            levels: nested sub-networks, smallest first.
        """
        self.levels = tuple(levels)
        self.options = options
        pool = PagePool(-(-options.cache_tokens // PAGE_TOKENS))
        self.max_length = min(_longest(model), len(pool) * pool.page_tokens)
        self.prices = StepPrices(_costs(model, self.levels))
        self.controller = Controller(
            self.prices, len(self.levels), max_rows=options.max_rows, max_tokens=options.max_step_tokens
        )
        self._model = model
        self._vocabulary = model.lm.get_input_embeddings().weight.shape[0]
        self._mixed = MixedModel(model, [level.subnet for level in self.levels])
        self._pool, self._cache = pool, PagedCache(pool)
        self._new: deque[_Text] = deque()
        self._cancelled: set[str] = set()
        self._texts: list[_Text] = []
        self._changed = Condition()
        self._thread: Thread | None = None
        self._state = "new"
        self._counts: Counter[str] = Counter()
        self._failures = 0

    def start(self) -> None:
        """Begin to work; returns once the prices of steps have been fitted.

        Raises:
            StoppedError: it has been started before.
        """
        if self._thread is not None:
            raise StoppedError("this engine has been started before; make another one.")
        release_threads()
        self._thread = Thread(target=self._work, name="flextron engine", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._state != "new")
        if self._state == "dead":
            raise StoppedError("the engine died at its start; its error is above.")

    def submit(self, request: Request, handler: Handler) -> None:
        """Take a request; see `engine.Engine`."""
        self._check(request)
        with self._changed:
            if self._state != "working":
                raise StoppedError(
                    "the server is shutting down." if self._state == "draining" else "the engine has stopped."
                )
            texts = [*self._texts, *self._new]
            waiting = sum(text.started is None for text in texts)
            if waiting >= self.options.max_waiting:
                raise QueueFullError(
                    f"{waiting} requests are waiting, which is the limit. Try again later.", retry_after=5
                )
            if request.strict:
                self._check_strict(request, [text.view() for text in texts])
            self._new.append(_Text(request, handler, Held(None), time.perf_counter()))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request soon."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify_all()

    def set_cap(self, level: int | None) -> None:
        """Set a cap from outside.

        Raises:
            ValueError: there is no such level.
        """
        if level is not None and not 0 <= level < len(self.levels):
            raise ValueError(f"there is no level {level}; they are 0 to {len(self.levels) - 1}.")
        self.controller.limit = level

    def stats(self) -> Stats:
        """Return how it stands."""
        with self._changed:
            texts, new = list(self._texts), len(self._new)
        running = [text for text in texts if text.started is not None]
        by_level = Counter(text.ran_at for text in running)
        return Stats(
            running=len(running),
            waiting=len(texts) - len(running) + new,
            cap=self.controller.cap,
            by_level=[by_level[level] for level in range(len(self.levels))],
            predicted_over_measured=self.prices.predicted_over_measured,
            step_error=self.prices.error,
            cache_used=self._pool.held / len(self._pool),
            steps=self._counts["steps"],
            preempted=self._counts["preempted"],
            failed_steps=self._counts["failed"],
            healthy=self._state in ("new", "working", "draining"),
        )

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Drain, cancel what is left, and end the thread."""
        with self._changed:
            if self._state == "working":
                self._state = "draining"
            self._changed.wait_for(lambda: self._state == "dead" or not (self._texts or self._new), drain_seconds)
            if self._state != "dead":
                self._state = "stopped"
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _check(self, request: Request) -> None:
        """Raise a ValueError for a request that can never be taken."""
        if not request.prompt:
            raise ValueError("the prompt is empty; give one token or more.")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; ask for 1 or more.")
        length = len(request.prompt) + request.max_new_tokens
        if length > self.max_length:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_new_tokens} more are asked for; "
                f"this server takes {self.max_length} together. Shorten the prompt or ask for fewer."
            )
        if not all(0 <= token < self._vocabulary for token in request.prompt):
            raise ValueError(f"the prompt has tokens outside the vocabulary of {self._vocabulary}.")
        for name, level in (("level", request.level), ("floor", request.floor)):
            if not 0 <= level < len(self.levels):
                raise ValueError(f"{name} is {level}; levels are 0 to {len(self.levels) - 1}.")
        if request.floor > request.level:
            raise ValueError(f"the floor, level {request.floor}, is above the level {request.level}.")

    def _check_strict(self, request: Request, texts: Sequence[Text]) -> None:
        """Raise a CannotMeetError where an objective would be missed even with all that can be narrowed."""
        first = self.controller.first_token_ms(texts, request.floor, len(request.prompt))
        if request.ttft_ms is not None and first > request.ttft_ms:
            raise CannotMeetError(
                f"the first token would take {first:.0f} ms, over the objective of {request.ttft_ms:g} ms.",
                retry_after=max(1.0, (first - request.ttft_ms) / 1000),
            )
        step = self.controller.step_ms(texts, request.floor, len(request.prompt))
        if request.tpot_ms is not None and step > request.tpot_ms:
            raise CannotMeetError(
                f"a token would take {step:.0f} ms, over the objective of {request.tpot_ms:g} ms.", retry_after=1.0
            )

    # what follows runs in the engine's thread

    def _work(self) -> None:
        try:
            with self._mixed.prepared():
                self._fit_prices()
                self._enter("working")
                while self._take_new():
                    self._turn()
            self._enter("stopped")
        except BaseException as error:
            self._enter("dead")
            self._end_all("error", f"the engine has died: {error!r}")
            raise
        self._end_all("cancelled")

    def _enter(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _take_new(self) -> bool:
        """Wait for something to do, take new and cancelled requests; returns whether to go on."""
        with self._changed:
            while not (self._texts or self._new or self._state == "stopped"):
                self._cancelled.clear()
                self._changed.wait(_IDLE_SECONDS)
            self._texts.extend(self._new)
            self._new.clear()
            cancelled, self._cancelled = self._cancelled, set()
            go_on = self._state != "stopped"
        for text in [text for text in self._texts if text.request.id in cancelled]:
            self._finish(text, "cancelled")
        return go_on

    def _turn(self) -> None:
        """Run one step; an error ends its texts and no others."""
        now = time.perf_counter()
        runs = self._with_pages(self.controller.plan(now, [text.view() for text in self._texts]))
        rows = [(self._texts[run.index], run) for run in runs]
        if not rows:
            return
        try:
            self._step(rows, now)
            self._failures = 0
        except Exception as error:
            self._counts["failed"] += 1
            self._failures += 1
            for text, _ in rows:
                self._finish(text, "error", f"the step failed: {error}")
            if self._failures >= MOST_FAILURES:
                raise

    def _with_pages(self, runs: Sequence[Run]) -> list[Run]:
        """Take pages for a step's rows. Where none are left, the newest texts give theirs back and begin again."""
        taken: list[Run] = []
        preempted: set[int] = set()
        for run in runs:
            text = self._texts[run.index]
            if run.index in preempted:
                continue
            if text.started is None or not text.held.pages:
                run = self._begin(text, run)
            while self._pool.missing(text.held, run.tokens) > self._pool.available:
                newest = max((i for i, other in enumerate(self._texts) if other.held.pages), default=run.index)
                if newest <= run.index:
                    break
                preempted.add(newest)
                self._preempt(self._texts[newest])
                taken = [other for other in taken if other.index != newest]
            try:
                self._pool.extend(text.held, run.tokens)
            except NoPagesError:
                continue  # older texts hold them all: it waits
            taken.append(run)
        for index, text in enumerate(self._texts):
            text.passed = 0 if any(run.index == index for run in taken) else text.passed + 1
        return taken

    def _begin(self, text: _Text, run: Run) -> Run:
        """Look for pages that hold the beginning of a text already."""
        text.held = self._pool.match(text.tokens, run.level)
        if text.started is None:
            text.started, text.cached = time.perf_counter(), len(text.held.tokens)
        return Run(run.index, run.level, min(run.tokens, text.left))

    def _preempt(self, text: _Text) -> None:
        self._counts["preempted"] += 1
        self._pool.release(text.held)

    def _step(self, rows: Sequence[tuple[_Text, Run]], began: float) -> None:
        first, placed, tokens = 0, [], []
        for text, run in rows:
            past = len(text.held.tokens)
            placed.append(Row(text.held, first, run.tokens, past))
            tokens += text.tokens[past : past + run.tokens]
            first += run.tokens
        drawing = [i for i, (text, run) in enumerate(rows) if run.tokens == text.left]
        wanted = [placed[i].first + placed[i].count - 1 for i in drawing] or [0]
        levels = [run.level for _, run in rows]
        batch = Batch(self._cache, placed, self._model.device)
        logits = self._mixed.logits(batch, tokens, levels, [text.ceiling for text, _ in rows], wanted)
        likeliest = logits.argmax(-1).tolist()
        for (text, run), row in zip(rows, placed, strict=True):
            self._pool.written(text.held, tokens[row.span], run.level)
            text.ran_at = run.level
        drawn = [(rows[i][0], self._draw(rows[i][0], logits[n], likeliest[n])) for n, i in enumerate(drawing)]
        now = time.perf_counter()
        works = [RowWork(run.level, run.tokens, row.past) for (_, run), row in zip(rows, placed, strict=True)]
        self.prices.observe(works, 1000 * (now - began))
        self._counts["steps"] += 1
        for text, token in drawn:
            if isinstance(token, Exception):
                self._finish(text, "error", f"no token could be drawn: {token}")
            elif (reason := text.take(token, text.ran_at or 0, now)) is not None:
                self._finish(text, reason)

    def _draw(self, text: _Text, logits_V: torch.Tensor, likeliest: int) -> Drawn | Exception:
        """The next token of a text; an error, such as of its constraint, is its own and ends no other text."""
        if text.sampler.is_plain:
            return Drawn(likeliest)
        try:
            return text.sampler.draw(logits_V)
        except Exception as error:
            return error

    def _finish(self, text: _Text, reason: EndReason, error: str | None = None) -> None:
        self._pool.release(text.held)
        with self._changed:
            if text not in self._texts:
                return
            self._texts.remove(text)
            self._changed.notify_all()
        text.end(reason, error)

    def _end_all(self, reason: EndReason, error: str | None = None) -> None:
        with self._changed:
            self._texts.extend(self._new)
            self._new.clear()
        for text in list(self._texts):
            self._finish(text, reason, error)

    def _fit_prices(self) -> None:
        """Time some batches of zeros, once to warm up and once to measure."""
        steps = self._trial_steps()
        times = []
        for rows in [*steps[:2], *steps]:
            times.append(self._time(rows))
        self.prices.fit(steps, times[2:])
        self.levels = tuple(self._timed(place, level) for place, level in enumerate(self.levels))

    def _timed(self, place: int, level: Level) -> Level:
        """A level with the times that it takes in this engine, which a latency table of another loop does not know."""
        tokens = self._most_prompt_tokens
        prompt = self.prices.predict([RowWork(place, tokens, 0)])
        step = self.prices.predict([RowWork(place, 1, tokens)])
        return replace(level, step_ms=step, prefill_ms_per_token=prompt / tokens)

    @property
    def _most_prompt_tokens(self) -> int:
        """Tokens of the longest prompt that is timed at start."""
        return max(1, min(256, self.max_length // 2))

    def _trial_steps(self) -> list[list[RowWork]]:
        top, middle = len(self.levels) - 1, len(self.levels) // 2
        most = min(self.options.max_rows, 16)
        long = self._most_prompt_tokens
        steps = []
        for level in sorted({0, middle, top}):
            steps += [[RowWork(level, 1, 16)] * rows for rows in sorted({1, 2, max(1, most // 2), most})]
            steps += [[RowWork(level, 1, long)] * rows for rows in sorted({1, max(1, most // 2)})]
            steps += [[RowWork(level, min(tokens, long), 0)] for tokens in (16, 64, 256)]
        steps.append([RowWork(top, 1, 16)] + [RowWork(0, 1, 16)] * (most - 1))
        return steps

    def _time(self, rows: Sequence[RowWork]) -> float:
        """Milliseconds of one step on zeros, where the cache has room for it; else rows are left out."""
        helds, placed, first = [], [], 0
        try:
            for row in rows:
                held = Held(None)
                if self._pool.missing(held, row.past + row.tokens) > self._pool.available:
                    break
                self._pool.extend(held, row.past + row.tokens)
                held.tokens.extend([0] * row.past)
                helds.append(held)
                placed.append(Row(held, first, row.tokens, row.past))
                first += row.tokens
            levels = [row.level for row in rows[: len(placed)]]
            start = time.perf_counter()
            batch = Batch(self._cache, placed, self._model.device)
            last = [row.first + row.count - 1 for row in placed]
            self._mixed.logits(batch, [0] * first, levels, levels, last).argmax(-1).tolist()
            return 1000 * (time.perf_counter() - start)
        finally:
            for held in helds:
                self._pool.release(held)


def make_engine(model: ElasticModel, levels: Sequence[Level], **options: Any) -> EmbeddedEngine:
    """An engine of `model`; `options` are those of `EngineOptions`."""
    return EmbeddedEngine(model, levels, EngineOptions(**options))


def _longest(model: ElasticModel) -> int:
    """Most tokens that the model reads."""
    stated = [model.positions, getattr(model.config, "max_position_embeddings", None)]
    return min((length for length in stated if length), default=1 << 20)


def _costs(model: ElasticModel, levels: Sequence[Level]) -> list[LevelCosts]:
    """What levels cost, by their latency tables where there are any, else by their weights."""
    full = levels[-1]
    head = model.lm.get_output_embeddings().weight.numel()
    most = model.layer_weights(full.subnet) + head

    def relative(ms: float | None, of: float | None, level: Level) -> float:
        return ms / of if ms and of else (model.layer_weights(level.subnet) + head) / most

    groups = max(1, sum(full.subnet.kv_groups))
    return [
        LevelCosts(
            relative(level.step_ms, full.step_ms, level),
            relative(level.prefill_ms_per_token, full.prefill_ms_per_token, level),
            sum(level.subnet.kv_groups) / groups,
        )
        for level in levels
    ]
