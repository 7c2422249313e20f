"""Weights in 8 or 4 bits in safetensors files, and float weights that are quantised one by one while they are read.

A folder is laid out as that of any elastic checkpoint, with quantized.safetensors in place of model.safetensors: a
matrix NAME.weight lies there as in memory (`elastic.quantized`), with NAME.scale beside it; the rest is in float32.
flextron.json names the type and the fingerprint of the weights that were quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from flextron.elastic import checkpoint
from flextron.elastic.accounting import are_tied, damaged
from flextron.elastic.checkpoint import Checkpoint
from flextron.elastic.model import ElasticModel, projections_of
from flextron.elastic.quantized import (
    KINDS,
    Bits,
    EightBits,
    give_back_memory,
    hold,
    is_quantized,
    put,
    quantize_embeddings,
)
from flextron.elastic.skeleton import Stored, weights_of
from flextron.elastic.source import COPY_AGAIN, METADATA_FILE, QUANTIZED_FILE, Metadata, read_metadata, source_of
from flextron.elastic.stored import check_config
from flextron.errors import CheckpointError, FlextronError

Model = TypeVar("Model", bound=ElasticModel)


def save(folder: str | Path, model: ElasticModel, bits: Bits, *, overwrite: bool, beside: Mapping[str, str]) -> None:
    """Write the whole folder of a quantised model, or nothing.

    Raises:
        CheckpointError: as `checkpoint.save`.
    """
    saved = Checkpoint(model.lm, model.tokenizer, model.search_space, model.ranking)
    of_projections = {f"{name}.weight" for name in projections_of(model)}
    tensors = {name: weight for name, weight in weights_of(model.lm).items() if name not in of_projections}
    for name, projection in projections_of(model).items():
        held: Any = projection.quantized
        tensors |= {f"{name}.weight": held.weight, f"{name}.scale": held.scale}
    for name, module in _around(model.lm).items():
        if isinstance(scale := getattr(module, "scale", None), torch.Tensor):
            tensors[f"{name}.scale"] = scale
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    about = {"quantization": bits, "fingerprint": model.fingerprint()}
    checkpoint.save(folder, saved, overwrite=overwrite, beside=beside, quantized=tensors, about=about)


def metadata_of(path: str | Path) -> Metadata | None:
    """What the flextron.json in a local folder tells, if the weights there are quantised.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = Path(path) / METADATA_FILE
    data = read_metadata(file) if file.is_file() else None
    return data if data is not None and "quantization" in data else None


@torch.no_grad()
def load(path: str | Path, about: Metadata, kind: type[Model]) -> Model:
    """Load what `save` wrote, as a model of class `kind`.

    Args:
        about: what `metadata_of` returned.

    Raises:
        CheckpointError: a weight is missing, left over, damaged, or of another size or type.
    """
    bits = about["quantization"]
    if not is_quantized(bits):
        raise CheckpointError(f"{path} holds {bits} weights; this flextron reads {', '.join(KINDS)}.")
    source_of(path)
    check_config(Path(path))
    stored = Stored(Path(path), {QUANTIZED_FILE})
    model = cast(Model, stored.skeleton(path, kind))
    tensors = {name: stored.read(name) for name in stored.weights}
    state, around = weights_of(model.lm), _around(model.lm)
    name = ""
    try:
        for name, projection in projections_of(model).items():
            del state[f"{name}.weight"]
            shape = projection.matrix().shape
            hold(projection, KINDS[bits].stored(tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale"), shape))
        quantized = [name for name in around if f"{name}.scale" in tensors]
        if quantized and are_tied(model.lm):
            quantized = list(around)  # both, or the file lacks a scale
        weight = torch.empty(0)
        for name in quantized:
            if state.pop(f"{name}.weight", None) is not None:
                weight = tensors.pop(f"{name}.weight")  # and that of the next one, if they are tied
            shape = around[name].get_parameter("weight").shape
            put(around[name], EightBits.stored(weight, tensors.pop(f"{name}.scale"), shape))
        for name, wanted in state.items():
            found = tensors[name]
            of_kind = found.shape == wanted.shape and found.is_floating_point() == wanted.is_floating_point()
            if not (of_kind and bool(found.sum().isfinite())):
                raise ValueError("it is of another size or type, or has values that are no numbers")
    except KeyError as error:
        raise CheckpointError(f"{path} is incomplete: it lacks {error}. {COPY_AGAIN}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {name}: {error}. {COPY_AGAIN}.") from None
    if left := sorted(tensors.keys() - state.keys()):
        raise CheckpointError(f"{path} holds {left[0]}, for which the model has no place. {COPY_AGAIN}.")
    _fill(model, tensors)
    give_back_memory()
    model.quantized_to(bits, about["fingerprint"])
    return model


@torch.no_grad()
def quantize_while_loading(path: str | Path, bits: Bits, kind: type[Model]) -> Model | None:
    """Load a float checkpoint and quantise one weight after the other, so that never all of them are held in float.

    Returns:
        None if it is not to be read so: it is a pack or a GGUF file, its files hold other names than the model, or
        something is wrong. `ElasticModel.from_pretrained` in float loads it, or says what is wrong.

    Raises:
        CheckpointError: a weight is no number.
    """
    try:
        stored = Stored.of(str(path))
        if stored is None:
            return None
        model = cast(Model, stored.skeleton(path, kind))
        if not stored.fits(model.lm):
            return None
        stored.check(model.lm)
        fingerprint = stored.fingerprint(model)
    except FlextronError:
        return None
    projections = {f"{name}.weight": projection for name, projection in projections_of(model).items()}
    state = {}
    for name, weight in weights_of(model.lm).items():
        tensor = stored.read(name)
        if not bool(tensor.sum(dtype=torch.float64).isfinite()):
            raise damaged(path, name)
        if name in projections:
            projection = projections[name]
            hold(projection, KINDS[bits].of(tensor.t() if projection.transposed else tensor))
            give_back_memory()
        else:
            state[name] = tensor.float() if isinstance(weight, nn.Parameter) else tensor
    _fill(model, state)
    quantize_embeddings(model)
    give_back_memory()
    model.quantized_to(bits, fingerprint)
    return model


def _fill(model: ElasticModel, state: Mapping[str, torch.Tensor]) -> None:
    """Give a model without weights those that are not quantised."""
    model.lm.load_state_dict(state, strict=False, assign=True)
    model.lm.tie_weights()
    model.config.dtype = torch.float32


def _around(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding and the output projection, by name; of two that are tied, the one first whose name is stored."""
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return {name: module for name, module in lm.named_modules() if any(module is end for end in ends)}
