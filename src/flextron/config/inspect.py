"""The options of `flextron inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flextron.config.fields import DeviceArgument, ModelArgument


@dataclass(frozen=True)
class InspectConfig:
    """Say what of a model narrows, what is only left out whole, and how it is exported.

    An architecture without an entry in flextron is found from its modules and one forward pass. Its spec is then
    checked on a small random copy and on the model's own weights, and printed as the entry that would pin it.

    Example: flextron inspect allenai/OLMo-2-0425-1B
    """

    model: ModelArgument
    """Folder of a checkpoint, hub id or GGUF file."""
    device: DeviceArgument = "auto"
    dtype: ClassVar[str] = "auto"
