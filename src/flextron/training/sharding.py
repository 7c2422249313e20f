"""One training run over many processes: FSDP2 shards, and what all processes must agree on.

Started by torchrun or `accelerate launch`; a single process needs none of it and gets its values back unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from flextron.config import TrainConfig
from flextron.elastic.families import family_of
from flextron.errors import FlextronError
from flextron.training.distillation import Distiller

T = TypeVar("T")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """What tells processes and trackers; in a run started by torchrun it joins the processes.

    Raises:
        FlextronError: a tracker that is not installed.
        ValueError: one that accelerate does not know.
    """
    asked = config.watch.log_with
    found = {tracker.value for tracker in get_available_trackers()}
    for name in asked:
        if name in LOGGER_TYPE_TO_CLASS and name not in found:
            raise FlextronError(f"the tracker {name} is not installed. Run: pip install {name}")
    return Accelerator(
        cpu=config.device == "cpu",
        log_with=list(asked) or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # one process reads or writes for all
    )


def device_of(config: TrainConfig, accelerator: Accelerator) -> Any:
    """Where this process runs: as asked, but each of many processes on its own device."""
    return accelerator.device if config.device == "auto" or accelerator.num_processes > 1 else config.device


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(module, FSDPModule)


def shard(distiller: Distiller, dtype: torch.dtype) -> None:
    """Shard student and teacher, layer by layer, over all processes, in place (PyTorch's `fully_shard`).

    Weights stay fp32 in the shards; they are gathered and computed with in `dtype`, gradients are summed in fp32.
    """
    device = next(distiller.parameters()).device.type
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    if distiller.teacher is not None:
        _shard_layers(distiller.teacher.lm, options)
        fully_shard(distiller.teacher, reshard_after_forward=False, **options)  # its output projection is read later
    _shard_layers(distiller.student, options)
    fully_shard(distiller, **options)


def _shard_layers(lm: Any, options: dict[str, Any]) -> None:
    for layer in lm.get_submodule(family_of(lm.config.model_type).layers).children():
        fully_shard(layer, **options)


def whole_weights(lm: nn.Module) -> dict[str, torch.Tensor]:
    """All weights by name, a tied one once, gathered to the CPU of the first process (the others get nothing)."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, torch.Tensor], get_model_state_dict(lm, options=options))
    once = {name for name, _ in chain(lm.named_parameters(), lm.named_buffers())}
    return {name: weight for name, weight in weights.items() if name in once}


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them; it runs there only, and its error is raised in all.

    Raises:
        FlextronError, ValueError, OSError: what `work` raised.
    """
    if not dist.is_initialized():
        return work()
    held: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = work()
        except (FlextronError, ValueError, OSError) as error:
            held[1] = error
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise held[1]
    return cast(T, held[0])


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `values`."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
