"""LoRA on the elastic projections through PEFT, nested along the same prefixes: elastic training in little memory.

Hu et al., LoRA (ICLR 2022, arXiv 2106.09685), section 4.1: W x + (alpha / R) B A x, where W stays as it is.
Ours: units own the rows of B, or the columns of A, that they own in W. A sub-network then uses its own units' part of
the adapter, and W + (alpha / R) B A is nested as W is, so that a merged model is saved as a plain checkpoint.

Shapes: R rank, A [R, in], B [out, R].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection, make_elastic
from flextron.errors import FlextronError

_ADAPTER = "default"  # the name that PEFT gives to a model's only adapter


def add_adapters(model: ElasticModel, *, rank: int, alpha: float | None = None) -> None:
    """Freeze all weights and add a low-rank adapter to every elastic projection, nested as the projection is.

    The function of the model stays the same: B is zero. A is drawn from torch's global generator, on the CPU and layer
    by layer: call `torch.manual_seed` before, for the same adapters every time. Adapters are float32 beside weights of
    16 bits, as in PEFT's `get_peft_model`, so that small updates are not rounded away.

    While adapters are on, do not save, rank or export the model: call `merge_adapters` first.

    Args:
        rank: R. An adapter adds R * (in + out) weights to a projection.
        alpha: the adapters' output is scaled by alpha / R; by default R, a scale of 1, as in PEFT's own defaults.

    Raises:
        ValueError: a rank below 1, or an alpha that is not a positive number.
        FlextronError: PEFT is not installed, or the model has adapters.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1, the smallest that an adapter can have. Try 16.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha} is not a positive number. Leave it out for {rank}, a scale of 1.")
    if hasattr(model.lm, "peft_config"):
        raise FlextronError("this model has adapters already. Call merge_adapters first, or load the model again.")
    trainable = frozenset(name for name, parameter in model.lm.named_parameters() if parameter.requires_grad)
    projections = list(_projections(model))
    _inject(model, [name for name, _, _ in projections], rank=rank, alpha=rank if alpha is None else alpha)
    for name, projection, opens in projections:
        _nest(model.lm.get_submodule(name), projection, opens=opens)
    model.lm._trainable_without_adapters = trainable


@contextmanager
def without_adapters(model: ElasticModel) -> Iterator[None]:
    """Run the original model inside the block, at any width: a teacher that needs no second copy of the weights.

    The block may stand between a forward pass with adapters and its `backward`, but not around the `backward`: inside,
    adapters take no gradient.

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

    Modules, Parameters, their names and which of them are trainable are as before `add_adapters`. The function stays
    that of the model with adapters, up to the order of sums (1e-5 in float32) and rounding to the weights' own type.

    Raises:
        FlextronError: the model has no adapters, or one is not finite; then nothing is merged.
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


def _inject(model: ElasticModel, names: list[str], *, rank: int, alpha: float) -> None:
    try:
        import peft
    except ImportError as error:
        raise FlextronError(f'adapters need PEFT ({error}). Install it: pip install "flextron[lora]"') from None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # a fraction works too
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=model.layers[0].mlp.closes.transposed,
    )
    peft.inject_adapter_in_model(config, model.lm, adapter_name=_ADAPTER)


def _nest(adapter: Any, projection: Projection, *, opens: bool) -> None:
    """Give the units of `projection` their rows of B or their columns of A."""
    for matrix in _matrices(adapter):
        matrix.to(torch.promote_types(matrix.weight.dtype, torch.float32))
    closing, opening = _matrices(adapter)
    make_elastic(opening if opens else closing, projection.width, opens=opens, stacked=projection.stacked)


def _matrices(adapter: Any) -> tuple[Any, Any]:
    """A and B of one of PEFT's LoRA layers, as Linears."""
    return adapter.lora_A[_ADAPTER], adapter.lora_B[_ADAPTER]


def _projections(model: ElasticModel) -> Iterator[tuple[str, Projection, bool]]:
    """Name inside the transformers model of every elastic projection, the projection, and whether it opens."""
    for layer, _, sub in model.sub_layers():
        where = f"{model.family.layers}.{layer}"
        for path, projection in zip(sub.axis.opens, sub.opens, strict=True):
            yield f"{where}.{path}", projection, True
        yield f"{where}.{sub.axis.closes}", sub.closes, False


def _adapters(model: ElasticModel) -> dict[str, Any]:
    """PEFT's LoRA layers by the name of the projection that each one wraps."""
    if not hasattr(model.lm, "_trainable_without_adapters"):
        raise FlextronError("this model has no adapters. Call add_adapters first.")
    return {name: model.lm.get_submodule(name) for name, _, _ in _projections(model)}


def _enable(adapters: list[Any], enabled: bool) -> None:
    for adapter in adapters:
        adapter.enable_adapters(enabled)
