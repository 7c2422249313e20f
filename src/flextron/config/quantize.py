"""The options of `flextron quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flextron.config.fields import ModelArgument, OutArgument, check_at_least


@dataclass(frozen=True)
class QuantizeConfig:
    """Write an elastic checkpoint with weights in 8 or 4 bits, which all its sub-networks share.

    They take a quarter or a sixth of the memory of float32, run on CPUs, and cannot be trained. Sensitivities, routers
    and latency tables come along. `--dtype int8` of other verbs quantises a model when it is loaded, and writes nothing.

    Example: flextron quantize smollm2-elastic out/smollm2-int8
    """

    model: ModelArgument
    """Folder, hub id or GGUF file of a checkpoint, or a pack."""
    out: OutArgument
    """Folder to write. Use it as MODEL of generate, evaluate, serve, measure-latency and train-router."""
    dtype: Literal["int8", "int4"] = "int8"
    """Type of the matrices. int8 loses about 0.01 nats, int4 0.1, in SmolLM2."""
    text: str = "sample/validation"
    """Text on which the loss of both is compared, as for `flextron evaluate --text`."""
    tokens: int = 2048
    """Number of tokens of it. 0 compares nothing, and then never all weights are held in float at once."""
    overwrite: bool = False
    """Replace OUT if it is a checkpoint."""

    device: ClassVar[str] = "cpu"

    def __post_init__(self) -> None:
        if self.tokens:
            check_at_least("tokens", self.tokens, 512)
