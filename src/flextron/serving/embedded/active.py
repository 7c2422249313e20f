"""One request while it is in the engine."""

from __future__ import annotations

import time

from flextron.serving.embedded.controller import Text
from flextron.serving.embedded.pages import Held
from flextron.serving.embedded.sampling import Drawn, Sampler
from flextron.serving.engine import End, EndReason, Event, Handler, Request, Token


class ActiveText:
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
