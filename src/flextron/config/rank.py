"""What `flextron rank` is told."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.config.fields import (
    Dtype,
    ModelArgument,
    OutArgument,
    Score,
    check_at_least,
)


@dataclass(frozen=True)
class RankConfig:
    """Rank the neurons and KV groups of a checkpoint and write it as an elastic one.

    Forward passes only. Then removes parts one at a time to learn what each costs, so that any share of the layers'
    weights can be asked for.

    Example: flextron rank HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2-elastic
    """

    model: ModelArgument
    """Folder, hub id, or GGUF file of a decoder LLM."""
    out: OutArgument
    """Folder to write; transformers loads it as the plain full model."""
    text: str = "sample/train"
    """Text to rank on: a .jsonl (with a "text" field) or .txt file, also .xz or .gz; by default a sample of public-domain English that comes with flextron. Text like what the model will read is better."""
    tokens: int = 16384
    """Tokens to rank on."""
    score: Score = "reconstruction"
    """What a unit is worth; docs/decisions/ compares them."""
    sensitivity_tokens: int = 2048
    """Tokens on which the cost of each removal is measured; 0 leaves that out, and shares cannot be asked for."""
    neuron_step: int | None = None
    """Step between the widths of the MLP that the search space offers; by default 16 to 32 widths."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("tokens", self.tokens, 512)
        if self.sensitivity_tokens:
            check_at_least("sensitivity_tokens", self.sensitivity_tokens, 256)
