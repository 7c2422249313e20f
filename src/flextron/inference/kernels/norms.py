"""Norms of rows of numbers. Shapes: M rows (tokens), D model."""

from __future__ import annotations

import math

import numpy as np

from flextron.inference.kernels.memory import kernel

Norm = tuple[np.ndarray, np.ndarray, float]
"""Weight, bias and epsilon. With a bias it is a LayerNorm, else an RMSNorm; without a weight it is none."""


@kernel()
def normalize_row(x_D: np.ndarray, norm: Norm, y_D: np.ndarray) -> None:
    """y = norm(x), for a norm that is there; y may be x."""
    weight_D, bias_D, epsilon = norm
    size = len(weight_D)
    mean, total = np.float32(0), np.float32(0)
    if len(bias_D):
        for d in range(size):
            mean += x_D[d]
        mean /= np.float32(size)
    for d in range(size):
        apart = x_D[d] - mean
        total += apart * apart
    scale = np.float32(1 / math.sqrt(total / size + epsilon))
    for d in range(size):
        y_D[d] = (x_D[d] - mean) * scale * weight_D[d]
    for d in range(len(bias_D)):
        y_D[d] += bias_D[d]


@kernel()
def normalize(x_MD: np.ndarray, norm: Norm, y_MD: np.ndarray) -> None:
    """y = norm(x) for each row; x itself where there is no norm."""
    for m in range(len(x_MD)):
        if len(norm[0]):
            normalize_row(x_MD[m], norm, y_MD[m])
        else:
            y_MD[m] = x_MD[m]
