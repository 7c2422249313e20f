"""How much each stage of the tour does, and what is chosen and timed in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUDGETS = (0.8, 0.6, 0.5)
"""Of the full model's time to the first token."""
HELD_OUT = 4
"""Sub-networks that only check the latency table."""
TIMING_ROUNDS = 2
NEW_TOKENS = 32
TOKEN_ROUNDS, TOKEN_TOKENS = 1, 4096
PER_TOKEN_BUDGETS = (0.6, 0.5)


@dataclass(frozen=True)
class Size:
    """How much each stage does, beside the tokens to rank and train on, which the config names."""

    prompt_tokens: int
    """Of what is timed."""
    designs: int
    """Sub-networks that the latency table is fitted to."""
    refit_tokens: int
    """Tokens that the closing projections are refitted on."""
    sensitivity_tokens: int
    sensitivity_block: int
    loss_tokens: int
    block_tokens: int
    """Of training and of measured losses: in shorter blocks, few tokens make more steps and more samples."""
    evaluations: tuple[int, ...]
    """Sub-networks that the router learns from; more where the surrogate has not learnt enough from the first ones."""
    router_tokens: int
    """Tokens that each of them is measured on."""
    per_token: bool
    """Whether every token gets its own widths at the end."""


_SIZES: dict[str, tuple[Any, Any]] = {  # quick, thorough
    "prompt_tokens": (256, 512),
    "designs": (12, 16),
    "refit_tokens": (4096, 16384),
    "sensitivity_tokens": (1024, 2048),
    "sensitivity_block": (64, 256),
    "loss_tokens": (1024, 2048),
    "block_tokens": (256, 512),
    "evaluations": ((160,), (160, 224)),
    "router_tokens": (256, 512),
    "per_token": (False, True),
}
QUICK, THOROUGH = (Size(**{name: both[place] for name, both in _SIZES.items()}) for place in (0, 1))
