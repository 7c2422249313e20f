"""Tokens routed one by one: a batch runs with the widths that a token router gives, and what it used is counted.

Shapes: B rows (requests), T time, L layers, K choices of an MLP's width, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch

from flextron.elastic.model import ElasticLayer, ElasticModel
from flextron.inference.per_token import Forward, TokenWidths, masked_mlp, mlp, rows_of_attention, running
from flextron.routers.token.net import TokenRouter
from flextron.subnet import Subnet

HALVINGS = 16
"""Of the interval in which the hard mode looks for the price at which a batch keeps its budget."""
DEAREST = 12.0
"""How far the hard mode raises the logarithm of a price: to the narrowest widths."""


class TokenRouting:
    """How the rows of a batch are routed, each within its budget on average over tokens, and what they used.

    Args:
        budgets: shares of the full model's cost, one for each row of every batch, or one for all.
        subnets: the static router's answers to them, of which the attention runs.
        hard: no batch costs more than its budgets together; the tokens that lose least get narrower.
        shuffled: give the widths of each layer to other tokens of the batch at random: a control.
        masked: compute by the definition, at the full model's cost.
    """

    def __init__(
        self,
        model: ElasticModel,
        router: TokenRouter,
        budgets: Sequence[float],
        subnets: Sequence[Subnet],
        *,
        hard: bool = False,
        shuffled: bool = False,
        masked: bool = False,
    ) -> None:
        self.model, self.router = model, router.to(model.device)
        self.hard, self.shuffled, self.masked = hard, shuffled, masked
        self.budgets_B = torch.tensor(budgets, dtype=torch.float32, device=model.device)
        self.subnets = tuple(subnets)
        self._rows = TokenWidths.of_rows(model, subnets)
        self._neurons_K = torch.tensor(model.search_space.neurons, device=model.device)
        layers, choices = len(model.layers), len(model.search_space.neurons)
        self.used_LK = torch.zeros(layers, choices, dtype=torch.int64, device=model.device)
        """Tokens that got each width in each layer, padding apart, since this was made."""
        self.seen: Callable[[int, torch.Tensor], None] | None = None
        """Told of each layer's widths, [B, T], as they are chosen."""
        self._costs_LK = router.static.costs_SK[:layers, :choices].to(model.device)
        self.attention_costs = [_attention_cost(model, router, subnet) for subnet in subnets]
        """Of each row, with what no choice changes; shares of the full model's cost."""
        for_mlps_B = self.budgets_B - torch.tensor(self.attention_costs, device=model.device)
        with torch.no_grad():
            places_B, self._log_prices_BL, plan_BL = router.calibrated(for_mlps_B)
            self._log_prices_BL[self.budgets_B >= 1] = -torch.inf
            self._shifts_LBR = router.shifts(places_B)
        # calibration leaves the plan a little above or below what the budget has for MLPs
        self._plan_BL = plan_BL * (for_mlps_B * (1 - 1e-6) / plan_BL.sum(1).clamp(min=1e-9))[:, None]
        self._left_B = torch.zeros(0)
        self._real_BT: torch.Tensor | None = None

    @contextmanager
    def use(self) -> Iterator[ElasticModel]:
        """Run the model so inside the block."""
        rows = self._rows
        runs = [
            (self._run_of(index, layer), rows_of_attention(layer.attention, groups_BT, heads_BT, masked=self.masked))
            for index, (layer, groups_BT, heads_BT) in enumerate(
                zip(self.model.layers, rows.kv_groups, rows.query_heads, strict=True)
            )
        ]
        hook = self.model.lm.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        try:
            with running(self.model, runs):
                yield self.model
        finally:
            hook.remove()
            self._real_BT = None

    def forget(self) -> None:
        """Count what is used anew."""
        self.used_LK.zero_()

    @property
    def costs_of_layers(self) -> torch.Tensor:
        """Cost per token that the MLP of each layer had, in shares of the full model's cost, [L]."""
        return (self.used_LK * self._costs_LK).sum(-1) / self.used_LK.sum(-1).clamp(min=1)

    @property
    def average_cost(self) -> float:
        """Cost per token of what was used, as a share of the full model's; each row counts alike in its attention."""
        return fmean(self.attention_costs) + float(self.costs_of_layers.sum())

    @property
    def share(self) -> float:
        """Share of the layers' weights that a token has used on average."""
        layers = self.model.layers
        kept = sum(
            neurons * layer.mlp.weights_per_unit + float(groups_BT.float().mean()) * layer.attention.weights_per_unit
            for layer, neurons, groups_BT in zip(layers, self.average_neurons, self._rows.kv_groups, strict=True)
        )
        return kept / self.model.layer_weights(self.model.search_space.full)

    @property
    def average_neurons(self) -> list[float]:
        """Neurons per token that each layer ran."""
        return ((self.used_LK * self._neurons_K).sum(-1) / self.used_LK.sum(-1).clamp(min=1)).tolist()

    def _see_batch(self, _lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the batch that comes, and remember which tokens of it are padding: they get no neurons."""
        mask = kwargs.get("attention_mask")
        inputs = next(
            each for each in (kwargs.get("input_ids"), *args, kwargs.get("inputs_embeds")) if each is not None
        )
        rows, time = inputs.shape[:2]
        if not rows * time:
            raise ValueError(f"the batch is empty: {rows} rows of {time} tokens.")
        if rows % len(self.budgets_B):
            raise ValueError(
                f"{len(self.budgets_B)} budgets for a batch of {rows} rows: name one budget, or one for each row."
            )
        padded = isinstance(mask, torch.Tensor) and mask.dim() == 2
        self._real_BT = mask[:, -time:].bool() if padded else None  # type: ignore[index]

    def _run_of(self, index: int, layer: ElasticLayer) -> Forward:
        compute = masked_mlp if self.masked else mlp

        def run(forward: Forward, hidden_BTD: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                chosen_BT = self._choose(index, hidden_BTD)
                widths_BT = self._neurons_K[chosen_BT]
                real_BT = self._real_BT
                if real_BT is not None and real_BT.shape == widths_BT.shape:
                    widths_BT = widths_BT * real_BT
                    chosen_BT = chosen_BT[real_BT]
                self.used_LK[index] += torch.bincount(chosen_BT.flatten(), minlength=len(self._neurons_K))
                if self.seen is not None:
                    self.seen(index, widths_BT)
            return compute(layer.mlp, forward, hidden_BTD, widths_BT)

        return run

    def _choose(self, index: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        rows = len(hidden_BTD) // len(self.budgets_B)  # that share a budget: all, or the beams of a request
        shift_BR, prices_B = self._shifts_LBR[index], self._log_prices_BL[:, index]
        if rows > 1 and len(prices_B) > 1:  # one for all needs no copies
            shift_BR, prices_B = shift_BR.repeat_interleave(rows, 0), prices_B.repeat_interleave(rows)
        log_prices_BT = prices_B[:, None] - self.router.log_worths(index, hidden_BTD, shift_BR)
        chosen_BT = self.router.choose(index, log_prices_BT)
        if self.shuffled:
            chosen_BT = chosen_BT.flatten()[torch.randperm(chosen_BT.numel())].view_as(chosen_BT)
        if self.hard:
            chosen_BT = self._within(index, log_prices_BT, chosen_BT, rows)
        return chosen_BT

    def _within(self, index: int, log_prices_BT: torch.Tensor, chosen_BT: torch.Tensor, rows: int) -> torch.Tensor:
        """Narrower choices, by a higher price for all, until the batch keeps to the plan of all layers so far."""
        if index == 0:
            self._left_B = torch.zeros(1, device=chosen_BT.device)
        real_BT = torch.ones_like(chosen_BT, dtype=torch.bool) if self._real_BT is None else self._real_BT
        planned_B = self._plan_BL[:, index].repeat_interleave(rows, 0)
        allowed = (planned_B[:, None] * real_BT).sum() + self._left_B

        def cost_of(chosen_BT: torch.Tensor) -> torch.Tensor:
            return (self._costs_LK[index][chosen_BT] * real_BT).sum()

        low, high = torch.zeros_like(allowed), torch.full_like(allowed, DEAREST)
        if bool(cost_of(chosen_BT) > allowed):
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                fits = cost_of(self.router.choose(index, log_prices_BT + middle)) <= allowed
                low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
            chosen_BT = self.router.choose(index, log_prices_BT + high)
        self._left_B = allowed - cost_of(chosen_BT)
        return chosen_BT


def _attention_cost(model: ElasticModel, router: TokenRouter, subnet: Subnet) -> float:
    groups = model.search_space.kv_groups
    rows_LK = router.static.costs_SK[len(model.layers) :]
    return router.static.fixed + sum(
        float(row_K[groups.index(width)]) for row_K, width in zip(rows_LK, subnet.kv_groups, strict=True)
    )
