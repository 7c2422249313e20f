"""What `flextron train` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from flextron.config.fields import (
    ModelArgument,
    OutArgument,
    check_at_least,
    check_between,
)


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
        check_at_least("block_tokens", self.block_tokens, 2)
        check_at_least("tokens", self.tokens, self.block_tokens)
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
    """How far random sub-networks stray from the greedy choice for their share, or with --router from its answer to their budget; 0 is that choice itself."""
    router: str | None = None
    """Metric of a router of MODEL, such as tpot or ttft: random sub-networks are then what it samples for budgets over its range, and it serves the trained weights. The last stage of the method: weights and router together."""
    retrain_router: bool = False
    """With --router, train it on afterwards, which moves its answers away from those that were trained; without, it is kept as it is."""
    per_token: bool = False
    """With --router, random sub-networks differ from token to token, by the token router of MODEL, which is trained anew afterwards too."""
    visits_per_step: int = 2
    """Sub-networks whose gradients are averaged in one step, each on blocks of its own."""
    blocks_per_visit: int = 1
    """Blocks that one visit trains on, over all processes together."""

    def __post_init__(self) -> None:
        check_at_least("visits_per_step", self.visits_per_step, 1)
        check_at_least("blocks_per_visit", self.blocks_per_visit, 1)
        check_at_least("spread", self.spread, 0)
        if self.per_token and self.router is None:
            raise ValueError("--per-token needs the metric of a token router of MODEL, such as --router ttft.")
        if self.retrain_router and self.router is None:
            raise ValueError("--retrain-router needs the metric of a router of MODEL, such as --router ttft.")
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
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_least("lora_rank", self.lora_rank, 0)
        check_between("warmup", self.warmup, 0, 1)
        check_between("text_weight", self.text_weight, 0, 1)


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
        check_at_least("evaluations", self.evaluations, 1)
        check_at_least("keep_last", self.keep_last, 1)
        check_at_least("save_minutes", self.save_minutes, 0)
        check_at_least("evaluate_tokens", self.evaluate_tokens, 0)


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
        check_at_least("seed", self.seed, 0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all visits of a step train on together."""
        return self.visit.visits_per_step * self.visit.blocks_per_visit * self.text.block_tokens

    @property
    def steps(self) -> int:
        """Steps of the run: as many as it takes to train on all tokens."""
        return -(-self.text.tokens // self.tokens_per_step)
