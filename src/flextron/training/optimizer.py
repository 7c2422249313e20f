"""The AdamW optimizer and the learning-rate schedule of elastic training."""

from __future__ import annotations

import torch
from torch import nn

from flextron.config import OptimizerOptions


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the peak learning rate at `step`, which counts from 0.

    It rises linearly over the first `warmup` (0 to 1) of the steps, then falls linearly to 0.
    """
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def adamw(parameters: list[nn.Parameter], options: OptimizerOptions) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)
