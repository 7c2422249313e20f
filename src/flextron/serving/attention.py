"""Attention of a batch whose rows are different texts, over `PagedCache`: each row sees the tokens of its own text.

It is an attention function of transformers (`AttentionInterface`), so that the families' own forward passes call it.

Shapes: N tokens of the batch, Q tokens of a row, T tokens that it sees, H query heads, G KV groups, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from flextron.serving.pages import Held, PagedCache

NAME = "flextron_paged"


@dataclass(frozen=True)
class Row:
    """The tokens of one text in a batch."""

    held: Held
    first: int
    """Place of its first token in the batch."""
    count: int
    past: int
    """Tokens of the text before them."""

    @property
    def span(self) -> slice:
        """Where its tokens are in the batch."""
        return slice(self.first, self.first + self.count)


class Batch:
    """The rows of one forward pass, and the cache that they read and write."""

    def __init__(self, cache: PagedCache, rows: Sequence[Row], device: torch.device) -> None:
        self.cache = cache
        self.rows = rows
        slots = [slot for row in rows for slot in cache.slots(row.held, row.past, row.count)]
        self.slots_N = torch.tensor(slots, device=device)
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, row: Row, window: int | None) -> torch.Tensor | None:
        """Which tokens each of a row's tokens sees, [Q, T]; None for all of them."""
        if row.count == 1 and (window is None or row.past < window):
            return None
        key = (row.past, row.count, window)
        if key not in self._masks:
            seen_QT = torch.ones(row.count, row.past + row.count, dtype=torch.bool, device=self.slots_N.device)
            seen_QT = seen_QT.tril(row.past)
            self._masks[key] = seen_QT if window is None else seen_QT.triu(row.past - window + 1)
        return self._masks[key]


@dataclass(frozen=True)
class LayerBatch:
    """A batch in one layer."""

    batch: Batch
    layer: int
    full_groups: int
    heads_per_group: int


def paged_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: LayerBatch | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Write new keys and values, and return what each token attends to, [1, N, H, D].

    Args:
        query: [1, H, N, D]. There may be fewer query heads than the groups of `key` and `value` have: those of the
            first groups.
        key, value: [1, G, N, D].

    Raises:
        ValueError: called outside a batch of the serving engine.
    """
    if paged is None:
        raise ValueError(f"the attention {NAME!r} runs in flextron's serving engine only.")
    batch, groups = paged.batch, query.shape[1] // paged.heads_per_group
    new_keys, new_values = (states[0].transpose(0, 1) for states in (key, value))
    batch.cache.write(paged.layer, batch.slots_N, new_keys, new_values, paged.full_groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for row in batch.rows:
        seen = batch.cache.read(paged.layer, row.held, row.past + row.count, groups)
        key_GTD, value_GTD = (states.transpose(0, 1) for states in seen)
        query_HQD = query[0, :, row.span]
        mask = batch.mask(row, sliding_window)
        if softcap is None:
            output_HQD = _attend(query_HQD, key_GTD, value_GTD, mask, scale)
        else:
            output_HQD = _attend_softly_capped(query_HQD, key_GTD, value_GTD, mask, scale, softcap)
        outputs.append(output_HQD.transpose(0, 1))
    return torch.cat(outputs)[None], None


def _attend(
    query_HQD: torch.Tensor, key_GTD: torch.Tensor, value_GTD: torch.Tensor, mask_QT: torch.Tensor | None, scale: float
) -> torch.Tensor:
    heads, count, size = query_HQD.shape
    groups = len(key_GTD)
    if count == 1:  # the heads of a group as if they were its tokens: no key is repeated
        query_GRD = query_HQD.view(groups, heads // groups, size)
        mask = None if mask_QT is None else mask_QT.expand(heads // groups, -1)
        grouped = F.scaled_dot_product_attention(
            query_GRD[None], key_GTD[None], value_GTD[None], attn_mask=mask, scale=scale
        )
        return grouped.view(heads, 1, -1)
    output = F.scaled_dot_product_attention(
        query_HQD[None], key_GTD[None], value_GTD[None], attn_mask=mask_QT, scale=scale, enable_gqa=heads != groups
    )
    return output[0]


def _attend_softly_capped(
    query_HQD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTD: torch.Tensor,
    mask_QT: torch.Tensor | None,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """As Gemma 2 has it: scores are capped by a tangent before the softmax."""
    heads = len(query_HQD)
    key_HTD, value_HTD = (states.repeat_interleave(heads // len(key_GTD), 0) for states in (key_GTD, value_GTD))
    scores_HQT = cap * torch.tanh(query_HQD @ key_HTD.transpose(1, 2) * scale / cap)
    if mask_QT is not None:
        scores_HQT = scores_HQT.masked_fill(~mask_QT, -torch.inf)
    return scores_HQT.float().softmax(-1).to(value_HTD.dtype) @ value_HTD


def register() -> None:
    """Make the attention known to transformers by its name."""
    AttentionInterface.register(NAME, paged_attention)
