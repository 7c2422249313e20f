"""How each weight of a GGUF file is stored: types by name, what fits which sizes, and the conversion itself.

Legacy types are converted by the package `gguf`; K-quants by llama.cpp's own code, which comes with `xllamacpp`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flextron.errors import ExportError

_K_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp stores rows in that no K-quant's block of 256 divides."""


@dataclass(frozen=True)
class Scheme:
    """What `--quantize` names."""

    file_type: str
    """Its name among `gguf.LlamaFileType`."""
    most: str
    """Type of most weights, as `gguf.GGMLQuantizationType` names it."""
    output: str
    """Type of the output projection, or of the embeddings where those are tied."""
    some: str | None = None
    """Type of V and of the closing MLP projection in half of the layers, as llama.cpp's mixes have it."""


SCHEMES = {
    "f32": Scheme("ALL_F32", "F32", "F32"),
    "f16": Scheme("MOSTLY_F16", "F16", "F16"),
    "bf16": Scheme("MOSTLY_BF16", "BF16", "BF16"),
    "q8_0": Scheme("MOSTLY_Q8_0", "Q8_0", "Q8_0"),
    "q5_0": Scheme("MOSTLY_Q5_0", "Q5_0", "Q8_0"),
    "q5_1": Scheme("MOSTLY_Q5_1", "Q5_1", "Q8_0"),
    "q4_0": Scheme("MOSTLY_Q4_0", "Q4_0", "Q8_0"),
    "q4_1": Scheme("MOSTLY_Q4_1", "Q4_1", "Q8_0"),
    "q6_k": Scheme("MOSTLY_Q6_K", "Q6_K", "Q6_K"),
    "q5_k_m": Scheme("MOSTLY_Q5_K_M", "Q5_K", "Q6_K", some="Q6_K"),
    "q4_k_m": Scheme("MOSTLY_Q4_K_M", "Q4_K", "Q6_K", some="Q6_K"),
}


def scheme_of(name: str) -> Scheme:
    """The scheme that `name` names.

    Raises:
        ExportError: there is none, or it needs a package that is missing.
    """
    if name not in SCHEMES:
        raise ExportError(f"unknown quantisation {name!r}; known are {', '.join(SCHEMES)}.")
    if SCHEMES[name].most in _K_FALLBACK:
        _ggml()
    return SCHEMES[name]


def smallest_block(scheme: Scheme) -> int:
    """Numbers in a block of the scheme's main type: a row is a whole number of blocks."""
    return max(32, _block(scheme.most))


def types_of(tensors: Mapping[str, torch.Tensor], scheme: Scheme, layers: int) -> tuple[dict[str, str], list[str]]:
    """The type of each tensor by name, and notes on those that are not what the scheme says.

    Raises:
        ExportError: rows that no block of the scheme divides.
    """
    types, other = {}, 0
    for name, tensor in tensors.items():
        wanted = _wanted(name, tensor, scheme, layers, tied="output.weight" not in tensors)
        types[name] = _fitting(name, tensor.shape[-1], wanted)
        other += types[name] != wanted
    matrices = sum(tensor.ndim == 2 for tensor in tensors.values())
    if not other:
        return types, []
    return types, [
        f"{other} of {matrices} matrices have rows that no block of 256 divides; they are in "
        f"{' or '.join(sorted({types[name] for name in types} & set(_K_FALLBACK.values())))}, as llama.cpp does it"
    ]


def _wanted(name: str, tensor: torch.Tensor, scheme: Scheme, layers: int, *, tied: bool) -> str:
    if tensor.ndim < 2 or name == "position_embd.weight":
        return "F32"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return scheme.output
    if scheme.some and ("attn_v" in name or "ffn_down" in name) and _gets_more_bits(int(name.split(".")[1]), layers):
        return scheme.some
    return scheme.most


def _gets_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice for its mixes: the first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(name: str, row: int, wanted: str) -> str:
    if row % _block(wanted) and wanted in _K_FALLBACK:
        wanted = _K_FALLBACK[wanted]
    block = _block(wanted)
    if row % block:
        below = row // block * block
        nearest = f"{below} and {below + block}" if below else str(block)
        raise ExportError(
            f"{name} has rows of {row} numbers, which {wanted}'s blocks of {block} do not divide; the nearest that fit "
            f"are {nearest}. Choose widths that are multiples of {block}, or --quantize f16."
        )
    return wanted


def _block(kind: str) -> int:
    return int(_sizes(kind)[0])


def bytes_of(tensor: torch.Tensor, kind: str) -> int:
    """Size of a tensor in this type."""
    block, size = _sizes(kind)
    return int(tensor.numel() // block * size)


def _sizes(kind: str) -> tuple[int, int]:
    """Numbers in a block, and its bytes."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(block), int(size)


def converted(tensor: torch.Tensor, kind: str) -> NDArray[Any]:
    """A weight in this type, as the file holds it."""
    import gguf

    if kind == "F16":
        return tensor.detach().cpu().to(torch.float16).contiguous().numpy()
    numbers = tensor.detach().cpu().float().contiguous().numpy()
    if kind == "F32":
        return numbers
    if kind in _K_FALLBACK:
        return _by_ggml(numbers, gguf.GGMLQuantizationType[kind], bytes_of(tensor, kind))
    return np.ascontiguousarray(gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind]))


def _by_ggml(numbers: NDArray[np.float32], kind: int, size: int) -> NDArray[np.uint8]:
    stored = np.empty(size, dtype=np.uint8)
    rows, row = numbers.reshape(-1, numbers.shape[-1]).shape
    written = _ggml().ggml_quantize_chunk(kind, numbers.ctypes.data, stored.ctypes.data, 0, rows, row, None)
    if written != size:
        raise ExportError(f"llama.cpp's quantiser wrote {written} bytes where {size} were expected.")
    return stored


@cache
def _ggml() -> Any:
    """llama.cpp's library of tensor operations."""
    try:
        import xllamacpp.xllamacpp as library
    except ImportError:
        raise ExportError(
            'K-quants need llama.cpp\'s own quantiser: pip install "flextron[llamacpp]". '
            "Without it there are q8_0, q5_1, q5_0, q4_1 and q4_0."
        ) from None
    quantize = ctypes.CDLL(library.__file__)
    quantize.ggml_quantize_chunk.restype = ctypes.c_size_t
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    return quantize
