"""One training run over many processes: FSDP2 shards, and what all processes must agree on.

Started by torchrun or `accelerate launch`; a single process needs none of it and gets its values back unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from flextron.distillation import Distiller
from flextron.families import family_of


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(module, FSDPModule)


def shard(distiller: Distiller, dtype: torch.dtype) -> None:
    """Shard student and teacher, layer by layer, over all processes, in place (PyTorch's `fully_shard`).

    Weights stay fp32 in the shards; they are gathered and computed with in `dtype`, gradients are summed in fp32.
    """
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    if distiller.teacher is not None:
        _shard_layers(distiller.teacher.lm, options)
        fully_shard(distiller.teacher, reshard_after_forward=False, **options)  # its output projection is read later
    _shard_layers(distiller.student, options)
    fully_shard(distiller, **options)


def _shard_layers(lm: Any, options: dict[str, Any]) -> None:
    for layer in lm.get_submodule(family_of(lm.config.model_type).layers).children():
        fully_shard(layer, **options)


def whole_weights(lm: nn.Module) -> Mapping[str, torch.Tensor]:
    """All weights by name, gathered to the CPU of the first process (the others get nothing)."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(Mapping[str, torch.Tensor], get_model_state_dict(lm, options=options))


def from_first(value: Any) -> Any:
    """The first process's `value`, in all of them."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `values`."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
