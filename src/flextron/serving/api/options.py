"""What a server is told: its limits, who may ask, and what its model needs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from flextron.serving.api.wishes import Policy
from flextron.serving.engine import Sampling


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    body_bytes: int = 4_000_000
    prompt_tokens: int | None = None
    """None takes what the engine can hold."""
    new_tokens: int = 4096
    choices: int = 16
    """Texts of one request: prompts times n."""
    seconds: float = 600.0
    """From the request to its last token; what is written by then is the answer."""
    top_logprobs: int = 20
    read_seconds: float = 30.0
    """For a client to send its body."""
    stall_seconds: float = 60.0
    """For a client to take what it was sent; then it is cut off."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    cors: tuple[str, ...] = ()
    """Origins of pages that a browser lets use the server, or "*"."""
    only_local_names: bool = True
    """Answer only where the Host header names this machine: a page elsewhere may own a name that leads here."""


@dataclass(frozen=True)
class Options:
    """What a server knows about its model, and how it treats requests."""

    name: str = "flextron"
    """The model's name in the API."""
    stop_tokens: frozenset[int] = frozenset()
    vocabulary: int | None = None
    """Logits of the model; None takes the tokenizer's number of tokens."""
    losses: str | None = None
    """What gives the losses of levels: "router" and "pairs" predict them, "sensitivities" their increases over full."""
    sampling: Sampling = field(default_factory=Sampling)
    """Where a request leaves it open."""
    policy: Policy = field(default_factory=Policy)
    limits: Limits = Limits()
    keep_alive_seconds: float = 10.0
    """After so long without a token, a stream gets a comment, so that nothing between closes it."""
