"""Snapshots of a training run. Training resumes exactly, even with a different number of processes.

    runs/
    ├── .step-00000060.partial/     being written, or left by a killed run; never read
    └── step-00000040/
        ├── state.json              written last; lists the other files with their checksums
        └── shard-00001-model-00001-of-00001.safetensors, ...     one or more from each rank

torch.distributed.checkpoint (DCP) writes and reads the tensors; each rank handles its own shards. All files are
safetensors or JSON; nothing is pickled. A tensor is named `model.WEIGHT` or `optimizer.INDEX.WEIGHT.KEY`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flextron.atomic import write_text
from flextron.errors import CheckpointError
from flextron.records import RecordError, check_version, checked
from flextron.training.ranks import clear_errors_of_all, gathered, my_share, on_first_rank, together

VERSION = 1
STATE_FILE = "state.json"
_FILE_BYTES = 2**30
"""Approximate size of one file. DCP builds a file in memory before writing it, so a rank writes several."""

State = Mapping[Tensor, dict[str, Any]]
"""The tensors that an optimizer keeps for each weight."""


def save_snapshot(
    runs: Path,
    *,
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write `runs/step-00000040` completely or not at all, delete all but the newest `keep_last`; return its folder.

    All ranks call it between two steps, with `runs` on a disk that they share. It stores the weights that require
    gradients and the optimizers' tensors for them; it does not store frozen weights, buffers or learning rates.
    `state` holds JSON values. Only rank 0's is written, so gather other ranks' generator states into it.

    Raises:
        CheckpointError: on all ranks. The disk is full or a write failed, and the earlier snapshots are unchanged; or
            `runs` holds a snapshot of this or a later step.
        TypeError: `state` is not JSON, or an optimizer keeps something that is not a tensor.
        ValueError: `keep_last` is below 1, or an optimizer trains a parameter that the model does not have.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, but the newest snapshot is always kept. Pass 1 or more.")
    target = Path(runs) / f"step-{step:08d}"
    partial = _hidden(target)
    doing = f"cannot write {target}"
    tensors = _tensors(_trainable(model), optimizers)
    try:
        together(doing, lambda: on_first_rank(_make_way, target, state))
        with clear_errors_of_all(doing):
            writer = HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=_split(tensors), save_distributed=True)
            save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        mine = together(doing, lambda: _checksums(my_share(partial.iterdir())))
        record = {
            "version": VERSION,
            "step": step,
            "optimizers": _kinds(optimizers),
            "files": {name: found for part in gathered(mine) for name, found in part.items()},
            "state": state,
        }
        together(doing, lambda: on_first_rank(_finish, partial, target, record))
    finally:
        on_first_rank(shutil.rmtree, partial, ignore_errors=True)
    doing = f"{target} is written, but older snapshots cannot be deleted"
    together(doing, lambda: on_first_rank(_delete_old, target.parent, keep_last))
    return target


def latest_snapshot(runs: Path, *, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """Return the folder of the newest snapshot with a readable `state.json`; None if there is no snapshot at all.

    `warn` gets a line about newer ones that cannot be read.

    Raises:
        CheckpointError: there are snapshots, and none can be read.
    """
    problems = []
    for path in _snapshots(Path(runs)):
        try:
            _read_record(path)
        except CheckpointError as error:
            problems.append(f"{path}: {str(error).removesuffix(_DELETE)}".rstrip())
            continue
        if problems:
            warn(f"warning: {problems[0]} Going on from the older {path.name}.")
        return path
    if problems:
        raise CheckpointError(f"no snapshot can be read; {problems[0]} With --resume never, the run begins again.")
    return None


def load_snapshot(snapshot: Path, *, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Load the trainable weights and the optimizers' tensors in place; return the saved `state`.

    All ranks call it; their number may differ from the run that saved. Build the optimizers as in that run: the same
    kinds with the same parameters. Learning rates and similar settings stay; earlier optimizer states are dropped.

    Raises:
        CheckpointError: on all ranks. A file is missing, truncated or damaged, or the snapshot belongs to another model
            or to other optimizers; then nothing has changed. Or reading failed halfway; then the weights are a mixture.
    """
    snapshot, weights = Path(snapshot), _trainable(model)
    doing = f"cannot load {snapshot}"
    record = together(doing, lambda: _checked_record(snapshot))
    states = together(doing, lambda: _empty_states(snapshot, weights, optimizers, record["optimizers"]))
    with clear_errors_of_all(f"{doing}, and the weights are now a mixture of old and new"):
        reader = HuggingFaceStorageReader(str(snapshot))
        load(_named(weights, states), storage_reader=reader, no_dist=not dist.is_initialized())
    for optimizer, loaded in zip(optimizers, states, strict=True):
        optimizer.state.clear()
        optimizer.state.update(loaded)
    state: dict[str, Any] = record["state"]
    return state


# Tensors by name


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights by name, tied ones once.

    After a forward pass without a backward pass, FSDP keeps the root's weights gathered; this shards them again.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _kinds(optimizers: Sequence[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _tensors(weights: dict[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return all tensors of a snapshot by name, contiguous because safetensors takes no others."""
    for optimizer in optimizers:
        held = {weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad}
        if foreign := len(held.difference(weights.values())):
            kind = type(optimizer).__name__
            raise ValueError(f"{kind} trains {foreign} parameters that the model does not have. Pass the whole model.")
    named = _named(weights, [optimizer.state for optimizer in optimizers])
    for name, value in named.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"{name!r} has the type {kind}, but snapshots hold only tensors. Use AdamW or Muon.")
    return {name: value.detach().contiguous() for name, value in named.items()}


def _named(weights: dict[str, nn.Parameter], states: Sequence[State]) -> dict[str, Any]:
    named: dict[str, Any] = {f"model.{name}": weight for name, weight in weights.items()}
    for index, state in enumerate(states):
        for name, weight in weights.items():
            named.update({f"optimizer.{index}.{name}.{key}": value for key, value in state.get(weight, {}).items()})
    return named


def _split(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the file number, from 1, for each tensor; all ranks use rank 0's, because their shards are similar."""
    files, size_bytes = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size_bytes // _FILE_BYTES
        size_bytes += (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
    return files


# Tensors to read into


def _empty_states(
    snapshot: Path, weights: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], kinds: Sequence[str]
) -> list[dict[Tensor, dict[str, Tensor]]]:
    """Return zero tensors for the stored optimizer states, sharded like the weights, after checking the model."""
    if _kinds(optimizers) != list(kinds):
        raise CheckpointError(
            f"it belongs to the optimizers {list(kinds)}, not {_kinds(optimizers)}. Build those of that run."
        )
    stored = HuggingFaceStorageReader(str(snapshot)).read_metadata().state_dict_metadata
    _check_same_weights({name: stored.pop(name) for name in list(stored) if name.startswith("model.")}, weights)
    groups = [{p: group for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    states: list[dict[Tensor, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, found in stored.items():
        index, _, rest = name.removeprefix("optimizer.").partition(".")
        owner, _, key = rest.rpartition(".")
        if owner not in weights or weights[owner] not in groups[int(index)]:
            raise _another(name, f"is in the snapshot, but optimizer {index} does not train {owner!r}")
        empty = _empty(key, found, weights[owner], groups[int(index)][weights[owner]])
        _check_same(name, found, empty)
        states[int(index)].setdefault(weights[owner], {})[key] = empty
    return states


def _empty(key: str, found: Any, weight: nn.Parameter, group: dict[str, Any]) -> Tensor:
    """Return zeros like the optimizer makes: like the weight, but a step counter is on the CPU unless fused."""
    if key == "step":
        on_device = group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=found.properties.dtype, device=weight.device if on_device else "cpu")
    return torch.zeros_like(weight, dtype=found.properties.dtype, requires_grad=False)


def _check_same_weights(stored: dict[str, Any], weights: dict[str, nn.Parameter]) -> None:
    named = {f"model.{name}": weight for name, weight in weights.items()}
    if missing := sorted(named.keys() - stored.keys()):
        raise _another(missing[0], "is trainable, but missing from the snapshot")
    if foreign := sorted(stored.keys() - named.keys()):
        raise _another(foreign[0], "is in the snapshot, but not trainable")
    for name, weight in named.items():
        _check_same(name, stored[name], weight)


def _check_same(name: str, stored: Any, expected: Tensor) -> None:
    """Check shape and dtype, because DCP would convert another dtype silently."""
    if stored.size != expected.shape:
        raise _another(name, f"is {tuple(stored.size)} in the snapshot, {tuple(expected.shape)} in the model")
    if stored.properties.dtype != expected.dtype:
        raise _another(name, f"is {stored.properties.dtype} in the snapshot, {expected.dtype} in the model")


def _another(name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"it belongs to another model: {name!r} {problem}. Pass the model and optimizers of that run."
    )


# Folders and files


def _hidden(snapshot: Path) -> Path:
    return snapshot.with_name(f".{snapshot.name}.partial")


def _snapshots(runs: Path) -> list[Path]:
    """The folders of snapshots, whole or damaged, newest first."""
    folders = [path for path in runs.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(folders, key=_step_of, reverse=True)


def _complete(runs: Path) -> Iterator[Path]:
    """Yield the folders of snapshots with a readable `state.json`, newest first."""
    for path in _snapshots(runs):
        with suppress(CheckpointError):
            _read_record(path)
            yield path


def _step_of(snapshot: Path) -> int:
    return int(snapshot.name.removeprefix("step-"))


def _make_way(target: Path, state: dict[str, Any]) -> None:
    """Check `state` and step, delete leftovers of killed runs, and create the hidden folder."""
    json.dumps(state)
    newest = next(_complete(target.parent), None)
    if newest is not None and _step_of(newest) >= _step_of(target):
        raise CheckpointError(f"{newest} is not older. Resume from it, delete it, or name another folder.")
    for leftover in (target, *target.parent.glob(".step-*.partial")):
        if leftover.exists():
            shutil.rmtree(leftover)
    _hidden(target).mkdir(parents=True)


def _finish(partial: Path, target: Path, record: dict[str, Any]) -> None:
    """Write `state.json` and rename the folder; sync to disk, because older snapshots are deleted next."""
    write_text(partial / STATE_FILE, json.dumps(record))
    _sync(partial / STATE_FILE)
    _sync(partial)
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete_old(runs: Path, keep_last: int) -> None:
    for path in list(_complete(runs))[keep_last:]:
        shutil.rmtree(path.rename(_hidden(path)))  # renamed first, so that a half-deleted one is never read


def _read_record(snapshot: Path) -> dict[str, Any]:
    try:
        record = json.loads((snapshot / STATE_FILE).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{STATE_FILE} cannot be read ({error}). {_DELETE}") from error
    if not isinstance(record, dict) or "version" not in record:
        raise CheckpointError(f"{STATE_FILE} does not describe a snapshot. {_DELETE}")
    return record


class _File(TypedDict):
    bytes: int
    crc32: int


class _Record(TypedDict):
    """What STATE_FILE holds besides its version."""

    step: int
    optimizers: tuple[str, ...]
    files: dict[str, _File]
    state: dict[str, Any]


def _checked_record(snapshot: Path) -> dict[str, Any]:
    """Return `state.json`, after checking that all files exist and that this rank's share of them is undamaged."""
    record = _read_record(snapshot)
    try:
        check_version(record["version"], VERSION)
    except RecordError as error:
        raise CheckpointError(f"{error}. Update flextron.") from None
    try:
        record = dict(checked(record, _Record))
    except RecordError as error:
        raise CheckpointError(f"{STATE_FILE} is damaged: {error}. {_DELETE}") from None
    written = record["files"]
    paths = {path.name: path for path in snapshot.iterdir() if path.name != STATE_FILE}
    if wrong := sorted(paths.keys() ^ written.keys()):
        problem = "is missing" if wrong[0] in written else "does not belong there"
        raise CheckpointError(f"{wrong[0]} {problem}. {_DELETE}")
    for path in my_share(paths.values()):
        if path.stat().st_size != written[path.name]["bytes"]:
            size_bytes = path.stat().st_size
            raise CheckpointError(f"{path.name} has {size_bytes} of {written[path.name]['bytes']} bytes. {_DELETE}")
    for name, found in _checksums(my_share(paths.values())).items():
        if found != written[name]:
            raise CheckpointError(f"{name} is damaged: its CRC-32 checksum differs. {_DELETE}")
    return record


_DELETE = "Delete the snapshot to resume from an earlier one."


def _checksums(paths: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Return size and CRC-32 by name: DCP itself skips missing shards and accepts damaged bytes of the right size."""
    found = {}
    for path in paths:
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(2**20):
                checksum = zlib.crc32(block, checksum)
        found[path.name] = {"bytes": path.stat().st_size, "crc32": checksum}
    return found
