"""What a training run needs and does, from the model's config alone: the dry run of `flextron train`.

Shapes: T tokens of a block, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flextron.choosing.choice import choose
from flextron.config import TrainConfig
from flextron.elastic import checkpoint, per_layer
from flextron.elastic.families import family_of
from flextron.elastic.loss import CHUNK_TOKENS, CHUNK_TOKENS_OF_A_GPU
from flextron.elastic.model import ElasticLayer, ElasticModel
from flextron.elastic.projections import Projection
from flextron.environment import arithmetic_dtype, default_device, dtype_name
from flextron.errors import CheckpointError
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import Subnet
from flextron.training.distillation import check_teacher
from flextron.training.sampling import SubnetSampler, even_sensitivity, make_sampler

GPU_BYTES = 80 * 10**9
"""Memory of a large GPU: what needs more gets a warning."""
SAMPLED_VISITS = 100
"""Visits at the start of a run that stand for all of it."""
_FP32 = 4


@dataclass(frozen=True)
class TrainEstimate:
    """What `flextron train` would need and do with `config`; memory is that of one process, with the full model."""

    config: TrainConfig
    processes: int
    arithmetic: torch.dtype
    parameters: int
    trained_parameters: int
    steps: int
    tokens_per_step: int
    memory: dict[str, int]
    """Bytes by part. Weights, gradients, optimizer states and teacher are exact; the others are rough estimates."""
    loading_bytes: int
    """Weights and teacher before they are sharded: every process loads them whole."""
    visit_compute: float
    """Mean compute of a visited sub-network, as a part of the full model's (see `training_flops`)."""
    step_compute: float
    """Compute of a step, teacher included, as a part of plain full fine-tuning's on as many tokens."""
    positions: int | None
    """Longest text that the model was made for, if its config tells."""

    @property
    def tokens(self) -> int:
        """Tokens to train on, up to the end of the last step."""
        return self.steps * self.tokens_per_step

    @property
    def total_bytes(self) -> int:
        """Memory of one process."""
        return sum(self.memory.values())

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint on disk: trained weights and their two moments."""
        return 3 * _FP32 * self.trained_parameters

    @property
    def warnings(self) -> list[str]:
        """What would go wrong, or may."""
        return list(_warnings(self))

    def __str__(self) -> str:
        visit, text = self.config.visit, self.config.text
        processes = "one process" if self.processes == 1 else f"each of {self.processes} processes"
        taught = "" if self.config.optimizer.text_weight == 1 else ", teacher included"
        lines = [
            f"{self.config.model}",
            f"weights  {self.parameters / 1e6:,.1f} M, trained {self.trained_parameters / 1e6:,.1f} M",
            f"steps    {self.steps:,} of {visit.visits_per_step} visits x {visit.blocks_per_visit} blocks x "
            f"{text.block_tokens} tokens: {self.tokens_per_step:,} tokens a step, {self.tokens:,} in all",
            f"compute  a visit {self.visit_compute:.0%} of the full model's; "
            f"a step {self.step_compute:.0%} of plain fine-tuning's{taught}",
            f"memory   of {processes}, arithmetic in {dtype_name(self.arithmetic)}",
            *(f"  {part:<34}{_gigabytes(size)}" for part, size in self.memory.items() if size),
            f"  {'total, about':<34}{_gigabytes(self.total_bytes)}",
        ]
        if self.processes > 1:
            lines.append(f"  {'while loading, before sharding':<34}{_gigabytes(self.loading_bytes)}")
        most = self.config.watch.keep_last + 1  # the oldest is deleted after the newest is written
        lines.append(f"disk     up to {most} checkpoints of {_gigabytes(self.checkpoint_bytes).strip()}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def estimate_training(config: TrainConfig, *, processes: int = 1) -> TrainEstimate:
    """What a run of `config` needs on each of `processes` processes; reads the model's config, makes no weights.

    Raises:
        CheckpointError: no such model, or a config that cannot be read.
        UnknownFamilyError: the architecture has no spec.
        SubnetError: a sub-network to train or to watch that the model does not have.
        FlextronError: a teacher with another vocabulary.
        ValueError: blocks that cannot be shared evenly, or visits that do not fit.
    """
    check_processes(config.visit.blocks_per_visit, processes)
    model = _without_weights(config.model)
    sampler = _checked_sampler(model, config)
    teacher = _teacher(model, config)
    arithmetic = arithmetic_dtype(config.optimizer.precision, default_device())
    visits = (sampler.next().subnet for _ in range(config.steps * config.visit.visits_per_step))
    visit_compute, step_compute = _compute(model, teacher or model, list(islice(visits, SAMPLED_VISITS)), config)
    return TrainEstimate(
        config=config,
        processes=processes,
        arithmetic=arithmetic,
        parameters=_parameters(model),
        trained_parameters=_trained_parameters(model, config),
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        memory=_memory(model, teacher, config, arithmetic, processes),
        loading_bytes=_weights(model, config) + _teacher_weights(teacher, arithmetic),
        visit_compute=visit_compute,
        step_compute=step_compute,
        positions=getattr(model.config, "max_position_embeddings", None),
    )


def check_processes(blocks_per_visit: int, processes: int) -> None:
    """Pass if every process gets as many blocks of a visit as any other.

    Raises:
        ValueError: it does not.
    """
    if processes < 1:
        raise ValueError(f"got {processes} processes; there must be at least 1.")
    if blocks_per_visit % processes:
        more = math.ceil(blocks_per_visit / processes) * processes
        raise ValueError(
            f"blocks_per_visit is {blocks_per_visit}, which {processes} processes cannot share evenly; "
            f"pass --blocks-per-visit {more}, or another multiple of {processes}."
        )


def training_flops(model: ElasticModel, subnet: Subnet, *, teacher: bool, adapters: bool = False) -> int:
    """Floating-point operations to train `subnet` on one token, two for each weight that a matrix product reads.

    A layer's weights take part in three products (forward, and backward to inputs and to weights), with `adapters` in
    two; the frozen output projection in two; a teacher's weights, of full width, in one. With the full model and no
    teacher this is plain full fine-tuning. Left out: attention scores, adapters themselves, norms, the gradient of
    trained embeddings, and what gradient checkpointing computes again.
    """
    student = (4 if adapters else 6) * model.layer_weights(subnet) + 4 * _head(model)
    return student + (_forward_flops(model) if teacher else 0)


def _forward_flops(model: ElasticModel) -> int:
    return 2 * (model.layer_weights(model.search_space.full) + _head(model))


def _without_weights(path: str) -> ElasticModel:
    """The elastic model on the meta device: sizes only."""
    per_layer.register()
    source, gguf = checkpoint.source_of(path)
    try:
        config = AutoConfig.from_pretrained(source, **gguf)
    except Exception as error:  # what a damaged file makes transformers raise has no common type
        raise CheckpointError(f"cannot read the config of {path}: {checkpoint.first_line(error)}") from error
    family_of(config.model_type)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        search_space = None if gguf else checkpoint.load_metadata(source, {})[0]
        return ElasticModel(lm, search_space=search_space)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make {path} elastic: {error}") from error


def _checked_sampler(model: ElasticModel, config: TrainConfig) -> SubnetSampler:
    """The sampler of the run, once all sub-networks that the run names are seen to exist."""
    measured = Sensitivity.load(config.model) if Sensitivity.is_in(config.model) else None
    for wish in config.watch.evaluate_on:
        choose(model, wish, sensitivity=measured or even_sensitivity(model))
    return make_sampler(model, config.visit, measured, seed=config.seed)


def _teacher(model: ElasticModel, config: TrainConfig) -> ElasticModel | None:
    """The model that is kept beside the student; with adapters the student's own frozen weights teach."""
    options = config.optimizer
    teaches_itself = options.lora_rank > 0 and options.teacher is None
    if options.text_weight == 1 or teaches_itself:
        return None
    if options.teacher is None:
        return model
    teacher = _without_weights(options.teacher)
    check_teacher(teacher.config, model.config, options.teacher)
    return teacher


def _compute(
    model: ElasticModel, teacher: ElasticModel, subnets: list[Subnet], config: TrainConfig
) -> tuple[float, float]:
    """Mean compute of the visits as a part of the full model's, and of a step as a part of plain fine-tuning's."""
    full, adapters = model.search_space.full, config.optimizer.lora_rank > 0
    visits = [training_flops(model, subnet, teacher=False, adapters=adapters) for subnet in subnets]
    visit = sum(visits) / len(visits)
    taught = _forward_flops(teacher) if config.optimizer.text_weight < 1 else 0
    return (
        visit / training_flops(model, full, teacher=False, adapters=adapters),
        (visit + taught) / training_flops(model, full, teacher=False),
    )


def _memory(
    model: ElasticModel, teacher: ElasticModel | None, config: TrainConfig, arithmetic: torch.dtype, processes: int
) -> dict[str, int]:
    """Bytes by part in one process; FSDP shards the first four."""
    trained = _FP32 * _trained_parameters(model, config)
    return {
        "weights": _weights(model, config) // processes,
        "gradients (fp32)": trained // processes,
        "optimizer states (2 x fp32)": 2 * trained // processes,
        "teacher": _teacher_weights(teacher, arithmetic) // processes,
        "copies for the arithmetic, about": _copies(model, teacher, arithmetic, processes),
        "activations, about": _activations(model, config, arithmetic, processes),
        "logits and loss, about": _loss(model, config, processes),
    }


def _weights(model: ElasticModel, config: TrainConfig) -> int:
    """Bytes of the student: fp32, but beside adapters weights keep the checkpoint's type."""
    adapters = _FP32 * _adapters(model, config.optimizer.lora_rank)
    dtype = model.config.dtype if config.optimizer.lora_rank else None
    return _parameters(model) * (_FP32 if dtype is None else dtype.itemsize) + adapters


def _teacher_weights(teacher: ElasticModel | None, arithmetic: torch.dtype) -> int:
    return 0 if teacher is None else arithmetic.itemsize * _parameters(teacher)


def _parameters(model: ElasticModel) -> int:
    return sum(p.numel() for p in model.lm.parameters())


def _head(model: ElasticModel) -> int:
    head: int = model.lm.get_output_embeddings().weight.numel()
    return head


def _embeddings(model: ElasticModel) -> int:
    """Parameters of the embeddings and the output projection, which may be the same."""
    modules = (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def _adapters(model: ElasticModel, rank: int) -> int:
    return sum(rank * sum(projection.matrix().shape) for projection in _projections(model))


def _trained_parameters(model: ElasticModel, config: TrainConfig) -> int:
    """All but embeddings and output projection, or adapters only; with `train_embeddings` those too."""
    embeddings = _embeddings(model)
    rank = config.optimizer.lora_rank
    layers = _adapters(model, rank) if rank else _parameters(model) - embeddings
    return layers + (embeddings if config.optimizer.train_embeddings else 0)


def _projections(model: ElasticModel) -> Iterator[Projection]:
    for _, _, sub in model.sub_layers():
        yield from (*sub.opens, sub.closes)


def _copies(model: ElasticModel, teacher: ElasticModel | None, arithmetic: torch.dtype, processes: int) -> int:
    """Weights in the type of the arithmetic, beside the fp32 ones.

    In one process autocast keeps those of all projections until the backward pass. With FSDP it is two layers, the next
    one being gathered meanwhile, one layer's gradients in that type and in fp32, and what is outside the layers:
    embeddings and output projection stay gathered, the teacher's too.
    """
    if processes == 1:
        mixed = arithmetic != torch.float32
        return arithmetic.itemsize * sum(p.weight.numel() for p in _projections(model)) if mixed else 0
    outside = sum(_embeddings(each) for each in (model, teacher) if each is not None)
    layer = max(sum(p.numel() for p in layer.module.parameters()) for layer in model.layers)
    return arithmetic.itemsize * outside + (3 * arithmetic.itemsize + _FP32) * layer


def _activations(model: ElasticModel, config: TrainConfig, arithmetic: torch.dtype, processes: int) -> int:
    """What the forward pass of one visit keeps for the backward pass.

    With gradient checkpointing that is each layer's input, and all of one layer.
    """
    tokens = config.visit.blocks_per_visit // processes * config.text.block_tokens
    casts = processes == 1 and arithmetic != torch.float32
    sizes = [
        _activations_of_layer(model, layer, arithmetic, block_tokens=config.text.block_tokens, casts=casts)
        for layer in model.layers
    ]
    if not config.optimizer.gradient_checkpointing:
        return tokens * sum(sizes)
    stream: int = (_FP32 if casts else arithmetic.itemsize) * model.config.hidden_size
    return tokens * (stream * len(sizes) + max(sizes))


def _activations_of_layer(
    model: ElasticModel, layer: ElasticLayer, arithmetic: torch.dtype, *, block_tokens: int, casts: bool
) -> int:
    """Bytes per token of what a layer's forward pass keeps, by what transformers' code does today.

    Norms (whose weights are the vectors of that name) keep their input and the normalised one in fp32. What the MLP's
    projections open is kept before and after the activation. Attention keeps Q, K and V, by query head, its output, and
    a row of the mask that separates documents; where it is not fused, all heads' scores three times. Projections keep
    their input: one for each half of the layer, or with `casts` (autocast) one for each opening projection.
    """
    hidden: int = model.config.hidden_size
    fused = model.config._attn_implementation != "eager"
    values: int = (
        2 * sum(opening.matrix().shape[0] for opening in layer.mlp.opens)
        + 4 * layer.attention.closing_size
        + block_tokens * (1 if fused else 3 * model.config.num_attention_heads)
        + hidden * (sum(len(sub.opens) for sub in layer.subs.values()) if casts else 2)
    )
    norms = [p for name, p in layer.module.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    normed = sum(hidden if norm.numel() == hidden else layer.attention.closing_size for norm in norms)
    return arithmetic.itemsize * values + 2 * _FP32 * normed


def _loss(model: ElasticModel, config: TrainConfig, processes: int) -> int:
    """What the loss holds at once.

    One chunk's logits eight times in fp32 (student's and teacher's, their logarithms, products and gradients), the last
    hidden states of all tokens, their gradients and the teacher's, and the output projection's gradient, if trained.
    Many processes are taken to run on GPUs, whose chunks are larger.
    """
    tokens = config.visit.blocks_per_visit // processes * config.text.block_tokens
    on_gpu = processes > 1 or torch.cuda.is_available()
    chunk_tokens = min(CHUNK_TOKENS_OF_A_GPU if on_gpu else CHUNK_TOKENS, tokens)
    chunk = 8 * _FP32 * chunk_tokens * model.config.vocab_size
    gradient = 2 * _FP32 * _head(model) if config.optimizer.train_embeddings else 0
    hidden: int = 3 * _FP32 * tokens * model.config.hidden_size
    return int(chunk + hidden + gradient)


def _warnings(estimate: TrainEstimate) -> Iterator[str]:
    options, block = estimate.config.optimizer, estimate.config.text.block_tokens
    most = f"the {GPU_BYTES / 1e9:.0f} GB of a large GPU"
    if estimate.total_bytes > GPU_BYTES:
        checkpointing = "" if options.gradient_checkpointing else "--gradient-checkpointing, "
        adapters = "" if options.lora_rank else "--lora-rank 16, "
        yield (
            f"one process needs about {_gigabytes(estimate.total_bytes).strip()}, more than {most}. "
            f"Pass {checkpointing}{adapters}fewer --blocks-per-visit, or start more processes."
        )
    if estimate.processes > 1 and estimate.loading_bytes > GPU_BYTES:
        yield f"loading takes {_gigabytes(estimate.loading_bytes).strip()} in every process, more than {most}."
    if estimate.positions is not None and block > estimate.positions:
        yield f"blocks of {block} tokens are longer than the {estimate.positions} that the model was made for."


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:8.2f} GB"
