"""`TokenRouting`: runs batches with the widths that a token router gives each token, and counts the widths used.

Shapes: B rows (requests), T time, L layers, K choices of an MLP's width, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch

from flextron.elastic.layers import ElasticLayer
from flextron.elastic.model import ElasticModel
from flextron.inference.per_token import Forward, TokenWidths, masked_mlp, mlp, rows_of_attention, running
from flextron.routers.token.net import TokenRouter
from flextron.subnet import Subnet

HALVINGS = 16
"""Bisection steps of hard mode's search for the price that meets the budget."""
DEAREST = 12.0
"""Largest rise of the log price in hard mode; it gives every token the narrowest width."""


class TokenRouting:
    """Routes the tokens of batches, so that each row keeps its budget on average, and counts the widths used.

    Args:
        budgets: shares of the full model's cost, one for each row of a batch, or one for all.
        subnets: the static router's answers to the budgets; the attention runs with their widths.
        hard: never let a batch cost more than its budgets together; tokens that lose least get narrower widths.
        shuffled: permute each layer's widths among the tokens of the batch at random, as a control.
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
        """Number of tokens that got each width in each layer, without padding, since creation or `forget`."""
        self.seen: Callable[[int, torch.Tensor], None] | None = None
        """Called with each layer's index and its widths [B, T], 0 for padding."""
        self._costs_LK = router.static.costs_SK[:layers, :choices].to(model.device)
        self.attention_costs = [_attention_cost(model, router, subnet) for subnet in subnets]
        """Cost of each row's attention plus the fixed cost, as shares of the full model's cost."""
        for_mlps_B = self.budgets_B - torch.tensor(self.attention_costs, device=model.device)
        with torch.no_grad():
            calibrated_B, self._log_prices_BL, plan_BL = router.calibrated(for_mlps_B)
            self._log_prices_BL[self.budgets_B >= 1] = -torch.inf
            self._shifts_LBR = router.shifts(calibrated_B)
        # after calibration the plan is still a little off the budget's part for the MLPs
        self._plan_BL = plan_BL * (for_mlps_B * (1 - 1e-6) / plan_BL.sum(1).clamp(min=1e-9))[:, None]
        self._left_B = torch.zeros(0)
        self._real_BT: torch.Tensor | None = None

    @contextmanager
    def use(self) -> Iterator[ElasticModel]:
        """Route every batch that the model runs inside the block."""
        rows = self._rows
        runs = [
            (self._run_of(index, layer), rows_of_attention(layer.attention, groups_BT, heads_BT, masked=self.masked))
            for index, (layer, groups_BT, heads_BT) in enumerate(
                zip(self.model.layers, rows.kv_groups, rows.query_heads, strict=True)
            )
        ]
        with running(self.model, runs):
            hook = self.model.lm.register_forward_pre_hook(self._see_batch, with_kwargs=True)
            try:
                yield self.model
            finally:
                hook.remove()
                self._real_BT = None

    def forget(self) -> None:
        """Reset the counts of `used_LK`."""
        self.used_LK.zero_()

    @property
    def costs_of_layers(self) -> torch.Tensor:
        """Mean cost per token of each layer's MLP, as shares of the full model's cost, [L]."""
        return (self.used_LK * self._costs_LK).sum(-1) / self.used_LK.sum(-1).clamp(min=1)

    @property
    def average_cost(self) -> float:
        """Mean cost per token, as a share of the full model's; for the attention all rows count alike."""
        return fmean(self.attention_costs) + float(self.costs_of_layers.sum())

    @property
    def share(self) -> float:
        """Mean share of the layers' weights that a token used."""
        layers = self.model.layers
        kept = sum(
            neurons * layer.mlp.weights_per_unit + float(groups_BT.float().mean()) * layer.attention.weights_per_unit
            for layer, neurons, groups_BT in zip(layers, self.average_neurons, self._rows.kv_groups, strict=True)
        )
        return kept / self.model.layer_weights(self.model.search_space.full)

    @property
    def average_neurons(self) -> list[float]:
        """Mean number of neurons that a token used in each layer."""
        return ((self.used_LK * self._neurons_K).sum(-1) / self.used_LK.sum(-1).clamp(min=1)).tolist()

    def _see_batch(self, _lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the next batch, and remember which of its tokens are padding: these get no neurons."""
        mask = kwargs.get("attention_mask")
        inputs = next(
            each for each in (kwargs.get("input_ids"), *args, kwargs.get("inputs_embeds")) if each is not None
        )
        rows, time = inputs.shape[:2]
        if not rows * time:
            raise ValueError(f"the batch is empty: {rows} rows of {time} tokens; it needs at least one token.")
        if rows % len(self.budgets_B):
            raise ValueError(
                f"{len(self.budgets_B)} budgets for a batch of {rows} rows; give one budget, or one for each row."
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
        rows = len(hidden_BTD) // len(self.budgets_B)  # rows per budget: all, or the beams of a request
        shift_BR, prices_B = self._shifts_LBR[index], self._log_prices_BL[:, index]
        if rows > 1 and len(prices_B) > 1:  # a single budget broadcasts
            shift_BR, prices_B = shift_BR.repeat_interleave(rows, 0), prices_B.repeat_interleave(rows)
        log_prices_BT = prices_B[:, None] - self.router.log_worths(index, hidden_BTD, shift_BR)
        chosen_BT = self.router.choose(index, log_prices_BT)
        if self.shuffled:
            chosen_BT = chosen_BT.flatten()[torch.randperm(chosen_BT.numel())].view_as(chosen_BT)
        if self.hard:
            chosen_BT = self._keep_to_plan(index, log_prices_BT, chosen_BT, rows)
        return chosen_BT

    def _keep_to_plan(
        self, index: int, log_prices_BT: torch.Tensor, chosen_BT: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Raise the price for all tokens until the batch costs at most what the plan allows up to this layer."""
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
