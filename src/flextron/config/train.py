"""The options of `flextron train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from flextron.config.fields import (
    DeviceArgument,
    ModelArgument,
    OptionalPath,
    OptionalText,
    OutArgument,
    check_at_least,
    check_between,
    unset,
)


@dataclass(frozen=True)
class TextOptions:
    """The text to train on."""

    data: tuple[str, ...] = ("sample/train",)
    """Sources of text, each PATH or PATH@WEIGHT, such as web.jsonl.xz@0.8 books/@0.2. PATH is a .txt or .parquet file, a .jsonl file with a "text" field in each line (.jsonl and .txt also as .xz, .gz or .bz2), a folder or glob of such files, datasets:NAME, or a sample that comes with flextron."""
    tokens: int = 200_000
    """Number of tokens to train on. A text that ends is read again in another order."""
    block_tokens: int = 512
    """Tokens in one block. Attention stays inside a document."""
    cache: OptionalPath = None
    """Folder for tokenised text. The default is flextron's folder in your user cache."""

    def __post_init__(self) -> None:
        check_at_least("block_tokens", self.block_tokens, 2)
        check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.data:
            raise ValueError("--data needs at least one source of text, such as --data corpus.jsonl.xz.")


@dataclass(frozen=True)
class VisitOptions:
    """The sub-networks that each step trains."""

    visits: tuple[float, float, float, float] = (1, 1, 0, 2)
    """Relative frequency of the four kinds of sub-network: the full model, the smallest, presets, random ones."""
    smallest: str = "50%"
    """Smallest sub-network to train: a share of the weights, equal widths, or a file, as for `flextron evaluate --subnet`."""
    presets: Annotated[tuple[str, ...], unset("STR [STR ...]")] = ()
    """Sub-networks to train in turn, such as 75% 60%. The third number of --visits must be above 0, such as --visits 1 1 1 2."""
    spread: float = 0.5
    """How much random sub-networks differ from the greedy choice at their share, or with --router from its answer to their budget. 0 takes exactly that choice."""
    router: OptionalText = None
    """Train the sub-networks that a router of MODEL selects: name its metric, such as tpot or ttft. The router answers random budgets of its range, and later serves the trained weights. Use this as the last stage of training."""
    retrain_router: bool = False
    """With --router, also train the router after the weights. Its answers then move away from the sub-networks that were trained. By default the router stays as it is."""
    per_token: bool = False
    """With --router, give every token of a random sub-network its own widths, chosen by the token router of MODEL. That token router is trained anew afterwards."""
    visits_per_step: int = 2
    """Sub-networks in one step, each on its own blocks. Their gradients are averaged."""
    blocks_per_visit: int = 1
    """Blocks for each sub-network of a step, over all processes together."""

    def __post_init__(self) -> None:
        check_at_least("visits_per_step", self.visits_per_step, 1)
        check_at_least("blocks_per_visit", self.blocks_per_visit, 1)
        check_at_least("spread", self.spread, 0)
        if self.per_token and self.router is None:
            raise ValueError("--per-token needs the metric of a token router of MODEL, such as --router ttft.")
        if self.retrain_router and self.router is None:
            raise ValueError("--retrain-router needs the metric of a router of MODEL, such as --router ttft.")
        if min(self.visits) < 0 or sum(self.visits) <= 0:
            raise ValueError(f"--visits must be four weights from 0 up, one of them above 0; got {list(self.visits)}.")


@dataclass(frozen=True)
class OptimizerOptions:
    """How to update the weights."""

    learning_rate: float = 3e-4
    """Highest learning rate of AdamW. The rate rises during the warm-up, then falls linearly to 0."""
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises, 0 to 1."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    text_weight: float = 0.5
    """Share of the loss that is cross-entropy to the text, 0 to 1. The rest is distillation from the teacher. With 1 there is no teacher."""
    teacher: OptionalText = None
    """Model to distil from. It must have the same vocabulary. The default is MODEL as it was before training."""
    train_embeddings: bool = False
    """Also train the token embeddings and the output projection."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of the weights, which saves memory. They are merged into the weights at the end. 0 trains the weights. Needs: pip install "flextron[lora]"."""
    train_pack: bool = False
    """Train the low-rank changes of MODEL, a pack, in place of its weights. `flextron pack` then loses next to nothing of what was learned, and the pack's base is the default teacher. Needs: pip install "flextron[lora]"."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the arithmetic. The trained weights stay in fp32. auto takes the faster of the two here."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them. This is slower and needs far less memory."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate is {self.learning_rate}; it must be above 0.")
        if not self.clip_norm > 0:
            raise ValueError(f"--clip-norm is {self.clip_norm}; it must be above 0.")
        if self.lora_rank and self.train_pack:
            raise ValueError("--train-pack and --lora-rank exclude each other: a pack has its own ranks. Pass one.")
        if self.adapters and self.train_embeddings:
            raise ValueError(
                f"--train-embeddings and --{'train-pack' if self.train_pack else 'lora-rank'} exclude each other: "
                "with adapters, the weights stay as they are."
            )
        if self.teacher is not None and self.text_weight == 1:
            raise ValueError(
                f"--teacher is {self.teacher}, but --text-weight 1 leaves no weight for it. Lower --text-weight."
            )
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_least("lora_rank", self.lora_rank, 0)
        check_between("warmup", self.warmup, 0, 1)
        check_between("text_weight", self.text_weight, 0, 1)

    @property
    def adapters(self) -> bool:
        """Whether low-rank adapters are trained, and the weights stay as they are."""
        return self.train_pack or self.lora_rank > 0


@dataclass(frozen=True)
class WatchOptions:
    """What to measure and save during training."""

    evaluate_on: tuple[str, ...] = ("full", "90%", "75%", "60%", "50%")
    """Sub-networks whose loss on held-out text is measured."""
    evaluate_text: str = "sample/validation"
    """Held-out text, as for `flextron evaluate --text`."""
    evaluate_tokens: int = 4096
    """Number of held-out tokens. 0 measures nothing."""
    evaluations: int = 4
    """How often to measure during training. The last measurement is at the end, and one more comes before the first step."""
    save_minutes: float = 10
    """Minutes between checkpoints. Training resumes from the newest."""
    keep_last: int = 2
    """Number of checkpoints to keep."""
    log_with: Annotated[tuple[str, ...], unset("STR [STR ...]")] = ()
    """Trackers to log to besides metrics.jsonl, by their names in accelerate: tensorboard, wandb, mlflow, ..."""

    def __post_init__(self) -> None:
        check_at_least("evaluations", self.evaluations, 1)
        check_at_least("keep_last", self.keep_last, 1)
        check_at_least("save_minutes", self.save_minutes, 0)
        check_at_least("evaluate_tokens", self.evaluate_tokens, 0)


@dataclass(frozen=True)
class TrainConfig:
    """Train the full model and its sub-networks together, with one set of weights.

    Each step trains a few sub-networks: the full model, the smallest, and random ones in between. They learn from the
    text and from the model as it was before training. If Ctrl-C or a crash stops the run, repeat the same command: it
    resumes from the last checkpoint.

    Example: flextron train out/smollm2-elastic out/smollm2-trained --data corpus.jsonl.xz --tokens 1000000

    Example on 8 GPUs: torchrun --nproc-per-node 8 -m flextron.cli train out/elastic out/trained
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see `flextron rank`), or any checkpoint, hub id or GGUF file."""
    out: OutArgument
    """Folder for the checkpoints, metrics.jsonl, and at the end the trained elastic checkpoint."""
    text: OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    visit: OmitArgPrefixes[VisitOptions] = field(default_factory=VisitOptions)
    optimizer: OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)
    watch: OmitArgPrefixes[WatchOptions] = field(default_factory=WatchOptions)
    resume: Literal["auto", "never"] = "auto"
    """auto resumes from the newest checkpoint in OUT, if there is one. never starts anew and replaces what OUT holds."""
    seed: int = 0
    """Seed for the choice of sub-networks, the order of the text, and new adapters."""
    device: DeviceArgument = "auto"
    replicate: bool = False
    """With several processes, keep the whole model in each, and exchange gradients only. Faster where the model fits. By default each keeps its part of the model."""
    dry_run: bool = False
    """Print the memory, steps and tokens of the run, and train nothing. Reads only the model's config.json. Put WORLD_SIZE=8 before the command to ask about eight processes."""

    def __post_init__(self) -> None:
        check_at_least("seed", self.seed, 0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on, over all its visits."""
        return self.visit.visits_per_step * self.visit.blocks_per_visit * self.text.block_tokens

    @property
    def steps(self) -> int:
        """Steps that it takes to train on all tokens."""
        return -(-self.text.tokens // self.tokens_per_step)
