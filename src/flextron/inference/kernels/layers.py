"""All layers of a model in one call, for a few tokens.

A step reads every weight once for a few tokens, so the speed of memory is its limit. torch's products of few rows do
not reach it (docs/decisions/0009-decoding.md). All sums are in float32.

A call from Python costs 20 to 50 microseconds, as long as reading the weights of a small layer. So `layers` runs all
layers in one call, and is given addresses instead of hundreds of arrays.

Shapes: M rows (tokens), L layers, D model, G KV groups, S head size, R rotated numbers of a head, P pages. Weights are
float32, bfloat16 as the bits of uint16, int8 with a scale for each row, or 4 bits in strips of 32 outputs as uint8, of
which `strips` knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from flextron.inference.kernels.attention import attention
from flextron.inference.kernels.memory import kernel, pointer
from flextron.inference.kernels.mlp import mlp


@kernel()
def layers(
    h_MD: np.ndarray,
    model: tuple[np.ndarray, ...],
    sizes: tuple[int, int],
    angles: tuple[np.ndarray, np.ndarray],
    texts: tuple[np.ndarray, int, np.ndarray, np.ndarray],
    caches_L3: np.ndarray,
    cache_like: np.ndarray,
    neurons_LM: np.ndarray,
    groups_LM: np.ndarray,
    cached_groups_L: np.ndarray,
    rooms: tuple[Any, ...],
) -> None:
    """Run tokens through all layers; `h` holds their embeddings before, and the last layer's outputs after.

    Args:
        model: what `lean.LeanStep` knows of the model: an array of the weights' type, then [L, ...] for each layer:
            [7, 3] addresses of weight, scales and bias of gate, up, down, queries, keys, values and output (down and
            output, which close, lie column by column; no gate: 0); [6, 2] addresses of weight and bias of norms (before
            attention, before MLP, of queries, of keys, after attention, after MLP), 0 where there is none; [2] neurons
            and KV groups; [4] which angles rotate it or -1, its activation, how many tokens back it sees or 0, whether
            the MLP reads what attention reads; [9] numbers: epsilons of the six norms, factor of the residual, scale
            and cap of the scores.
        sizes: query heads of a group, and head size.
        angles: cosines and sines, [A, M, R], for models with A kinds of them.
        texts: pages [M, P] of each row's text, tokens of a page, positions [M], slots [M].
        caches_L3: address, tokens and groups of each layer's cache; `cache_like` is of its type.
        neurons_LM, groups_LM: widths of each row.
        cached_groups_L: groups whose keys and values are written.
        rooms: normed [M, D], opened and hidden, scores, sums of P parts of a closing projection's inputs [P, M, D'] (D
            rounded up to a multiple of `columns.LANES`), and in how many pieces its outputs are cut.
    """
    for layer in range(len(neurons_LM)):
        cached = cached_groups_L[layer]
        if cached:
            address, tokens, held = caches_L3[layer]
            cache_T2GS = carray(pointer(address, cache_like), (tokens, 2, held, sizes[1]))
            attention(h_MD, model, layer, sizes, angles, texts, cache_T2GS, groups_LM[layer], cached, rooms)
        if np.max(neurons_LM[layer]):
            mlp(h_MD, model, layer, neurons_LM[layer], rooms, cached > 0 and model[4][layer, 3] > 0)
