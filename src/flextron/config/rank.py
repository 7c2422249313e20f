"""The options of `flextron rank`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flextron.config.fields import (
    DeviceArgument,
    DtypeArgument,
    ModelArgument,
    OptionalInt,
    OutArgument,
    Score,
    check_at_least,
)


@dataclass(frozen=True)
class RankConfig:
    """Rank the neurons and KV groups of a checkpoint, and save an elastic checkpoint.

    `rank` reads a text and sorts the units of each layer so that the most important come
    first. Then it refits one weight of each MLP, so that kept units make up for those left out; the full model stays
    within about 0.01 nats of what it was. Then it learns what removing each part costs, so that you can ask for any
    share of the weights, such as 60%.

    Example: flextron rank HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2-elastic
    """

    model: ModelArgument
    """Folder, hub id or GGUF file of a decoder LLM."""
    out: OutArgument
    """Folder to write. transformers loads it as the plain full model."""
    text: str = "sample/train"
    """Text to rank on: a .txt file, or a .jsonl file with a "text" field in each line, also as .xz, .gz or .bz2. The default is a sample of public-domain English that comes with flextron. Text like what your model will read works better."""
    tokens: int = 16384
    """Number of tokens to rank on."""
    score: Score = "reconstruction"
    """How to score a unit. docs/decisions/ compares the scores."""
    refit_tokens: int = 16384
    """Number of tokens on which the closing projections of the MLPs are refitted, so that kept units make up for those left out. 0 skips this and leaves the full model exactly as it was."""
    refit_rank: OptionalInt = None
    """Give each refitted weight a change of at most this rank, so that it fits into a small pack (`flextron pack`), such as 64. The default sets no limit, which is better where size does not matter."""
    sensitivity_tokens: int = 2048
    """Number of tokens on which to learn the cost of each removal. 0 skips this, and then you cannot ask for shares such as 60%."""
    sensitivities: Literal["estimated", "measured"] = "estimated"
    """estimated: from one backward pass and two measured widths of each sub-layer. measured: every width with forward passes, which takes some five times as long."""
    neuron_step: OptionalInt = None
    """Distance in neurons between the MLP widths of the search space. The default gives 16 to 32 widths."""
    stream: bool = False
    """Keep the weights on disk and hold only those in use, for models larger than the memory. Needs --device cpu, and beside OUT as much free space again as OUT takes. Weights that are not safetensors, or change their --dtype, are converted in memory first."""
    overwrite: bool = False
    """Replace OUT if it is a checkpoint."""
    dtype: DtypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        check_at_least("tokens", self.tokens, 512)
        if self.refit_tokens:
            check_at_least("refit_tokens", self.refit_tokens, 512)
        if self.refit_rank is not None:
            check_at_least("refit_rank", self.refit_rank, 1)
        if self.sensitivity_tokens:
            check_at_least("sensitivity_tokens", self.sensitivity_tokens, 256)
