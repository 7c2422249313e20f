"""What the server asks of an engine: requests in, tokens out, each token with the level that it ran at. No torch here.

A level is one of a few nested sub-networks; level 0 is the smallest, the last one is the full model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from flextron.errors import FlextronError
from flextron.subnet import Subnet

EndReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Level:
    """One of the nested sub-networks that a server runs."""

    name: str
    """The share of the full model's cost that it keeps within, such as "0.6x", or "full"."""
    share: float
    """Its predicted cost over the full model's, in the metric of the server."""
    subnet: Subnet
    loss: float | None
    """Predicted loss in nats per token of held-out text; None where nothing predicts it."""
    step_ms: float | None
    """Predicted milliseconds of one token of one request; None without a latency table."""
    prefill_ms_per_token: float | None
    """Predicted milliseconds of one token of a long prompt; None without a latency table."""


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen from the logits."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int | None = None
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer holds already."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the answer holds it."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or answer hold."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    top_logprobs: int | None = None
    """How many alternatives to report for each token; 0 reports the chosen one only, None nothing."""


class Constraint(Protocol):
    """Which tokens may come next, as in an answer that has to be JSON."""

    def allowed(self) -> Any:
        """Return a boolean tensor [V]: which tokens may come next."""

    def accept(self, token: int) -> None:
        """Note the token that came."""


@dataclass(frozen=True)
class Phase:
    """What a request wants once its answer holds the tokens `after`, as when its thinking is over."""

    after: tuple[int, ...]
    level: int
    floor: int


@dataclass(frozen=True)
class Request:
    """One text to write.

    With `floor` below `level`, the engine may narrow the request to keep times; with both equal, it never does.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    level: int
    """The widest level that it may get."""
    floor: int
    """The narrowest level that it may get."""
    sampling: Sampling = Sampling()
    stop_tokens: frozenset[int] = frozenset()
    ttft_ms: float | None = None
    """Objective for the time from submission to the first token."""
    tpot_ms: float | None = None
    """Objective for the time of each further token, on average."""
    strict: bool = False
    """Refuse the request instead of missing `ttft_ms` or `tpot_ms` by prediction."""
    constraint: Constraint | None = None
    then: Phase | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    level: int
    """The level whose logits it was chosen from."""
    at: float
    """`time.perf_counter()` when it was there."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """Alternatives and their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class End:
    """The last event of every request. A stop token is not among the tokens."""

    reason: EndReason
    error: str | None = None
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were shared with an earlier request."""
    queued_ms: float = 0.0
    """Milliseconds from submission to the first step that ran a part of it."""


Event: TypeAlias = Token | End
Handler: TypeAlias = Callable[[Event], None]
"""Called in the engine's thread; it must return at once."""


class RefusedError(FlextronError):
    """A request that is not taken now; it may be later."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it is worth another try; None where waiting does not help."""


class QueueFullError(RefusedError):
    """As many requests wait as may."""


class CannotMeetError(RefusedError):
    """A strict request whose objective would be missed by prediction."""


class StoppedError(RefusedError):
    """The engine drains, has stopped, or has died."""


@dataclass(frozen=True)
class Stats:
    """An engine at a glance."""

    running: int
    waiting: int
    cap: int
    """The widest level that requests without a fixed one get now."""
    by_level: Sequence[int]
    """Running requests by the level that they ran at last."""
    predicted_over_measured: float
    """Moving median of the predicted over the measured time of a step."""
    step_error: float
    """Moving median of the relative error of the predictions."""
    cache_used: float
    """Share of the cache that running requests hold, 0 to 1."""
    steps: int
    preempted: int
    failed_steps: int
    healthy: bool


class Engine(Protocol):
    """Runs requests together, in a thread of its own. All methods may be called from any thread."""

    @property
    def levels(self) -> Sequence[Level]:
        """The levels, the smallest first."""

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its answer together."""

    def start(self) -> None:
        """Begin to work."""

    def submit(self, request: Request, handler: Handler) -> None:
        """Take a request; `handler` gets its tokens and then one `End`, whatever happens.

        Raises:
            RefusedError: it is not taken; the handler is not called.
            ValueError: it can never be taken, such as a prompt that is too long.
        """

    def cancel(self, request_id: str) -> None:
        """End a request, soon, with an `End` of "cancelled"; nothing happens where it has ended."""

    def set_cap(self, level: int | None) -> None:
        """Let no request without a fixed level run above `level`; None leaves it to the controller."""

    def stats(self) -> Stats:
        """Return how it stands."""

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let running ones end for so long, cancel the rest, and end the thread."""
