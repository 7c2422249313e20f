"""The options of `flextron pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flextron.config.fields import OptionalPath, OutArgument, check_at_least


@dataclass(frozen=True)
class PackConfig:
    """Pack a trained elastic checkpoint into a small file beside its base checkpoint.

    A pack holds the ranking, the trained change of each weight at low rank in 8 bits, sensitivities and routers. With the
    base it makes the trained model again, so only the pack has to travel. `pack` measures what is lost.

    Example: flextron pack out/trained out/pack --base HuggingFaceTB/SmolLM2-135M-Instruct

    Example: flextron generate out/pack "The capital of France is" --subnet 60%
    """

    trained: Annotated[Positional[Path], arg(metavar="TRAINED")]
    """Folder of a trained elastic checkpoint."""
    out: OutArgument
    """Folder to write."""
    base: str
    """Checkpoint that `flextron rank` read: a folder, hub id, GGUF file, or smollm2. Users of the pack need it."""
    megabytes: float = 12.0
    """Largest size of the change of the weights."""
    text: str = "sample/validation"
    """Text on which the loss of both models is compared."""
    tokens: int = 4096
    """Number of tokens of it."""
    calibration_text: str = "sample/train"
    """Text on which the inputs of the weights are measured, so that the change is near where it matters."""
    calibration_tokens: int = 8192
    """Number of tokens of it."""
    results: OptionalPath = None
    """File results.json of `flextron evaluate TRAINED --tasks ... --out-dir`, whose accuracies the model card shows."""
    overwrite: bool = False
    """Replace OUT if it is a pack."""

    def __post_init__(self) -> None:
        check_at_least("megabytes", self.megabytes, 0.1)
        check_at_least("tokens", self.tokens, 512)
        check_at_least("calibration_tokens", self.calibration_tokens, 512)
