"""Estimate the memory and compute of a training run from the model's config: the dry run of `flextron train`.

Shapes: T tokens per block, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from flextron.choosing.choice import choose
from flextron.config import TrainConfig
from flextron.elastic import checkpoint
from flextron.elastic.layers import ElasticLayer, SubLayer
from flextron.elastic.loss import CHUNK_TOKENS, CHUNK_TOKENS_OF_A_GPU
from flextron.elastic.model import ElasticModel, projections_of
from flextron.elastic.pack import changes_of
from flextron.elastic.skeleton import in_shards, is_pack, skeleton
from flextron.elastic.source import source_of
from flextron.environment import arithmetic_dtype, default_device, dtype_name
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import Subnet
from flextron.training.distillation import check_teacher
from flextron.training.sampling import SubnetSampler, even_sensitivity, make_sampler

GPU_BYTES = 80 * 10**9
"""Memory of a large GPU; a run that needs more gets a warning."""
SAMPLED_VISITS = 100
"""Number of visits from which the mean compute is estimated."""
_FLOAT = torch.float32
_FP32 = 4


@dataclass(frozen=True)
class TrainEstimate:
    """Memory and compute of `flextron train` with `config`; memory counts one process that visits the full model."""

    config: TrainConfig
    processes: int
    arithmetic: torch.dtype
    parameters: int
    trained_parameters: int
    steps: int
    tokens_per_step: int
    memory: dict[str, int]
    """Bytes by part. Weights, gradients, optimizer states and teacher are exact; the rest are rough estimates."""
    loading_bytes: int
    """Bytes that the first process loads into the host's memory to send shards of them; 0 if each reads its own.

    Of a pack, every process loads them."""
    visit_compute: float
    """Mean compute of a visit, as a fraction of the full model's (see `training_flops`)."""
    step_compute: float
    """Compute of a step, teacher included, as a fraction of plain full fine-tuning on as many tokens."""
    positions: int | None
    """Longest text that the model supports, in tokens, or None if its config does not say."""

    @property
    def tokens(self) -> int:
        """Number of training tokens in all steps."""
        return self.steps * self.tokens_per_step

    @property
    def total_bytes(self) -> int:
        """Bytes of memory that one process needs."""
        return sum(self.memory.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk: the trained weights and their two moments."""
        return 3 * _FP32 * self.trained_parameters

    @property
    def warnings(self) -> list[str]:
        """Problems that the run would have or may have."""
        return list(_warnings(self))

    def __str__(self) -> str:
        visit, text = self.config.visit, self.config.text
        processes = "one process" if self.processes == 1 else f"each of {self.processes} processes"
        taught = "" if self.config.optimizer.text_weight == 1 else ", teacher included"
        lines = [
            f"{self.config.model}",
            f"weights  {self.parameters / 1e6:,.1f} M, trained {self.trained_parameters / 1e6:,.1f} M",
            f"steps    {self.steps:,} of {visit.visits_per_step} visits x {visit.blocks_per_visit} blocks x "
            f"{text.block_tokens} tokens: {self.tokens_per_step:,} tokens per step, {self.tokens:,} in total",
            f"compute  a visit {self.visit_compute:.0%} of the full model's; "
            f"a step {self.step_compute:.0%} of plain fine-tuning's{taught}",
            f"memory   of {processes}, arithmetic in {dtype_name(self.arithmetic)}",
            *(f"  {part:<34}{_gigabytes(size)}" for part, size in self.memory.items() if size),
            f"  {'total, about':<34}{_gigabytes(self.total_bytes)}",
        ]
        if self.processes > 1 and self.loading_bytes:
            where = "in each, while loading" if is_pack(self.config.model) else "first process, while loading"
            lines.append(f"  {where:<34}{_gigabytes(self.loading_bytes)}")
        most = self.config.watch.keep_last + 1  # the oldest is deleted after the newest is written
        lines.append(f"disk     up to {most} checkpoints of {_gigabytes(self.checkpoint_bytes).strip()}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def estimate_training(config: TrainConfig, *, processes: int = 1) -> TrainEstimate:
    """Estimate what a run of `config` needs in each of `processes` processes, from the model's config alone.

    Raises:
        CheckpointError: the model does not exist, or its config cannot be read.
        UnknownFamilyError: the architecture has no spec.
        SubnetError: the model does not have a sub-network to train or to watch.
        FlextronError: the teacher has other tokens.
        ValueError: the processes cannot share a visit's blocks evenly, or the visits are not valid.
    """
    check_processes(config.visit.blocks_per_visit, processes)
    model = skeleton(config.model)
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
        loading_bytes=0 if config.replicate else _loading(model, teacher, config, arithmetic),
        visit_compute=visit_compute,
        step_compute=step_compute,
        positions=getattr(model.config, "max_position_embeddings", None),
    )


def check_processes(blocks_per_visit: int, processes: int) -> None:
    """Check that the processes can share the blocks of a visit evenly.

    Raises:
        ValueError: they cannot, or there are no processes.
    """
    if processes < 1:
        raise ValueError(f"got {processes} processes; pass at least 1.")
    if blocks_per_visit % processes:
        more = math.ceil(blocks_per_visit / processes) * processes
        raise ValueError(
            f"blocks_per_visit is {blocks_per_visit}, which {processes} processes cannot share evenly. "
            f"Pass --blocks-per-visit {more}, or another multiple of {processes}."
        )


def training_flops(model: ElasticModel, subnet: Subnet, *, teacher: bool, adapters: bool = False) -> int:
    """Return the floating-point operations to train `subnet` on one token: two per weight in each matrix product.

    A layer's weights take part in three products: forward, backward to the inputs, and backward to the weights; with
    `adapters`, in two. The frozen output projection takes part in two, and a teacher's weights, at full width, in one.
    The full model without a teacher is plain full fine-tuning. Not counted: attention scores, the adapters themselves,
    norms, the gradient of trained embeddings, and recomputation by gradient checkpointing.
    """
    student = (4 if adapters else 6) * model.layer_weights(subnet) + 4 * _head(model)
    return student + (_forward_flops(model) if teacher else 0)


def _forward_flops(model: ElasticModel) -> int:
    return 2 * (model.layer_weights(model.search_space.full) + _head(model))


def _checked_sampler(model: ElasticModel, config: TrainConfig) -> SubnetSampler:
    """Return the sampler of the run, after checking all sub-networks that the run names."""
    measured = Sensitivity.load(config.model) if Sensitivity.is_in(config.model) else None
    for name in config.watch.evaluate_on:
        choose(model, name, sensitivity=measured or even_sensitivity(model))
    return make_sampler(model, config.visit, measured, seed=config.seed)


def _teacher(model: ElasticModel, config: TrainConfig) -> ElasticModel | None:
    """Return the teacher kept in memory, or None: with adapters, the student's own frozen weights can teach."""
    options = config.optimizer
    teaches_itself = options.adapters and options.teacher is None
    if options.text_weight == 1 or teaches_itself:
        return None
    if options.teacher is None:
        return model
    teacher = skeleton(options.teacher)
    if teacher.config.vocab_size != model.config.vocab_size:
        for each, path in ((teacher, options.teacher), (model, config.model)):
            source, gguf = source_of(path)
            each.tokenizer = checkpoint.load_tokenizer(source, {"trust_remote_code": False, **gguf})
    check_teacher(teacher, model, options.teacher)
    return teacher


def _compute(
    model: ElasticModel, teacher: ElasticModel, subnets: list[Subnet], config: TrainConfig
) -> tuple[float, float]:
    """Return the mean compute of a visit over the full model's, and of a step over plain fine-tuning's."""
    full, adapters = model.search_space.full, config.optimizer.adapters
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
    """Return bytes by part in one process; FSDP shards the first four parts, unless each process keeps them whole."""
    trained = _FP32 * _trained_parameters(model, config)
    shards = 1 if config.replicate else processes
    return {
        "weights": _weights(model, config) // shards,
        "gradients (fp32)": trained // shards,
        "optimizer states (2 x fp32)": 2 * trained // shards,
        "teacher": _teacher_weights(teacher, arithmetic) // shards,
        "copies for the arithmetic, about": _copies(model, teacher, config, arithmetic, shards),
        "activations, about": _activations(model, config, arithmetic, processes, shards),
        "logits and loss, about": _loss(model, config, processes),
    }


def _loading(model: ElasticModel, teacher: ElasticModel | None, config: TrainConfig, arithmetic: torch.dtype) -> int:
    """Return what the first process loads beside its shard: nothing, where files hold weights by the model's names.

    It loads model and teacher one after the other. Of a pack, every process loads all that it trains.
    """
    if is_pack(config.model):
        return _weights(model, config) + _teacher_weights(teacher, arithmetic)
    paths = {config.model: model, **({} if teacher is None else {config.optimizer.teacher or config.model: teacher})}
    whole = [_parameters(each) * each.dtype.itemsize for path, each in paths.items() if not in_shards(path, each.lm)]
    return max(whole, default=0)


def _weights(model: ElasticModel, config: TrainConfig) -> int:
    """Return the bytes of the student and its adapters."""
    adapters = _FP32 * _adapters(model, config)
    return _parameters(model) * _held_in(model, config).itemsize + adapters


def _held_in(model: ElasticModel, config: TrainConfig) -> torch.dtype:
    """Type of the student's weights: that of the checkpoint beside adapters, unless all is computed in float32."""
    adapters = config.optimizer.adapters and arithmetic_dtype(config.optimizer.precision, default_device()) != _FLOAT
    found: torch.dtype | None = model.config.dtype if adapters else None
    return found or _FLOAT


def _teacher_weights(teacher: ElasticModel | None, arithmetic: torch.dtype) -> int:
    return 0 if teacher is None else arithmetic.itemsize * _parameters(teacher)


def _parameters(model: ElasticModel) -> int:
    return sum(p.numel() for p in model.lm.parameters())


def _head(model: ElasticModel) -> int:
    head: int = model.lm.get_output_embeddings().weight.numel()
    return head


def _embeddings(model: ElasticModel) -> int:
    """Return the number of parameters in embeddings and output projection, counted once if tied."""
    modules = (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def _adapters(model: ElasticModel, config: TrainConfig) -> int:
    """Return the number of the adapters' parameters, 0 without adapters."""
    if config.optimizer.train_pack:
        return sum(change.a.numel() + change.b.numel() for change in changes_of(config.model).values())
    rank = config.optimizer.lora_rank
    return sum(rank * sum(projection.matrix().shape) for projection in projections_of(model).values())


def _trained_parameters(model: ElasticModel, config: TrainConfig) -> int:
    """Return the number of trained parameters: the layers and norms, or the adapters; plus embeddings if trained."""
    embeddings = _embeddings(model)
    layers = _adapters(model, config) if config.optimizer.adapters else _parameters(model) - embeddings
    return layers + (embeddings if config.optimizer.train_embeddings else 0)


def _copies(
    model: ElasticModel, teacher: ElasticModel | None, config: TrainConfig, arithmetic: torch.dtype, shards: int
) -> int:
    """Return the bytes of weight copies in the dtype of the arithmetic.

    Without shards, autocast keeps copies of all projections of another type until the backward pass. FSDP keeps two
    layers (it gathers the next one ahead) and the buffer of the one that it gathers, the gradients of one layer's
    trained weights in that dtype and in fp32, and the gathered embeddings and output projections.
    """
    if shards == 1:
        mixed = arithmetic not in (torch.float32, _held_in(model, config))
        return arithmetic.itemsize * sum(p.weight.numel() for p in projections_of(model).values()) if mixed else 0
    outside = sum(_embeddings(each) for each in (model, teacher) if each is not None)
    layer = max(sum(p.numel() for p in layer.module.parameters()) for layer in model.layers)
    adapters = _adapters(model, config) // len(model.layers)
    trained = adapters if config.optimizer.adapters else layer
    return arithmetic.itemsize * (outside + 3 * (layer + adapters) + trained) + _FP32 * trained


def _activations(model: ElasticModel, config: TrainConfig, arithmetic: torch.dtype, processes: int, shards: int) -> int:
    """Return the bytes that the forward pass of one visit keeps for the backward pass.

    With gradient checkpointing, it keeps each layer's input and everything of one layer.
    """
    tokens = config.visit.blocks_per_visit // processes * config.text.block_tokens
    casts = shards == 1 and arithmetic != torch.float32
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
    """Return the bytes per token that a layer's forward pass keeps, according to the current code of transformers.

    - Norms, recognised by their one-dimensional weights, keep their input and the normalised input in fp32.
    - The MLP keeps the outputs of its opening projections before and after the activation.
    - Attention keeps Q, K, V (per query head), its output, and one row of the mask that separates documents. If
      attention is not fused, it keeps the scores of all heads three times.
    - Projections keep their input: one per sub-layer, or with `casts` (autocast) one per opening projection.
    """
    hidden: int = model.config.hidden_size
    fused = model.config._attn_implementation != "eager"
    values: int = (
        2 * _values_of_mlp(model, layer.mlp)
        + 4 * layer.attention.closing_size
        + block_tokens * (1 if fused else 3 * model.config.num_attention_heads)
        + hidden * (sum(len(sub.opens) for sub in layer.subs.values()) if casts else 2)
    )
    norms = [p for name, p in layer.module.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    normed = sum(hidden if norm.numel() == hidden else layer.attention.closing_size for norm in norms)
    return arithmetic.itemsize * values + 2 * _FP32 * normed


def _values_of_mlp(model: ElasticModel, mlp: SubLayer) -> int:
    """Rows of the opening projections, or of all experts that a token is routed to."""
    if mlp.axis.experts:
        return model.least_units * mlp.weights_per_unit // int(model.config.hidden_size)
    return sum(opening.matrix().shape[0] for opening in mlp.opens)


def _loss(model: ElasticModel, config: TrainConfig, processes: int) -> int:
    """Return the bytes that the loss keeps at once.

    These are: one chunk's logits eight times in fp32 (of student and teacher, their logarithms, products and
    gradients); the last hidden states of all tokens, their gradients and the teacher's; and the gradient of the output
    projection, if trained. Several processes are assumed to run on GPUs, where chunks are larger.
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
    limit = f"the {GPU_BYTES / 1e9:.0f} GB of a large GPU"
    if estimate.total_bytes > GPU_BYTES:
        checkpointing = "" if options.gradient_checkpointing else "--gradient-checkpointing, "
        adapters = "" if options.adapters else "--lora-rank 16, "
        yield (
            f"one process needs about {_gigabytes(estimate.total_bytes).strip()}, more than {limit}. "
            f"Pass {checkpointing}{adapters}a lower --blocks-per-visit, or start more processes."
        )
    if estimate.positions is not None and block > estimate.positions:
        yield f"blocks have {block} tokens, but the model supports {estimate.positions}. Pass a lower --block-tokens."


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:8.2f} GB"
