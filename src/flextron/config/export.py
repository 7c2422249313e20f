"""What `flextron export` is told."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.config.fields import (
    BudgetArgument,
    Dtype,
    Engine,
    ModelArgument,
    NeuronStepArgument,
    OutArgument,
    Quantization,
    check_ending,
    check_one_choice,
)


@dataclass(frozen=True)
class ExportConfig:
    """Write a sub-network as a model of its own, and check it by loading it where it is to run.

    hf: equal widths become a plain checkpoint of the same architecture. Widths that differ from layer to layer become
    one with `per_layer_config`, which AutoModelForCausalLM loads after `import flextron`.
    gguf: one file for llama.cpp and what is built on it.

    Example: flextron export out/smollm2-elastic out/smollm2-60 --subnet 60%
    Example: flextron export out/smollm2-elastic small.gguf --budget 0.6x --to gguf --quantize q8_0
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    out: OutArgument
    """Folder to write, or with --to gguf a file such as small.gguf."""
    subnet: str = "full"
    """Sub-network: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    budget: BudgetArgument = None
    neuron_step: NeuronStepArgument = None
    equal_widths: bool = False
    """Take equal widths in all layers, of at most the cost of that sub-network, or within that budget."""
    to: Engine = "hf"
    """What it is for: hf, transformers; gguf, llama.cpp."""
    quantize: Quantization = "f16"
    """With --to gguf, the type of the weights in the file; k-quants need the extra llamacpp."""
    verify: bool = True
    """Load it again, with --to gguf in llama.cpp (extra llamacpp), and compare with the sub-network; keep it only if both agree."""
    remote_code: bool = False
    """Copy the code of per-layer widths beside the weights, for machines without flextron (loads with trust_remote_code)."""
    overwrite: bool = False
    """Replace what is there if it is an export of the same kind."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to check it, and whose latency table a budget means, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_one_choice(self.subnet, self.budget)
        if self.neuron_step is not None and self.budget is None:
            raise ValueError(f"neuron_step is {self.neuron_step}; it is of --budget, whose answer it rounds.")
        if self.to == "gguf":
            check_ending("out", self.out, (".gguf",))
            if self.remote_code:
                raise ValueError("remote_code is of --to hf; a GGUF file holds no code.")
        elif self.quantize != "f16":
            raise ValueError(f"quantize is {self.quantize}; it is of --to gguf. With --to hf, name a --dtype.")
