"""What `flextron generate` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flextron.config.fields import (
    BudgetArgument,
    Dtype,
    ModelArgument,
    check_at_least,
    check_draft,
    check_one_choice,
    check_usage_picture,
)


@dataclass(frozen=True)
class GenerateConfig:
    """Complete a prompt with a sub-network.

    Example: flextron generate out/smollm2-elastic "The capital of France is" --budget 0.6x
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """Text to go on from."""
    subnet: str = "full"
    """Sub-network: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    budget: BudgetArgument = None
    per_token: bool = False
    """With --budget, let every token have widths of its own; the budget holds on average."""
    hard: bool = False
    """With --per-token, let no forward pass exceed the budget."""
    picture: Path | None = None
    """With --per-token, a file for a picture of the text, coloured by compute: .html, .png, .svg or .pdf."""
    speculative: str | None = None
    """A smaller sub-network that writes ahead for faster greedy text, the same up to rounding: a budget such as 0.5x, or as --subnet such as 50%."""
    draft_tokens: int = 4
    """With --speculative, tokens to write ahead before they are checked."""
    compare: bool = False
    """With --speculative, also decode plainly, and print the speed-up."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    chat: bool = False
    """Put the prompt into the model's chat template, as a user's message."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher samples."""
    seed: int = 0
    """Seed of the sampling."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("temperature", self.temperature, 0)
        check_one_choice(self.subnet, self.budget)
        if self.per_token and self.budget is None:
            raise ValueError("--per-token needs a budget, such as --budget 0.6x.")
        if self.hard and not self.per_token:
            raise ValueError("--hard is of --per-token.")
        check_at_least("draft_tokens", self.draft_tokens, 1)
        check_draft(self.speculative, compare=self.compare, per_token=self.per_token, temperature=self.temperature)
        check_usage_picture(self.picture, per_token=self.per_token)
