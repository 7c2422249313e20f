"""The static router's network: maps a budget to logits over the choices of every sub-layer; its answers are nested.

Flextron (Cai et al., ICML 2024), section 4: two fully connected layers with LeakyReLU give logits: Gumbel-softmax in
training, argmax in use. Ours: the logits are the Lagrangian of the knapsack problem,
`utility - price(budget) * cost`. The network gives the price. Its weights are not negative, so no width shrinks as the
budget grows.

Shapes: B budgets, N sub-networks on the path, S sub-layers, K choices, H hidden units.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from flextron.costs.table import CostTable
from flextron.errors import RouterError
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.choices import Floats, Indices, Mask, allowed, cost_matrix, increase_matrix, prices
from flextron.routers.state import load_state
from flextron.subnet import SearchSpace

HIDDEN = 128
KNOTS = 33
"""Number of budgets at which the initial price is solved for; the logarithm is interpolated between them."""
BEYOND = 12.0
"""How far the logarithm of the price rises below the lowest budget, to reach the smallest sub-network."""
GRID = 512


class StaticRouter(nn.Module):
    """Maps budgets, as shares of the full model's cost in one cost table, to logits over choices.

    It serves budgets in [lowest, 1]. Below, the price keeps rising until the answer is the smallest sub-network.
    """

    costs_SK: torch.Tensor
    allowed_SK: torch.Tensor
    log_prices: torch.Tensor
    ends: torch.Tensor

    def __init__(self, utilities_SK: Floats, costs_SK: Floats, fixed: float, allowed_SK: Mask, lowest: float) -> None:
        """Start from utilities (negated loss increases, in nats) and costs as shares of the full model's."""
        super().__init__()
        self.register_buffer("ends", torch.tensor([lowest, fixed], dtype=torch.float64))
        scale = _typical_step(utilities_SK)
        self.utilities_SK = nn.Parameter(torch.tensor(utilities_SK / scale, dtype=torch.float32))
        self.register_buffer("costs_SK", torch.tensor(costs_SK, dtype=torch.float32))
        self.register_buffer("allowed_SK", torch.tensor(allowed_SK, dtype=torch.bool))
        knots = np.linspace(lowest, 1, KNOTS)
        log_prices = _log_prices(utilities_SK / scale, costs_SK, fixed, allowed_SK, knots)
        self.register_buffer("log_prices", torch.tensor(log_prices, dtype=torch.float32))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)  # every untrained router is the same
            self.hidden = nn.Linear(1, HIDDEN)
            self.out = nn.Linear(HIDDEN, len(costs_SK))
            self.hidden.weight.uniform_(0.5, 2)
            self.hidden.bias.uniform_(-1, 1)
            self.out.weight.fill_(-6.0)
            self.out.bias.zero_()

    @classmethod
    def of(cls, sensitivity: Sensitivity, table: CostTable, *, lowest: float) -> StaticRouter:
        """Return an untrained router: it answers any budget with the greedy choice by sensitivity per cost.

        Raises:
            RouterError: sensitivities and table have different search spaces.
        """
        full = table.full
        space = table.search_space
        if sensitivity.search_space != space:
            raise RouterError("the sensitivities and the cost table have different search spaces. Rank again.")
        return cls(
            -increase_matrix(sensitivity, counted=True),
            cost_matrix(table) / full,
            table.fixed / full,
            allowed(space),
            lowest,
        )

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor], space: SearchSpace) -> StaticRouter:
        """Return the router for this search space that had this `state_dict()`.

        Raises:
            ValueError: it was none's.
        """
        allowed_SK = allowed(space)
        router = cls(np.zeros(allowed_SK.shape), np.zeros(allowed_SK.shape), 0.0, allowed_SK, 0.5)
        load_state(router, state)
        if not 0 < router.lowest < 1 or router.fixed < 0 or (router.costs_SK < 0).any():
            raise ValueError("its costs or its lowest budget are not between 0 and 1")
        if not np.array_equal(np.asarray(router.allowed_SK), allowed_SK):
            raise ValueError("allowed_SK belongs to another search space")
        return router

    def continue_from(self, other: StaticRouter) -> None:
        """Copy what another router has learnt; costs and range of budgets stay.

        Raises:
            RouterError: the other router has another search space.
        """
        if other.utilities_SK.shape != self.utilities_SK.shape:
            raise RouterError("cannot continue from a router with another search space. Train a new one.")
        with torch.no_grad():
            for mine, learnt in zip(self.parameters(), other.parameters(), strict=True):
                mine.copy_(learnt)

    @property
    def lowest(self) -> float:
        """Lowest budget that the router is trained for."""
        return float(self.ends[0])

    @property
    def fixed(self) -> float:
        """Cost that no choice changes, as a share of the full model's cost."""
        return float(self.ends[1])

    def forward(self, budgets_B: torch.Tensor, beyond_B: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, [B, S, K]; columns without a choice hold minus infinity.

        Args:
            budgets_B: shares of the full model's cost; clamped to [lowest, 1].
            beyond_B: added to the logarithm of all prices, to reach budgets below the lowest.
        """
        prices_BS = self.log_prices_of(budgets_B)
        if beyond_B is not None:
            prices_BS = prices_BS + beyond_B[:, None]
        logits_BSK = self.utilities_SK - prices_BS.exp()[..., None] * self.costs_SK
        return logits_BSK.masked_fill(~self.allowed_SK, -torch.inf)

    def log_prices_of(self, budgets_B: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the price per unit of cost in each sub-layer, [B, S]; budgets as for `forward`."""
        budgets_B = budgets_B.clamp(self.lowest, 1)
        place_B = (budgets_B - self.lowest) / (1 - self.lowest)
        hidden_BH = F.linear(place_B[:, None] * 2 - 1, self.hidden.weight.abs(), self.hidden.bias)
        rising, falling = hidden_BH.chunk(2, dim=1)
        # half of the units are convex in the budget, half concave
        hidden_BH = torch.cat([F.leaky_relu(rising), -F.leaky_relu(-falling)], 1)
        cheaper_BS = F.linear(hidden_BH, F.softplus(self.out.weight), self.out.bias)
        return (self._first_log_price(place_B)[:, None] - cheaper_BS).clamp(-20, 20)

    def _first_log_price(self, place_B: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the initial price, interpolated between knots, [B]."""
        at = place_B * (KNOTS - 1)
        low = at.floor().long().clamp(0, KNOTS - 2)
        part = at - low
        return self.log_prices[low] * (1 - part) + self.log_prices[low + 1] * part

    def cost(self, choices_BSK: torch.Tensor) -> torch.Tensor:
        """Return the cost of choices, one-hot or relaxed, as a share of the full model's, [B]."""
        return self.fixed + torch.einsum("bsk,sk->b", choices_BSK, self.costs_SK)

    @torch.no_grad()
    def path(self, usable_SK: Mask) -> Indices:
        """Return the answers to a fine grid of budgets: sub-networks from the smallest to the full model, [N, S].

        They are nested: no sub-layer gets narrower from one to the next. Below the lowest budget the price keeps
        rising.

        Args:
            usable_SK: choices that may be taken; they include the smallest and the full width.
        """
        place_N = torch.linspace(-1, 1, 2 * GRID)
        budgets_N = self.lowest + (1 - self.lowest) * place_N.clamp(0, 1)
        logits_NSK = self(budgets_N, -BEYOND * place_N.clamp(-1, 0))
        logits_NSK = logits_NSK.masked_fill(~torch.tensor(usable_SK, device=logits_NSK.device), -torch.inf)
        indices_NS = np.asarray(logits_NSK.argmax(-1))
        full_S = np.asarray(self.allowed_SK.sum(-1, keepdim=True).T) - 1
        ends = [
            np.zeros_like(full_S),
            np.maximum.accumulate(indices_NS, axis=0),
            full_S,
        ]  # rounding could narrow a sub-layer
        return np.unique(np.concatenate(ends), axis=0)


def _typical_step(utilities_SK: Floats) -> float:
    """Return a tenth of the median utility step between neighbouring choices, in nats.

    Divided by it, utilities are large compared with the noise of Gumbel-softmax.
    """
    steps = np.abs(np.diff(utilities_SK, axis=1))
    return float(np.median(steps[steps > 0])) / 10 if (steps > 0).any() else 1.0


def _log_prices(utilities_SK: Floats, costs_SK: Floats, fixed: float, allowed_SK: Mask, budgets: Floats) -> Floats:
    """Return, for each budget, the logarithm of the price per unit of cost at which the best choices just fit."""
    utilities = np.where(allowed_SK, utilities_SK, -np.inf)
    low, high = np.full(len(budgets), -10.0), np.full(len(budgets), 16.0)
    for _ in range(50):
        middle = (low + high) / 2
        indices = (utilities - np.exp(middle)[:, None, None] * costs_SK).argmax(-1)
        dear = prices(costs_SK, fixed, indices) > budgets
        low, high = np.where(dear, middle, low), np.where(dear, high, middle)
    return np.minimum.accumulate(high)
