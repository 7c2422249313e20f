"""A forward pass whose tokens run at different levels, in a batch of different texts.

What a token computes is defined as in `inference.per_token`: it uses the first neurons and groups of its level. Keys
and values are written for the groups of its text's widest level, so that the text may get wider later.

Shapes: N tokens of the batch, L layers, U parts of a sub-layer (neurons or query heads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection, Width
from flextron.inference.lean.room import Places
from flextron.inference.lean.step import MOST_TOKENS, LeanStep
from flextron.inference.per_token import mlp, running
from flextron.serving.embedded.attention import NAME, Batch, LayerBatch, register
from flextron.subnet import Subnet

HALVED_ROWS = 16
"""Up to so many rows the weight's rows are multiplied in two halves; above, the product is transposed, up to
`FEW_ROWS`, where torch's linear is as fast. Two threads of an AMD EPYC, all products of SmolLM2: 1 row 29 ms for 39, 8
rows 53 for 68, 32 rows 86 for 106 (benchmarks/serving.py steps)."""
FEW_ROWS = 64


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `F.linear` for few rows in float32 on a CPU, where MKL takes up to 1.6 times as long by itself.

    For models that a `LeanStep` does not run, and for steps of more tokens than it takes.
    """
    rows_RK = x.flatten(0, -2)
    count, size = len(rows_RK), len(weight)
    if count > FEW_ROWS:
        return F.linear(x, weight, bias)
    if count <= HALVED_ROWS and size % 2 == 0:
        halves = weight.as_strided((2, size // 2, weight.shape[1]), (size // 2 * weight.stride(0), *weight.stride()))
        y_RO = torch.bmm(rows_RK.expand(2, -1, -1), halves.transpose(1, 2)).transpose(0, 1).reshape(count, size)
    else:
        y_RO = torch.mm(weight, rows_RK.t()).t()
    y = y_RO.view(*x.shape[:-1], size)
    return y if bias is None else y + bias


class MixedModel:
    """An elastic model that runs batches of texts at different levels. It has the model for itself meanwhile."""

    def __init__(self, model: ElasticModel, levels: Sequence[Subnet]) -> None:
        """Prepare the levels, smallest first."""
        self.model = model
        self.device = model.device
        self._mlps = [
            _MixedMLP(layer.mlp, [level.neurons[i] for level in levels], self.device)
            for i, layer in enumerate(model.layers)
        ]
        self._attentions = [
            _MixedAttention(i, layer.attention, [level.kv_groups[i] for level in levels], self.device)
            for i, layer in enumerate(model.layers)
        ]
        self._neurons_LV = np.array([level.neurons for level in levels]).T
        self._groups_LV = np.array([level.kv_groups for level in levels]).T
        self._lean: LeanStep | None = None
        self.few_tokens = 0
        """Up to so many tokens a step runs by compiled kernels; 0 for models that they do not take."""

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Hold the model inside the block, with the attention over pages; then all is as before."""
        register()
        self._lean = LeanStep.of(self.model)
        self.few_tokens = 0 if self._lean is None else MOST_TOKENS
        config, attention_before = self.model.lm.config, self.model.lm.config._attn_implementation
        runs = [(mlp.run, attention.run) for mlp, attention in zip(self._mlps, self._attentions, strict=True)]
        with self.model.use(self.model.subnet), running(self.model, runs):  # `use` restores the widths
            try:
                config._attn_implementation = NAME
                for attention in self._attentions:
                    attention.part_keys()
                self._set_product(few_rows_linear if self._is_cpu_float32 else None)
                yield
            finally:
                self._set_product(None)
                config._attn_implementation = attention_before
                for attention in self._attentions:
                    attention.join_keys()

    @property
    def _is_cpu_float32(self) -> bool:
        return self.device.type == "cpu" and self.model.lm.dtype == torch.float32

    def _set_product(self, product: Callable[..., torch.Tensor] | None) -> None:
        """Compute all products of the layers and of the output projection by `product`; None: by torch's linear."""
        for _, _, sub in self.model.sub_layers():
            for projection in (*sub.opens, sub.closes):
                projection.multiply = product
        head = cast(nn.Linear, self.model.lm.get_output_embeddings())
        if product is None:
            vars(head).pop("forward", None)
        elif type(head) is nn.Linear:
            vars(head)["forward"] = lambda x: product(x, head.weight, head.bias)

    @torch.inference_mode()
    def logits(
        self, batch: Batch, tokens: Sequence[int], levels: Sequence[int], ceilings: Sequence[int], wanted: Sequence[int]
    ) -> torch.Tensor:
        """Run a batch and return the logits after the tokens at the places `wanted`, [len(wanted), V] in float32.

        Args:
            tokens: of all rows, one row after another.
            levels: the level of each row.
            ceilings: the widest level that each row may get.
        """
        if self._lean is not None and len(tokens) <= self.few_tokens:
            return self._run_lean(self._lean, batch, tokens, levels, ceilings, wanted)
        counts = torch.tensor([row.count for row in batch.rows], device=self.device)
        levels_N = torch.tensor(levels, device=self.device).repeat_interleave(counts)
        same = levels[0] if len(set(levels)) == 1 else None
        for sub in self._mlps:
            sub.choose(levels_N, same)
        for attention in self._attentions:
            attention.choose(batch, levels_N, same, max(levels), max(ceilings))
        output = self.model.lm(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=torch.tensor([batch.positions], device=self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=self.device),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _run_lean(
        self,
        lean: LeanStep,
        batch: Batch,
        tokens: Sequence[int],
        levels: Sequence[int],
        ceilings: Sequence[int],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        levels_N = np.repeat(levels, [row.count for row in batch.rows])
        tables = [row.held.pages for row in batch.rows for _ in range(row.count)]
        places = Places(batch.positions, batch.slots, tables, batch.cache.pool.page_tokens)
        caches = [batch.cache.layer(i, lean.groups, lean.head_size, lean.dtype) for i in range(len(self._attentions))]
        neurons_LN, groups_LN = self._neurons_LV[:, levels_N], self._groups_LV[:, levels_N]
        cached = self._groups_LV[:, : max(ceilings) + 1].max(1).tolist()
        return lean.logits(tokens, places, caches, neurons_LN, groups_LN, cached, wanted)


class _MixedMLP:
    """The MLP of one layer."""

    def __init__(self, sub: SubLayer, widths: Sequence[int], device: torch.device) -> None:
        self._sub = sub
        self._widths = widths
        self._widths_of_level = torch.tensor(widths, device=device)
        self._levels_N = self._widths_of_level
        self._same: int | None = None

    def choose(self, levels_N: torch.Tensor, same: int | None) -> None:
        self._levels_N = levels_N
        self._same = None if same is None else self._widths[same]
        if self._same is not None:
            self._sub.keep(self._same)

    def run(self, forward: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self._same is not None:
            return forward(hidden)  # type: ignore[no-any-return]
        return mlp(self._sub, forward, hidden, self._widths_of_level[self._levels_N][None])


class _MixedAttention:
    """The attention of one layer; its keys and values may be wider than what it mixes."""

    def __init__(self, layer: int, sub: SubLayer, groups: Sequence[int], device: torch.device) -> None:
        self._layer = layer
        self._sub = sub
        self._groups = groups
        self._widest = [max(groups[: level + 1]) for level in range(len(groups))]
        heads = torch.arange(sub.width.full).repeat_interleave(sub.heads_per_unit)
        self._uses = (heads < torch.tensor(groups)[:, None]).to(device)  # [levels, U]
        self._keys = _separate_keys(sub)
        self._width_of_keys = Width(sub.width.full)
        self._paged: LayerBatch | None = None
        self._mask: torch.Tensor | None = None

    def part_keys(self) -> None:
        """Give the projections of keys and values a width of their own, where the family has them apart."""
        for projection in self._keys:
            projection.width = self._width_of_keys

    def join_keys(self) -> None:
        """Undo `part_keys`."""
        for projection in self._keys:
            projection.width = self._sub.width

    def choose(self, batch: Batch, levels_N: torch.Tensor, same: int | None, widest: int, ceiling: int) -> None:
        cached = self._widest[ceiling]
        self._width_of_keys.kept = cached
        mixed = self._widest[widest] if self._keys else cached
        self._sub.keep(mixed)
        self._paged = LayerBatch(batch, self._layer, self._sub.width.full, self._sub.heads_per_unit)
        alike = same is not None and self._groups[same] == mixed
        self._mask = None if alike else self._uses[levels_N, : mixed * self._sub.heads_per_unit][None]

    def run(self, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._width_of_keys.kept:
            return forward(hidden, *args, **kwargs)
        if not self._sub.width.kept:
            return self._only_keys(forward, hidden, *args, **kwargs)
        self._sub.width.mask = self._mask
        try:
            result = forward(hidden, *args, paged=self._paged, **kwargs)
        finally:
            self._sub.width.mask = None
        if self._sub.closes.bias is None or self._mask is None:
            return result
        return (result[0] * self._mask.any(-1, keepdim=True), *result[1:])

    def _only_keys(self, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write keys and values of an attention that no token uses now, but may later."""
        self._sub.keep(1)
        try:
            result = forward(hidden, *args, paged=self._paged, **kwargs)
        finally:
            self._sub.keep(0)
        return (torch.zeros_like(hidden), *result[1:])


def _separate_keys(sub: SubLayer) -> tuple[Projection, ...]:
    """The projections of keys and values, where they are modules of their own; none where all is one matrix."""
    return sub.opens[1:] if len(sub.opens) == 3 and all(p.stacked == 1 for p in sub.opens) else ()
