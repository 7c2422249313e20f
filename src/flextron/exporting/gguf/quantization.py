"""Choose the type of each weight in a GGUF file, check that it fits, and convert the weight.

The package `gguf` converts legacy types; llama.cpp's own code, which comes with `xllamacpp`, converts K-quants.
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
"""K-quant -> the type that llama.cpp uses instead if blocks of 256 do not divide a row."""


@dataclass(frozen=True)
class Scheme:
    """The types that one value of `--quantize` stands for."""

    file_type: str
    """Its name in `gguf.LlamaFileType`."""
    most: str
    """Type of most weights, as `gguf.GGMLQuantizationType` names it."""
    output: str
    """Type of the output projection, or of the embeddings if they are tied."""
    some: str | None = None
    """Type of V and of the closing MLP projection in half of the layers, as in llama.cpp's mixes, or None."""


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
    """Return the scheme called `name`.

    Raises:
        ExportError: there is none, or it needs a package that is not installed.
    """
    if name not in SCHEMES:
        raise ExportError(f"unknown quantisation {name!r}; choose one of {', '.join(SCHEMES)}.")
    if SCHEMES[name].most in _K_FALLBACK:
        _ggml()
    return SCHEMES[name]


def smallest_block(scheme: Scheme) -> int:
    """Return the block size of the scheme's main type, at least 32; every row is a whole number of blocks."""
    return max(32, _block(scheme.most))


def types_of(tensors: Mapping[str, torch.Tensor], scheme: Scheme, layers: int) -> tuple[dict[str, str], list[str]]:
    """Return the type of each tensor by name, and notes on tensors that differ from the scheme.

    Raises:
        ExportError: the blocks of the scheme do not divide a row.
    """
    types, replaced = {}, 0
    for name, tensor in tensors.items():
        preferred = _preferred(name, tensor, scheme, layers, tied="output.weight" not in tensors)
        types[name] = _fitting(name, tensor.shape[-1], preferred)
        replaced += types[name] != preferred
    matrices = sum(tensor.ndim == 2 for tensor in tensors.values())
    if not replaced:
        return types, []
    return types, [
        f"blocks of 256 do not divide the rows of {replaced} of {matrices} matrices; as in llama.cpp, these are stored "
        f"as {' or '.join(sorted({types[name] for name in types} & set(_K_FALLBACK.values())))}"
    ]


def _preferred(name: str, tensor: torch.Tensor, scheme: Scheme, layers: int, *, tied: bool) -> str:
    if tensor.ndim < 2 or name == "position_embd.weight":
        return "F32"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return scheme.output
    if scheme.some and ("attn_v" in name or "ffn_down" in name) and _gets_more_bits(int(name.split(".")[1]), layers):
        return scheme.some
    return scheme.most


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Return llama.cpp's choice for its mixes: the first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(name: str, row: int, kind: str) -> str:
    if row % _block(kind) and kind in _K_FALLBACK:
        kind = _K_FALLBACK[kind]
    block = _block(kind)
    if row % block:
        below = row // block * block
        nearest = f"{below} and {below + block}" if below else str(block)
        raise ExportError(
            f"{name} has rows of {row} numbers, which {kind}'s blocks of {block} do not divide; the nearest that fit "
            f"are {nearest}. Choose widths that are multiples of {block}, or pass --quantize f16."
        )
    return kind


def _block(kind: str) -> int:
    return int(_sizes(kind)[0])


def bytes_of(tensor: torch.Tensor, kind: str) -> int:
    """Return the bytes of a tensor in this type."""
    block, size = _sizes(kind)
    return int(tensor.numel() // block * size)


def _sizes(kind: str) -> tuple[int, int]:
    """Return the number of values in a block, and its bytes."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(block), int(size)


def converted(tensor: torch.Tensor, kind: str) -> NDArray[Any]:
    """Return a weight converted to this type, as the file stores it."""
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
    """Return llama.cpp's library of tensor operations.

    Raises:
        ExportError: xllamacpp is not installed.
    """
    try:
        import xllamacpp.xllamacpp as library
    except ImportError:
        raise ExportError(
            'K-quants need llama.cpp\'s own quantiser. Run: pip install "flextron[llamacpp]", '
            "or use q8_0, q5_1, q5_0, q4_1 or q4_0."
        ) from None
    quantize = ctypes.CDLL(library.__file__)
    quantize.ggml_quantize_chunk.restype = ctypes.c_size_t
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    return quantize
