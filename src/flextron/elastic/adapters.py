"""LoRA adapters on the elastic projections, through PEFT: elastic training in little memory.

Hu et al., LoRA (ICLR 2022, arXiv 2106.09685), section 4.1: W x + (alpha / R) B A x, where W stays fixed.
Ours: a unit owns the same rows of B, or columns of A, as it owns in W. So a sub-network uses only its units' part of
the adapter, W + (alpha / R) B A is nested like W, and a merged model can be saved as a plain checkpoint.

Shapes: R rank, A [R, in], B [out, R].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flextron.elastic.model import ElasticModel, projections_of
from flextron.elastic.pack import LowRank
from flextron.elastic.projections import Projection, make_elastic
from flextron.errors import FlextronError

_ADAPTER = "default"  # the name that PEFT gives to a model's only adapter


def add_adapters(model: ElasticModel, *, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Freeze all weights and add a low-rank adapter to every elastic projection. The adapter is nested like it.

    The model still computes the same, because B is zero. Beside weights of 16 bits, adapters are float32 as in PEFT's
    `get_peft_model`, so that small updates are not rounded away. A model without weights gets adapters without weights;
    `draw_adapters` fills them.

    Call `merge_adapters` before you save, rank or export the model.

    Args:
        rank: R. An adapter adds R * (in + out) weights to a projection.
        alpha: scales the adapters' output by alpha / R. The default is R, a scale of 1, as in PEFT.
        seed: of the random numbers in A.

    Raises:
        ValueError: `rank` is below 1, or `alpha` is not a positive number.
        FlextronError: PEFT is not installed, or the model already has adapters.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1, the smallest that an adapter can have. Try 16.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha} is not a positive number. Leave it out for {rank}, a scale of 1.")
    _add(model, dict.fromkeys(projections_of(model), rank), scale=1 if alpha is None else alpha / rank)
    if not model.is_empty:
        draw_adapters(model, seed)


@torch.no_grad()
def adapters_from(model: ElasticModel, changes: Mapping[str, LowRank]) -> None:
    """Freeze all weights and turn a pack's changes, which they hold, into adapters: those can be trained further.

    The model still computes the same, up to the order of sums. Without its adapters it is the ranked base, up to
    rounding in the weights' type. Afterwards the changes have the ranks that they had, so a pack of the same size holds
    the trained model.

    Args:
        model: made by base and pack.
        changes: of the pack.

    Raises:
        FlextronError: PEFT is not installed, the model already has adapters, or the pack changes nothing.
    """
    if not changes:
        raise FlextronError("this pack changes no weights, so there is nothing to train in it. Train new adapters.")
    weights = {name: projection.matrix() for name, projection in projections_of(model).items()}
    _add(model, {name: len(change.scales) for name, change in changes.items()}, scale=1)
    for name, adapter in _adapters(model).items():
        weights[name].sub_(changes[name].matrix().to(weights[name]))
        for matrix, values in zip(_matrices(adapter), changes[name].factors(), strict=True):
            matrix.weight.copy_(values)


def _add(model: ElasticModel, ranks: Mapping[str, int], *, scale: float) -> None:
    """Freeze all weights and wrap the projections named in an adapter of so high a rank, with any values."""
    if hasattr(model.lm, "peft_config"):
        raise FlextronError("this model has adapters already. Call merge_adapters first, or load the model again.")
    trainable = frozenset(name for name, parameter in model.lm.named_parameters() if parameter.requires_grad)
    projections = projections_of(model)
    closing = {id(sub.closes) for _, _, sub in model.sub_layers()}
    _inject(model, ranks, scale=scale)
    for name in ranks:
        projection = projections[name]
        _nest(model.lm.get_submodule(name), projection, opens=id(projection) not in closing)
    model.lm._trainable_without_adapters = trainable


@torch.no_grad()
def draw_adapters(model: ElasticModel, seed: int) -> None:
    """Set A to random numbers and B to zero, as PEFT does (Hu et al., section 4.1): then nothing has changed yet.

    A is drawn on the CPU and in the order of the projections, so that processes that hold shards of it draw the same.
    """
    generator = torch.Generator().manual_seed(seed)
    for adapter in _adapters(model).values():
        a, b = (matrix.weight for matrix in _matrices(adapter))
        drawn = nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=generator)
        if isinstance(a, DTensor):
            a.copy_(distribute_tensor(drawn.to(a.device), a.device_mesh, a.placements, src_data_rank=None))
        else:
            a.copy_(drawn)
        b.zero_()


def is_of_adapter(name: str) -> bool:
    """Whether a parameter, by its name in a model with adapters, is one of theirs."""
    return ".lora_" in name


def name_below(name: str) -> str:
    """The name that a parameter has without the adapters."""
    return name.replace(".base_layer.", ".")


@contextmanager
def without_adapters(model: ElasticModel) -> Iterator[None]:
    """Run the original model inside the block, at any width. So a teacher needs no second copy of the weights.

    The block may stand between a forward pass with adapters and its `backward`, but must not contain the `backward`:
    inside the block, adapters get no gradient.

    Raises:
        FlextronError: the model has no adapters.
    """
    adapters = list(_adapters(model).values())
    were_on = not adapters[0].disable_adapters
    try:
        _enable(adapters, False)
        yield
    finally:
        _enable(adapters, were_on)


@torch.no_grad()
def merge_adapters(model: ElasticModel) -> None:
    """Add (alpha / R) B A to every elastic weight in place and remove the adapters.

    Modules, Parameters, their names and their `requires_grad` are then as before `add_adapters`. The model computes the
    same as with adapters, up to the order of sums (1e-5 in float32) and rounding to the weights' dtype.

    Raises:
        FlextronError: the model has no adapters, or an adapter is not finite. Then nothing is merged.
    """
    adapters = _adapters(model)
    for name, adapter in adapters.items():
        if not all(matrix.weight.isfinite().all() for matrix in _matrices(adapter)):
            raise FlextronError(
                f"the adapter of {name} holds values that are not finite, so nothing was merged. "
                "Load the model again and train at a lower learning rate."
            )
    for name, adapter in adapters.items():
        adapter.merge()
        model.lm.set_submodule(name, adapter.get_base_layer())
    for name, parameter in model.lm.named_parameters():
        parameter.requires_grad_(name in model.lm._trainable_without_adapters)
    del model.lm.peft_config, model.lm._trainable_without_adapters


def _inject(model: ElasticModel, ranks: Mapping[str, int], *, scale: float) -> None:
    try:
        import peft
    except ImportError as error:
        raise FlextronError(f'adapters need PEFT ({error}). Install it: pip install "flextron[lora]"') from None
    config = peft.LoraConfig(
        rank_pattern=dict(ranks),
        alpha_pattern={name: cast(int, scale * rank) for name, rank in ranks.items()},  # a fraction works too
        lora_dropout=0.0,
        target_modules=list(ranks),
        fan_in_fan_out=model.layers[0].attention.closes.transposed,
    )
    peft.inject_adapter_in_model(config, model.lm, adapter_name=_ADAPTER)


def _nest(adapter: Any, projection: Projection, *, opens: bool) -> None:
    """Make the adapter elastic: each unit of `projection` owns its rows of B or its columns of A."""
    for matrix in _matrices(adapter):
        matrix.to(torch.promote_types(matrix.weight.dtype, torch.float32))
    closing, opening = _matrices(adapter)
    make_elastic(opening if opens else closing, projection.width, opens=opens, stacked=projection.stacked)


def _matrices(adapter: Any) -> tuple[Any, Any]:
    """A and B of a LoRA layer of PEFT, as Linears."""
    return adapter.lora_A[_ADAPTER], adapter.lora_B[_ADAPTER]


def _adapters(model: ElasticModel) -> dict[str, Any]:
    """The LoRA layers of PEFT, by the name of the projection that each wraps."""
    if not hasattr(model.lm, "_trainable_without_adapters"):
        raise FlextronError("this model has no adapters. Call add_adapters first.")
    modules = {name: model.lm.get_submodule(name) for name in projections_of(model)}
    return {name: module for name, module in modules.items() if hasattr(module, "lora_A")}


def _enable(adapters: list[Any], enabled: bool) -> None:
    for adapter in adapters:
        adapter.enable_adapters(enabled)
