"""Export one sub-network as a GGUF file for llama.cpp, and check that llama.cpp computes the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flextron.atomic import check_new_file, new_file
from flextron.elastic.gguf_source import ROPE_KEY, ROPE_TENSOR
from flextron.elastic.model import ElasticModel
from flextron.errors import ExportError
from flextron.exporting.card import base_model, command
from flextron.exporting.cutting import parameters_asked
from flextron.exporting.gguf.comparing import EngineCheck, check_in_llamacpp
from flextron.exporting.gguf.dialects import (
    Dialect,
    LayerWritten,
    add_sizes,
    context_length,
    dialect_for,
    gguf_tensors,
    layers_written,
)
from flextron.exporting.gguf.engine import is_installed
from flextron.exporting.gguf.quantization import Scheme, bytes_of, converted, scheme_of, smallest_block, types_of
from flextron.exporting.gguf.vocabulary import add_vocabulary
from flextron.subnet import Subnet

MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufReport:
    """What an export was asked for, and what was written and checked."""

    file: str
    architecture: str
    """The architecture's name in llama.cpp."""
    quantization: str
    subnet: Subnet
    share: float
    """Share of the layers' weights that `subnet` keeps, 0 to 1."""
    parameters_asked: int
    """The full model's parameters minus those of dropped units."""
    parameters_got: int
    """Number of parameters in the file's tensors."""
    weight_bytes: int
    """Size of the tensors in bytes, without metadata and tokenizer."""
    bytes_got: int
    """Size of the file in bytes."""
    check: EngineCheck | None
    """The comparison in llama.cpp, or None if it was not run."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"wrote {self.file}: {self.architecture}, {self.quantization}, {self.subnet}",
            f"  {self.share:.1%} of the layers' weights; {self.parameters_asked:,} parameters expected, "
            f"{self.parameters_got:,} written ({self.bytes_got / 1e6:.1f} MB)",
            f"  {self.check}" if self.check else "  not verified",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_gguf(
    model: ElasticModel,
    subnet: Subnet,
    file: str | Path,
    *,
    quantize: str = "f16",
    overwrite: bool = False,
    verify: bool = True,
) -> GgufReport:
    """Write `subnet` as a GGUF file, load it in llama.cpp, and compare; if they differ, nothing is kept.

    Equal widths use the model's own architecture in llama.cpp. Other widths use `deci`, which has sizes per layer.

    Args:
        quantize: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, or with xllamacpp q6_k, q5_k_m, q4_k_m.
        verify: compare tokens, next tokens and greedy text; if xllamacpp is not installed, the report says so.

    Raises:
        SubnetError: `subnet` is not in the search space of this model.
        ExportError: llama.cpp cannot express these sizes, the quantisation does not fit them, the package `gguf` is
            not installed, or llama.cpp computes something else.
        CheckpointError: the file exists and `overwrite` is false, the disk is full, or a write failed.
    """
    check_new_file(file, overwrite=overwrite, magic=MAGIC)
    model.search_space.check(subnet)
    plan = _plan(model, subnet, quantize)
    tensors, types, notes = plan.tensors, plan.types, _notes(model, plan)
    writer = _writer(model, subnet, plan)
    size = sum(bytes_of(tensor, types[name]) for name, tensor in tensors.items())
    with new_file(file, overwrite=overwrite, needs_bytes=size, magic=MAGIC) as partial:
        _write(writer, partial, tensors, types)
        check = None
        if verify and is_installed():
            check = check_in_llamacpp(
                model, model.tokenizer, subnet, partial, context=context_length(model), kind=plan.scheme.most
            )
        elif verify:
            notes.append('to verify the file in llama.cpp, run: pip install "flextron[llamacpp]", and export again')
        return GgufReport(
            file=str(file),
            architecture=plan.dialect.arch,
            quantization=quantize,
            subnet=subnet,
            share=model.share(subnet),
            parameters_asked=parameters_asked(model, subnet),
            parameters_got=sum(tensor.numel() for tensor in tensors.values()),
            weight_bytes=size,
            bytes_got=partial.stat().st_size,
            check=check,
            notes=tuple(notes),
        )


def check_states_in_gguf(model: ElasticModel, subnet: Subnet, quantize: str) -> None:
    """Check that a GGUF file can express `subnet` in this quantisation.

    Raises:
        ExportError: it cannot.
    """
    _plan(model, subnet, quantize)


@dataclass(frozen=True)
class _Plan:
    """The contents of the file, decided before anything is written."""

    scheme: Scheme
    dialect: Dialect
    layers: list[LayerWritten]
    tensors: dict[str, torch.Tensor]
    types: dict[str, str]
    notes: list[str]


def _plan(model: ElasticModel, subnet: Subnet, quantize: str) -> _Plan:
    if find_spec("gguf") is None:
        raise ExportError('a GGUF file needs the package gguf. Run: pip install "flextron[gguf]"')
    model.check_float("export")
    scheme, dialect = scheme_of(quantize), dialect_for(model, subnet)
    layers = layers_written(model, subnet, dialect, smallest_block(scheme))
    tensors = gguf_tensors(model, subnet, dialect, layers)
    return _Plan(scheme, dialect, layers, tensors, *types_of(tensors, scheme, subnet.layers))


def _notes(model: ElasticModel, plan: _Plan) -> list[str]:
    """Return notes for the user about the file."""
    notes = list(plan.notes)
    if padded := sum(layer.pads for layer in plan.layers):
        notes.append(f"{padded} layers have a sub-layer of zeros, because llama.cpp needs one there")
    if context_length(model) < model.config.max_position_embeddings:
        notes.append(f"contexts have at most {context_length(model)} tokens, because the file has no sliding window")
    return notes


def _writer(model: ElasticModel, subnet: Subnet, plan: _Plan) -> Any:
    """Return a `GGUFWriter` with all metadata."""
    import gguf

    writer = gguf.GGUFWriter(path=None, arch=plan.dialect.arch)
    _add_about(writer, model, subnet, plan.scheme)
    add_sizes(writer, model, plan.dialect, plan.layers)
    if ROPE_TENSOR in plan.tensors:
        writer.add_string(ROPE_KEY, json.dumps(model.config.rope_parameters))
    add_vocabulary(writer, model.tokenizer, model.config.vocab_size, _end(model.config))
    return writer


def _end(config: Any) -> int | None:
    end: int | list[int] | None = config.eos_token_id
    return end[0] if isinstance(end, list) else end


def _add_about(writer: Any, model: ElasticModel, subnet: Subnet, scheme: Scheme) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{base_model(model) or model.config.model_type}, sub-network")
    writer.add_description(f"{subnet}; by: {command()}")
    writer.add_file_type(gguf.LlamaFileType[scheme.file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("flextron.subnet", subnet.to_json())


def _write(writer: Any, file: Path, tensors: dict[str, torch.Tensor], types: dict[str, str]) -> None:
    """Write one tensor after the other, so that only one at a time is in memory twice."""
    import gguf
    import numpy as np

    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), bytes_of(tensor, types[name]), raw_dtype=kind)
    writer.write_header_to_file(path=file)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(converted(tensor, types[name]))
    finally:
        writer.close()
