"""The options of `flextron export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from flextron.config.fields import (
    AnyDeviceArgument,
    BudgetArgument,
    DtypeArgument,
    Engine,
    ModelArgument,
    NeuronStepArgument,
    OutArgument,
    Quantization,
    SubnetArgument,
    check_ending,
    check_one_choice,
)


@dataclass(frozen=True)
class ExportConfig:
    """Save a sub-network as a model of its own, and check it.

    With --to hf, equal widths give a plain checkpoint of the same architecture. Widths that differ from layer to layer
    give a checkpoint with `per_layer_config`, which AutoModelForCausalLM loads after `import flextron`. With --to gguf,
    `export` writes one file for llama.cpp and the tools built on it.

    Example: flextron export out/smollm2-elastic out/smollm2-60 --subnet 60%

    Example: flextron export out/smollm2-elastic small.gguf --budget 0.8x --to gguf --quantize q8_0
    """

    model: ModelArgument
    """Folder of an elastic checkpoint or pack, or smollm2-elastic (trained, comes with flextron)."""
    out: OutArgument
    """Folder to write, or with --to gguf a file such as small.gguf."""
    subnet: SubnetArgument = "full"
    budget: BudgetArgument = None
    neuron_step: NeuronStepArgument = None
    equal_widths: bool = False
    """Use equal widths in all layers, within --budget or at most as large as --subnet."""
    to: Engine = "hf"
    """Format. hf is for transformers, gguf is for llama.cpp."""
    quantize: Quantization = "f16"
    """With --to gguf, the type of the weights in the file. K-quants (q6_k, q5_k_m, q4_k_m) need: pip install "flextron[llamacpp]"."""
    verify: bool = True
    """Load the export again, compare it with the sub-network, and keep it only if both agree. With --to gguf this runs llama.cpp and needs: pip install "flextron[llamacpp]"."""
    remote_code: bool = False
    """With --to hf, copy the code for per-layer widths beside the weights, so that machines without flextron can load them with trust_remote_code."""
    overwrite: bool = False
    """Replace OUT if it is an export in the same format."""
    any_device: AnyDeviceArgument = False
    dtype: DtypeArgument = "auto"
    device: Annotated[
        str,
        arg(
            help="Where to check the export, and whose latency table --budget uses, such as cpu or cuda:0. "
            "auto takes a GPU if there is one."
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        check_one_choice(self.subnet, self.budget)
        if self.neuron_step is not None and self.budget is None:
            raise ValueError(f"--neuron-step {self.neuron_step} needs --budget: it limits what a budget may choose.")
        if self.to == "gguf":
            check_ending("OUT", self.out, (".gguf",))
            if self.remote_code:
                raise ValueError("--remote-code needs --to hf: a GGUF file holds no code.")
        elif self.quantize != "f16":
            raise ValueError(f"--quantize {self.quantize} needs --to gguf. With --to hf, choose a --dtype instead.")
