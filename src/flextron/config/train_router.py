"""The options of `flextron train-router`."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.config.fields import (
    AnyDeviceArgument,
    DeviceArgument,
    DtypeArgument,
    ModelArgument,
    OptionalText,
    Phase,
    check_at_least,
)

LEAST_EVALUATIONS = 160
"""The fewest sub-networks that a router can be trained on (a test compares this with the training)."""
LEAST_TOKENS = 6144
"""The fewest tokens that a token router can be trained on (a test compares this with the training)."""


@dataclass(frozen=True)
class TrainRouterConfig:
    """Train a router, which chooses the best sub-network for a budget.

    This measures the loss of a few hundred sub-networks, learns to predict the loss from the widths, trains the router
    on the predictions, and saves it in MODEL. If MODEL has no latency table, the table is measured first. If Ctrl-C
    stops the run, repeat the same command: measurements are kept.

    Example: flextron train-router out/smollm2-elastic
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see `flextron rank`) or pack, or smollm2-elastic (trained, comes with flextron)."""
    phase: Phase = "decode"
    """Train the router for budgets of this phase's time. prefill: time to the first token. decode: time per further token. Answers also respect limits of any other kind."""
    evaluations: int = 256
    """Largest number of sub-networks to measure. Those of an earlier run count. 0 measures none: the router learns from those that MODEL holds already, which takes half a minute and suits a pack."""
    tokens: int = 1024
    """Number of tokens to measure each sub-network on. The full model's predictions for them stay in memory: 0.2 MB a token for a vocabulary of 49,000."""
    text: str = "sample/train"
    """Text to measure on, as for `flextron rank --text`. Documents that the model was ranked on are skipped if there are others."""
    lowest: float = 0.45
    """Lowest budget to train for, as a share of the full model's time, 0 to 1."""
    seed: int = 0
    """Seed for the choice of sub-networks and for the training."""
    per_token: bool = False
    """Train a token router, which gives every token its own widths. It builds on this phase's router, which is trained first if there is none."""
    token_text: OptionalText = None
    """With --per-token, the text to train the token router on. The default is that of --text."""
    token_tokens: int = 12288
    """With --per-token, the number of tokens to train the token router on."""
    any_device: AnyDeviceArgument = False
    dtype: DtypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        if self.evaluations:
            check_at_least("evaluations", self.evaluations, LEAST_EVALUATIONS)
        check_at_least("tokens", self.tokens, 256)
        check_at_least("seed", self.seed, 0)
        check_at_least("token_tokens", self.token_tokens, LEAST_TOKENS)
        if not 0 < self.lowest < 1:
            raise ValueError(f"--lowest is {self.lowest}; it must lie between 0 and 1, the full model's time.")
