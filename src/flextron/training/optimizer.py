"""AdamW as elastic training uses it, and its learning rate from step to step."""

from __future__ import annotations

import torch
from torch import nn

from flextron.config import OptimizerOptions


def schedule(step: int, steps: int, warmup: float) -> float:
    """Part of the highest learning rate in a step from 0: up over the first `warmup` of the steps, then down to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def adamw(parameters: list[nn.Parameter], options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW; weights decay in matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)
