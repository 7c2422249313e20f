"""What `flextron train-router` is told."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.config.fields import (
    Dtype,
    ModelArgument,
    Phase,
    check_at_least,
)

LEAST_EVALUATIONS = 160
"""What `routers.training` needs to train a router at all (a test compares)."""
LEAST_TOKENS = 6144
"""What `routers.token_making` needs to train a token router at all (a test compares)."""


@dataclass(frozen=True)
class TrainRouterConfig:
    """Train the router that chooses the best sub-network for a budget, and keep it beside the checkpoint.

    Measures the loss of a few hundred sub-networks, learns to predict it, and trains the router on the predictions. A
    latency table is measured first if there is none. Ctrl-C loses no measurement: run the same command again.

    Example: flextron train-router out/smollm2-elastic
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see flextron rank)."""
    phase: Phase = "decode"
    """Whose time the router's budgets are parts of; answers keep to limits of any other kind too."""
    evaluations: int = 256
    """Sub-networks whose loss is measured at most; those of an earlier run count."""
    tokens: int = 1024
    """Tokens that each is measured on; the full model's predictions are kept for them (0.2 MB a token at 49,000 words)."""
    text: str = "sample/train"
    """Text to measure on; documents that the model was ranked on are left out where there are others."""
    lowest: float = 0.45
    """Lowest budget to train for, as a part of the full model's time."""
    seed: int = 0
    """Seed of the sub-networks that are tried, and of the training."""
    per_token: bool = False
    """Train a token router, which gives every token widths of its own, on top of this phase's router; that is trained first where there is none."""
    token_text: str | None = None
    """Text for the token router; by default that of --text."""
    token_tokens: int = 12288
    """Tokens that the token router learns from."""
    any_device: bool = False
    """Use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("evaluations", self.evaluations, LEAST_EVALUATIONS)
        check_at_least("tokens", self.tokens, 256)
        check_at_least("seed", self.seed, 0)
        check_at_least("token_tokens", self.token_tokens, LEAST_TOKENS)
        if not 0 < self.lowest < 1:
            raise ValueError(f"lowest is {self.lowest}; it must lie between 0 and 1, the full model's time.")
