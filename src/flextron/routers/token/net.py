"""The token router: what a neuron is worth to each token in each layer, from its hidden state and the budget.

Flextron (Cai et al., ICML 2024), section 4.3: a small network per layer sees the token and gives it widths. Ours: the
network gives one number, the worth, by which the static router's price of cost is divided. So it starts as the static
router (worth 1), serves any budget of that, and finding a width is one look-up. Attention keeps the static router's
answer: all tokens of a request write the same KV groups.

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
"""Widths that tokens are offered in each layer."""
LARGEST = 3.0
"""Largest logarithm of a worth: a token counts for at most 20 average ones."""


class TokenRouter(nn.Module):
    """Logarithms of worths, by one small network per layer, on top of a static router that stays as it is."""

    def __init__(self, static: StaticRouter, hidden_size: int, *, rank: int = RANK) -> None:
        """A router whose answers are the static one's."""
        super().__init__()
        self.static = copy.deepcopy(static).requires_grad_(False)
        layers = len(static.costs_SK) // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an untrained router is the same each time, and leaves the caller's generator alone
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
        """What budgets, in shares of the full model's cost, add to what the networks read, [L, B, R]."""
        place_B = 2 * (budgets_B - self.static.lowest) / (1 - self.static.lowest) - 1
        return self.bias_LR[:, None] + place_B[:, None] * self.budget_LR[:, None]

    def log_worths(self, layer: int, hidden_BTD: torch.Tensor, shift_BR: torch.Tensor) -> torch.Tensor:
        """Logarithm of what a neuron of a layer is worth to each token, [B, T].

        Args:
            hidden_BTD: what enters the MLP, normed by the model.
            shift_BR: of `shifts`, this layer's.
        """
        read_BTR = F.linear(hidden_BTD, self.reads_LRD[layer].to(hidden_BTD.dtype))
        hidden_BTR = F.silu(read_BTR.float() + shift_BR[:, None])
        worths_BT = hidden_BTR @ self.out_LR[layer] + self.out_bias_L[layer]
        return LARGEST * torch.tanh(worths_BT / LARGEST)

    def log_prices(self, budgets_B: torch.Tensor) -> torch.Tensor:
        """Logarithm of the static router's price of a unit of cost in the MLP of every layer, [B, L]."""
        return self.static.log_prices_of(budgets_B)[:, : self.layers]

    def calibrated(self, costs_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the MLPs of all layers cost so much on average: budgets [B], log prices and costs of layers [B, L].

        Between the budgets that were calibrated all is interpolated by what the MLPs cost there: what the attention
        takes of a budget goes up in steps.
        """
        costs_C = self.plan_CL.sum(1).cummax(0).values
        costs_C = costs_C + 1e-7 * torch.arange(len(costs_C), device=costs_C.device)  # ascending
        values_CX = torch.cat([self.budgets_C[:, None], self.offsets_C[:, None], self.plan_CL], 1)
        budgets_B1, offsets_B1, plan_BL = _interpolate(costs_C, values_CX, costs_B).split_with_sizes(
            [1, 1, self.layers], 1
        )
        return budgets_B1[:, 0], self.log_prices(budgets_B1[:, 0]) + offsets_B1, plan_BL

    def choose(self, layer: int, log_prices_BT: torch.Tensor) -> torch.Tensor:
        """Indices of the widths that are worth most after these prices, divided by worths, are paid, [B, T]."""
        if not self._steps:
            self._steps = [_steps(costs, utilities, _offered(len(costs))) for costs, utilities in self._rows()]
        gains, choices = self._steps[layer]
        return choices.to(log_prices_BT.device)[torch.bucketize(-log_prices_BT, -gains.to(log_prices_BT.device))]

    def _rows(self) -> list[tuple[Floats, Floats]]:
        """Costs and utilities of every layer's choices."""
        counts = self.static.allowed_SK[: self.layers].sum(-1).tolist()
        return [
            (np.asarray(costs[:count].double().cpu()), np.asarray(utilities[:count].double().cpu()))
            for costs, utilities, count in zip(self.static.costs_SK, self.static.utilities_SK, counts, strict=False)
        ]


def _offered(choices: int) -> list[int]:
    """The choices that tokens are offered, evenly over all: few, as every further width costs time to run."""
    return sorted({round(place) for place in np.linspace(0, choices - 1, WIDTHS)})


def _steps(costs_K: Floats, utilities_K: Floats, offered: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The choices that are best at some price, the narrowest first, and the logarithm of what each gains per cost.

    They lie on the upper concave envelope of utility over cost.
    """
    hull = [offered[0]]
    for choice in offered[1:]:
        if utilities_K[choice] <= utilities_K[hull[-1]]:
            continue
        while hull and costs_K[choice] <= costs_K[hull[-1]]:  # as cheap, and worth more
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


def _interpolate(places_C: torch.Tensor, values_CX: torch.Tensor, at_B: torch.Tensor) -> torch.Tensor:
    """Rows of values between ascending places, [B, X]; beyond the ends, the end's."""
    high_B = torch.searchsorted(places_C, at_B.contiguous()).clamp(1, len(places_C) - 1)
    low_B = high_B - 1
    part_B = ((at_B - places_C[low_B]) / (places_C[high_B] - places_C[low_B])).clamp(0, 1)
    return values_CX[low_B] + part_B[:, None] * (values_CX[high_B] - values_CX[low_B])
