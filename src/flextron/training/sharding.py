"""Training in several processes: FSDP2 shards, and values that all processes share.

Start them with torchrun or `accelerate launch`. In a single process, these functions return their values unchanged.
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
    """Return the Accelerator that knows the processes and the trackers; under torchrun it joins the processes.

    Raises:
        FlextronError: a tracker is not installed.
        ValueError: accelerate does not know a tracker.
    """
    trackers = config.watch.log_with
    installed = {tracker.value for tracker in get_available_trackers()}
    for name in trackers:
        if name in LOGGER_TYPE_TO_CLASS and name not in installed:
            raise FlextronError(f"the tracker {name} is not installed. Run: pip install {name}")
    return Accelerator(
        cpu=config.device == "cpu",
        log_with=list(trackers) or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one writes
    )


def device_of(config: TrainConfig, accelerator: Accelerator) -> Any:
    """Return the device of this process: the one in `config`, but with several processes one for each."""
    return accelerator.device if config.device == "auto" or accelerator.num_processes > 1 else config.device


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been applied to this module."""
    return isinstance(module, FSDPModule)


def shard(distiller: Distiller, dtype: torch.dtype) -> None:
    """Shard student and teacher over all processes, layer by layer and in place (PyTorch's `fully_shard`).

    The student's shards stay fp32. Weights are gathered and computed with in `dtype`; gradients are summed in fp32.
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
    """Gather all weights by name, tied ones once, on the CPU of the first process; the others get an empty dict."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, torch.Tensor], get_model_state_dict(lm, options=options))
    once = {name for name, _ in chain(lm.named_parameters(), lm.named_buffers())}
    return {name: weight for name, weight in weights.items() if name in once}


def on_first(work: Callable[[], T]) -> T:
    """Run `work` in the first process only, and return its result in all processes.

    Raises:
        FlextronError, ValueError, OSError: `work` raised it; all processes raise it.
    """
    if not dist.is_initialized():
        return work()
    shared: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            shared[0] = work()
        except (FlextronError, ValueError, OSError) as error:
            shared[1] = error
    dist.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise shared[1]
    return cast(T, shared[0])


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all processes, in place, and return the sum."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
