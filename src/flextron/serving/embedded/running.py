"""The engine inside the server: one elastic model, one thread, one batch of requests at different levels.

Each turn of the loop takes new requests, lets the controller plan a step, runs it, and hands out tokens. The thread
owns the model and the cache; other threads only reach the queue of what is new.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

import torch

from flextron.elastic.model import ElasticModel
from flextron.errors import FlextronError
from flextron.serving.embedded.active import ActiveText
from flextron.serving.embedded.attention import Batch, Row
from flextron.serving.embedded.controller import Controller, Run, Text
from flextron.serving.embedded.mixed import MixedModel
from flextron.serving.embedded.pages import PAGE_TOKENS, Held, NoPagesError, PagedCache, PagePool
from flextron.serving.embedded.prices import RowWork, StepPrices
from flextron.serving.embedded.sampling import Drawn
from flextron.serving.embedded.threads import release_threads
from flextron.serving.embedded.trials import costs_of, fit_prices, with_times
from flextron.serving.engine import (
    CannotMeetError,
    EndReason,
    Handler,
    Level,
    QueueFullError,
    Request,
    Stats,
    StoppedError,
)

LONGEST_TRIAL = 256
"""Tokens of the longest prompt that is timed at start."""
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

        Raises:
            FlextronError: the model's attentions do not narrow, or a sub-layer is no module of its own.
        """
        if not all(sub.opens and sub.axis.module for _, _, sub in model.sub_layers()):
            raise FlextronError(
                f"serving needs attentions that narrow by KV groups and MLPs that are modules; "
                f"{model.config.model_type} lacks one of them. Export a sub-network, and serve that."
            )
        self.levels = tuple(levels)
        self.options = options
        pool = PagePool(-(-options.cache_tokens // PAGE_TOKENS))
        self.max_length = min(_longest(model), len(pool) * pool.page_tokens)
        self.prices = StepPrices(costs_of(model, self.levels))
        self.controller = Controller(
            self.prices, len(self.levels), max_rows=options.max_rows, max_tokens=options.max_step_tokens
        )
        self._model = model
        self._vocabulary = model.lm.get_input_embeddings().weight.shape[0]
        self._mixed = MixedModel(model, [level.subnet for level in self.levels])
        self._pool, self._cache = pool, PagedCache(pool)
        self._new: deque[ActiveText] = deque()
        self._cancelled: set[str] = set()
        self._texts: list[ActiveText] = []
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
            self._new.append(ActiveText(request, handler, Held(None), time.perf_counter()))
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

    def _begin(self, text: ActiveText, run: Run) -> Run:
        """Look for pages that hold the beginning of a text already."""
        text.held = self._pool.match(text.tokens, run.level)
        if text.started is None:
            text.started, text.cached = time.perf_counter(), len(text.held.tokens)
        return Run(run.index, run.level, min(run.tokens, text.left))

    def _preempt(self, text: ActiveText) -> None:
        self._counts["preempted"] += 1
        self._pool.release(text.held)

    def _step(self, rows: Sequence[tuple[ActiveText, Run]], began: float) -> None:
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

    def _draw(self, text: ActiveText, logits_V: torch.Tensor, likeliest: int) -> Drawn | Exception:
        """The next token of a text; an error, such as of its constraint, is its own and ends no other text."""
        if text.sampler.is_plain:
            return Drawn(likeliest)
        try:
            return text.sampler.draw(logits_V)
        except Exception as error:
            return error

    def _finish(self, text: ActiveText, reason: EndReason, error: str | None = None) -> None:
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
        longest = max(1, min(LONGEST_TRIAL, self.max_length // 2))
        sizes = {"levels": len(self.levels), "rows": self.options.max_rows, "prompt_tokens": longest}
        fit_prices(self.prices, self._mixed, self._cache, **sizes)
        self.levels = with_times(self.levels, self.prices, longest)


def make_engine(model: ElasticModel, levels: Sequence[Level], **options: Any) -> EmbeddedEngine:
    """An engine of `model`; `options` are those of `EngineOptions`."""
    return EmbeddedEngine(model, levels, EngineOptions(**options))


def _longest(model: ElasticModel) -> int:
    """Most tokens that the model reads."""
    stated = [model.positions, getattr(model.config, "max_position_embeddings", None)]
    return min((length for length in stated if length), default=1 << 20)
