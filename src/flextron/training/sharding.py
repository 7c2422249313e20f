"""Training in several processes: FSDP2 shards, how they are filled and saved, and values that all processes share.

Start them with torchrun or `accelerate launch`. In a single process, these functions return their values unchanged.

A large model fits into no single process. So it is built without weights (`elastic.skeleton`), sharded, and then filled
from safetensors, from which each process reads its own shards only. Where the files hold weights under other names, the
first process reads them all and sends the others their shards. The model is saved tensor by tensor. With `--replicate`
each process has the whole model instead, and only gradients travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flextron.atomic import clear_errors
from flextron.config import TrainConfig
from flextron.elastic import model
from flextron.elastic.accounting import damaged
from flextron.elastic.adapters import is_of_adapter, name_below
from flextron.elastic.discovery import family_for
from flextron.elastic.skeleton import Stored, is_pack, skeleton, weights_of
from flextron.errors import CheckpointError, FlextronError, first_line
from flextron.model import ElasticModel
from flextron.training.distillation import Distiller

T = TypeVar("T")
_PART_BYTES = 2**31
"""Gathered weights that the first process holds in memory before it writes them."""


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


def open_model(path: str, device: Any, *, shards: int) -> model.ElasticModel:
    """Return the model to train, on `device`; if it is to be split into shards, one without weights, for `fill`.

    A pack is loaded whole by every process.

    Raises:
        FlextronError: as `ElasticModel.from_pretrained`.
    """
    if shards == 1 or is_pack(path):
        return ElasticModel.from_pretrained(path, device=device)
    stored = Stored.of(path)
    if stored is not None:
        found = stored.skeleton(path)
        if stored.fits(found.lm):
            stored.check(found.lm)
            stored.fingerprint(found)
            return found
    return _read_by_the_first(path)


def _read_by_the_first(path: str) -> model.ElasticModel:
    """Return a model without weights whose files hold them under other names, or as GGUF.

    The first process loads the whole model here, to check it and to know it, and once more in `fill`.
    """

    def read() -> dict[str, Any]:
        whole = ElasticModel.from_pretrained(path, device="cpu")
        return {
            "fingerprint": whole.fingerprint(),
            "tokenizer": whole.tokenizer,
            "ranking": whole.ranking,
            "folder": whole.folder,
            "weights": {name: (weight.shape, weight.dtype) for name, weight in weights_of(whole.lm).items()},
        }

    known, found = on_first(read), skeleton(path)
    weights = weights_of(found.lm)
    if {name: shape for name, (shape, _) in known["weights"].items()} != {n: w.shape for n, w in weights.items()}:
        raise CheckpointError(
            f"{path} holds other weights than its config tells, so its shards cannot be sent to several processes. "
            "Save it once more with transformers' save_pretrained."
        )
    for name, weight in weights.items():
        weight.data = weight.data.to(known["weights"][name][1])
    found.tokenizer, found.ranking, found.folder = known["tokenizer"], known["ranking"], known["folder"]
    found.fingerprint_is(known["fingerprint"])
    return found


def shard(distiller: Distiller, dtype: torch.dtype, device: torch.device) -> None:
    """Shard student and teacher over all processes, layer by layer and in place (PyTorch's `fully_shard`).

    Trained shards stay fp32. Weights are gathered and computed with in `dtype`; gradients are summed in fp32.
    """
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    if distiller.teacher is not None:
        _shard_layers(distiller.teacher.lm, options)
        fully_shard(distiller.teacher, reshard_after_forward=False, **options)  # its output projection is read later
    _shard_layers(distiller.student, options)
    fully_shard(distiller, **options)


def _shard_layers(lm: Any, options: dict[str, Any]) -> None:
    for layer in lm.get_submodule(family_for(lm.config).layers).children():
        fully_shard(layer, **options)


@torch.no_grad()
def fill(distiller: Distiller, sources: dict[str, str], device: torch.device) -> None:
    """Read the weights of a sharded student and teacher that have none yet.

    Each process reads its own shards, or gets them from the first process, where the files have other names.

    Args:
        sources: the folder or hub id of "student" and "teacher".

    Raises:
        CheckpointError: a file cannot be read, or a weight is no number; in all processes.
    """
    lms = {"student": distiller.student}
    if distiller.teacher is not None:
        lms["teacher"] = distiller.teacher.lm
    empty = [name for name, lm in lms.items() if next(lm.parameters()).is_meta]
    filled: Any = distiller
    filled._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for name in empty:
        lms[name].tie_weights()
        weights = {name_below(key): w for key, w in weights_of(lms[name]).items() if not is_of_adapter(key)}
        stored = Stored.of(sources[name])
        if stored is not None and weights.keys() <= stored.usable:
            _read_shards(weights, stored.folder, sources[name])
        else:
            _send_shards(weights, sources[name], device)
        for key, weight in weights.items():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            if total(local.sum(dtype=torch.float64).isfinite().logical_not().float()):
                raise damaged(sources[name], key)


def _read_shards(weights: dict[str, torch.Tensor], folder: Path, source: str) -> None:
    """Read this process's shards of weights."""
    try:
        load(dict(weights), storage_reader=HuggingFaceStorageReader(str(folder)))
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise CheckpointError(f"cannot load {source}: {first_line(error)}") from error


def _send_shards(weights: dict[str, torch.Tensor], source: str, device: torch.device) -> None:
    """Load the model in the first process, and send each process its shards, one weight after another."""
    is_first = dist.get_rank() == 0
    whole = weights_of(ElasticModel.from_pretrained(source, device="cpu").lm) if is_first else {}
    for name, weight in weights.items():
        sent = whole.pop(name).to(weight) if is_first else torch.empty(weight.shape, dtype=weight.dtype, device=device)
        if isinstance(weight, DTensor):
            sent = distribute_tensor(sent, weight.device_mesh, weight.placements)
        else:
            dist.broadcast(sent, src=0)
        weight.copy_(sent)


@torch.no_grad()
def whole_weights(distiller: Distiller, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    """Gather the student's weights by name, tied ones once, in the first process; the others get an empty dict.

    They are gathered one by one and written into `folder` as safetensors, from which the returned tensors are mapped.
    So never more than a few GB of them are in memory.

    Raises:
        CheckpointError: the disk is full or a write failed; in all processes.
    """
    for module in distiller.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass alone, the root's weights are still gathered
    part: dict[str, torch.Tensor] = {}
    files: list[Path] = []

    def write() -> None:
        with clear_errors(folder, "The checkpoints are kept."):
            folder.mkdir(exist_ok=True)
            files.append(folder / f"{len(files):05}.safetensors")
            save_file(part, files[-1])
            part.clear()

    held = 0
    for name, weight in weights_of(distiller.student).items():
        mine = weight.detach().to(dtype) if isinstance(weight, nn.Parameter) else weight.detach()  # buffers keep theirs
        held += mine.numel() * mine.element_size()
        whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
        if dist.get_rank() == 0:
            part[name] = whole.cpu().contiguous()
        del whole
        if held > _PART_BYTES:
            on_first(write)
            held = 0
    on_first(write)
    return {name: weight for file in files for name, weight in load_file(file).items()}


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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over all processes, each of which has the whole model."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is not None:  # in all processes, because they visit the same sub-networks
            total(parameter.grad).div_(dist.get_world_size())


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all processes, in place, and return the sum."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
