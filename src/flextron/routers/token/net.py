"""The token router's networks: predict what a layer's neurons are worth to a token, from its hidden state and budget.

Flextron (Cai et al., ICML 2024), section 4.3: a small network per layer reads the token and gives its widths. Ours: the
network gives one number, the worth, which divides the static router's price of cost. So the token router starts equal
to the static router (worth 1), serves the same budgets, and finds a width by one look-up. Attention keeps the static
router's answer, because all tokens of a request write the same KV groups.

Shapes: B rows (requests), T time, L layers, K choices of an MLP's width, D model, R rank, C calibrated budgets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from flextron.routers.choices import Floats
from flextron.routers.static.net import StaticRouter

RANK = 32
WIDTHS = 9
"""Number of widths that a token may choose from in each layer."""
LARGEST = 3.0
"""Largest logarithm of a worth: a token counts at most as much as 20 average ones."""


class TokenRouter(nn.Module):
    """Predicts logarithms of worths with one small network per layer, on top of a frozen static router."""

    def __init__(self, static: StaticRouter, hidden_size: int, *, rank: int = RANK) -> None:
        """Start with the answers of the static router."""
        super().__init__()
        self.static = copy.deepcopy(static).requires_grad_(False)
        layers = len(static.costs_SK) // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every untrained router is the same
            self.reads_LRD = nn.Parameter(torch.randn(layers, rank, hidden_size) / math.sqrt(hidden_size))
            self.budget_LR = nn.Parameter(torch.randn(layers, rank) / 2)
            self.bias_LR = nn.Parameter(torch.randn(layers, rank) / 2)
        self.out_LR = nn.Parameter(torch.zeros(layers, rank))
        self.out_bias_L = nn.Parameter(torch.zeros(layers))
        self.register_buffer("budgets_C", torch.tensor([static.lowest, 1.0]))
        self.register_buffer("offsets_C", torch.zeros(2))
        self.register_buffer("plan_CL", torch.zeros(2, layers))
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    budgets_C: torch.Tensor
    offsets_C: torch.Tensor
    plan_CL: torch.Tensor

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.out_bias_L)

    def shifts(self, budgets_B: torch.Tensor) -> torch.Tensor:
        """Return what budgets, as shares of the full model's cost, add to the networks' hidden units, [L, B, R]."""
        position_B = 2 * (budgets_B - self.static.lowest) / (1 - self.static.lowest) - 1
        return self.bias_LR[:, None] + position_B[:, None] * self.budget_LR[:, None]

    def log_worths(self, layer: int, hidden_BTD: torch.Tensor, shift_BR: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of what a neuron of one layer is worth to each token, [B, T].

        Args:
            hidden_BTD: input of the MLP, after the model's norm.
            shift_BR: this layer's part of `shifts`.
        """
        read_BTR = F.linear(hidden_BTD, self.reads_LRD[layer].to(hidden_BTD.dtype))
        hidden_BTR = F.silu(read_BTR.float() + shift_BR[:, None])
        worths_BT = hidden_BTR @ self.out_LR[layer] + self.out_bias_L[layer]
        return LARGEST * torch.tanh(worths_BT / LARGEST)

    def log_prices(self, budgets_B: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the static router's price per unit of cost in each layer's MLP, [B, L]."""
        return self.static.log_prices_of(budgets_B)[:, : self.layers]

    def calibrated(self, costs_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return budgets [B], log prices [B, L] and MLP costs [B, L] at which all MLPs together cost `costs_B`.

        Values are interpolated between calibrated budgets along the cost of the MLPs, not along the budget, because the
        attention's part of a budget rises in steps.
        """
        costs_C = self.plan_CL.sum(1).cummax(0).values
        costs_C = costs_C + 1e-7 * torch.arange(len(costs_C), device=costs_C.device)  # ascending
        values_CX = torch.cat([self.budgets_C[:, None], self.offsets_C[:, None], self.plan_CL], 1)
        budgets_B1, offsets_B1, plan_BL = _interpolate(costs_C, values_CX, costs_B).split_with_sizes(
            [1, 1, self.layers], 1
        )
        return budgets_B1[:, 0], self.log_prices(budgets_B1[:, 0]) + offsets_B1, plan_BL

    def choose(self, layer: int, log_prices_BT: torch.Tensor) -> torch.Tensor:
        """Return the indices of the widths with the largest utility - price * cost, [B, T].

        Args:
            log_prices_BT: logarithms of prices that are already divided by worths.
        """
        if not self._steps:
            self._steps = [_steps(costs, utilities, _offered(len(costs))) for costs, utilities in self._rows()]
        gains, choices = self._steps[layer]
        return choices.to(log_prices_BT.device)[torch.bucketize(-log_prices_BT, -gains.to(log_prices_BT.device))]

    def _rows(self) -> list[tuple[Floats, Floats]]:
        """Return costs and utilities of the MLP's choices, layer by layer."""
        counts = self.static.allowed_SK[: self.layers].sum(-1).tolist()
        return [
            (np.asarray(costs[:count].double().cpu()), np.asarray(utilities[:count].double().cpu()))
            for costs, utilities, count in zip(self.static.costs_SK, self.static.utilities_SK, counts, strict=False)
        ]


def _offered(choices: int) -> list[int]:
    """Return evenly spaced choices for tokens; only a few, because each further width takes time to run."""
    return sorted({round(choice) for choice in np.linspace(0, choices - 1, WIDTHS)})


def _steps(costs_K: Floats, utilities_K: Floats, offered: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms of utility gained per cost from choice to choice, and the choices, narrowest first.

    Only choices that are best at some price remain: the upper concave envelope of utility over cost.
    """
    hull = [offered[0]]
    for choice in offered[1:]:
        if utilities_K[choice] <= utilities_K[hull[-1]]:
            continue
        while hull and costs_K[choice] <= costs_K[hull[-1]]:  # costs no more, gains more
            hull.pop()
        while len(hull) > 1 and _slope(costs_K, utilities_K, hull[-1], choice) >= _slope(
            costs_K, utilities_K, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(choice)
    gains = [_slope(costs_K, utilities_K, *pair) for pair in pairwise(hull)]
    return torch.tensor(np.log(gains), dtype=torch.float32), torch.tensor(hull)


def _slope(costs_K: Floats, utilities_K: Floats, low: int, high: int) -> float:
    return float((utilities_K[high] - utilities_K[low]) / (costs_K[high] - costs_K[low]))


def _interpolate(points_C: torch.Tensor, values_CX: torch.Tensor, at_B: torch.Tensor) -> torch.Tensor:
    """Interpolate rows of values between ascending points, [B, X]; constant beyond the ends."""
    high_B = torch.searchsorted(points_C, at_B.contiguous()).clamp(1, len(points_C) - 1)
    low_B = high_B - 1
    part_B = ((at_B - points_C[low_B]) / (points_C[high_B] - points_C[low_B])).clamp(0, 1)
    return values_CX[low_B] + part_B[:, None] * (values_CX[high_B] - values_CX[low_B])
