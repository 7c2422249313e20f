"""Weights as the kernels read them."""

import numpy as np


def stored(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as kernels read it, and what its numbers are."""
    if kind == "int8":
        steps = (weight * 30).astype(np.int8)
        return steps, steps.astype(np.float32)
    if kind == "bfloat16":
        bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    return weight, weight
