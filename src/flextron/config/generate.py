"""The options of `flextron generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from flextron.config.fields import (
    AnyDeviceArgument,
    BudgetArgument,
    DeviceArgument,
    HeldTypeArgument,
    ModelArgument,
    OptionalPath,
    OptionalText,
    SubnetArgument,
    check_at_least,
    check_draft,
    check_one_choice,
    check_usage_picture,
)


@dataclass(frozen=True)
class GenerateConfig:
    """Complete a prompt with a sub-network.

    Example: flextron generate out/smollm2-elastic "The capital of France is" --budget 0.8x
    """

    model: ModelArgument
    """Folder of an elastic checkpoint or pack, smollm2-elastic (trained, comes with flextron), or any checkpoint, hub id or GGUF file."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """Text to continue."""
    subnet: SubnetArgument = "full"
    budget: BudgetArgument = None
    per_token: bool = False
    """With --budget, give every token its own widths. The budget then holds on average."""
    hard: bool = False
    """With --per-token, keep every forward pass within the budget."""
    picture: OptionalPath = None
    """With --per-token, a file for a picture of the text, where colours show how much each token computed: .html, .png, .svg or .pdf."""
    speculative: OptionalText = None
    """Let this smaller sub-network draft tokens that the larger one checks; --compare tells whether that is faster here. The greedy text stays the same, up to rounding. Name a budget such as 0.5x, or a size as for --subnet, such as 50%."""
    draft_tokens: int = 4
    """With --speculative, the number of tokens to draft before each check."""
    compare: bool = False
    """With --speculative, also decode without it, and print the speed-up."""
    max_new_tokens: int = 64
    """Largest number of tokens to generate."""
    chat: bool = False
    """Send the prompt as a user's message, in the model's chat template."""
    temperature: float = 0.0
    """0 takes the most likely token. Higher values sample."""
    seed: int = 0
    """Seed for the sampling."""
    any_device: AnyDeviceArgument = False
    dtype: HeldTypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        check_one_choice(self.subnet, self.budget)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("temperature", self.temperature, 0)
        if self.per_token and self.budget is None:
            raise ValueError("--per-token needs a budget, such as --budget 0.8x.")
        if self.hard and not self.per_token:
            raise ValueError("--hard needs --per-token.")
        check_at_least("draft_tokens", self.draft_tokens, 1)
        check_draft(self.speculative, compare=self.compare, per_token=self.per_token, temperature=self.temperature)
        check_usage_picture(self.picture, per_token=self.per_token)
