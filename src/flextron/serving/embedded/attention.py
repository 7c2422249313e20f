"""Attention of a batch whose rows are different texts, over `PagedCache`: each row sees the tokens of its own text.

It is an attention function of transformers (`AttentionInterface`), so that the families' own forward passes call it.

Shapes: N tokens of the batch, B texts that are read together, Q tokens of each, T tokens that they see, H query heads,
G KV groups, M = Q times the heads of a group, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from flextron.serving.embedded.pages import Held, PagedCache, Pages

NAME = "flextron_paged"
LONG_TEXT = 512
"""From so many tokens on, a text that writes is read by itself on a CPU, mostly without a copy. Shorter ones are
gathered, which is a copy, and attended to in one operation: 30 small operations a step instead of 30 for each text."""


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
        shortest = LONG_TEXT if device.type == "cpu" else 1 << 30
        together = [row for row in rows if row.count == 1 and row.past < shortest]
        groups = [together] if len(together) > 1 else []
        groups += [[row] for row in rows if not groups or row not in together]
        self.readings = [Reading.of(cache, group, device) for group in groups]


@dataclass(frozen=True)
class Reading:
    """Rows that read the cache in one operation: several texts that each have one token, or one text."""

    places: torch.Tensor
    """Of their tokens in the batch, [B * Q]."""
    texts: int
    pages: Pages
    positions_BQ: torch.Tensor
    """Of their tokens in their texts."""
    length: int
    """Tokens that are read of each text; those that a text does not have are masked."""
    masks: dict[int | None, torch.Tensor | None]
    """Which tokens are seen, by the sliding window: [B, 1, Q, T]; filled when first asked for."""

    @classmethod
    def of(cls, cache: PagedCache, rows: Sequence[Row], device: torch.device) -> Reading:
        """Prepare what is the same in all layers."""
        positions = torch.tensor([range(row.past, row.past + row.count) for row in rows], device=device)
        places = torch.tensor([place for row in rows for place in range(row.first, row.first + row.count)])
        length = max(row.past + row.count for row in rows)
        pages = cache.pages([row.held for row in rows], length)
        return cls(places.to(device), len(rows), pages, positions, length, {})

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return which tokens each token sees; None for all of them."""
        if window not in self.masks:
            seen_T = torch.arange(self.length, device=self.places.device)
            mask_BQT = seen_T <= self.positions_BQ[..., None]
            if window is not None:
                mask_BQT &= seen_T > self.positions_BQ[..., None] - window
            self.masks[window] = None if bool(mask_BQT.all()) else mask_BQT[:, None]
        return self.masks[window]


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
    tokens, size = query.shape[2], value.shape[-1]
    output_NHD = query.new_empty(tokens, query.shape[1], size)
    for reading in batch.readings:
        key_BTGD, value_BTGD = batch.cache.read(paged.layer, reading.pages, reading.length, groups)
        query_NHD = query[0].index_select(1, reading.places).transpose(0, 1)
        query_BQHD = query_NHD.reshape(reading.texts, -1, *query_NHD.shape[1:])
        mixed_BQHD = _attend(query_BQHD, key_BTGD, value_BTGD, reading.mask(sliding_window), scale, softcap)
        output_NHD[reading.places] = mixed_BQHD.flatten(0, 1)
    return output_NHD[None], None


def _attend(
    query_BQHD: torch.Tensor,
    key_BTGD: torch.Tensor,
    value_BTGD: torch.Tensor,
    mask_B1QT: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of each text to its own keys. The heads of a group stand as tokens, so that no key is repeated."""
    texts, count, heads, size = query_BQHD.shape
    groups = key_BTGD.shape[2]
    per_group = heads // groups
    query_BGMD = query_BQHD.view(texts, count, groups, per_group, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key_BGTD, value_BGTD = key_BTGD.transpose(1, 2), value_BTGD.transpose(1, 2)
    mask = None if mask_B1QT is None else mask_B1QT.repeat(1, 1, per_group, 1)
    if softcap is None:
        mixed = F.scaled_dot_product_attention(query_BGMD, key_BGTD, value_BGTD, attn_mask=mask, scale=scale)
    else:
        mixed = _softly_capped(query_BGMD, key_BGTD, value_BGTD, mask, scale, softcap)
    by_head: torch.Tensor = mixed.reshape(texts, groups, per_group, count, -1)
    return by_head.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _softly_capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """As Gemma 2 has it: scores are capped by a tangent before the softmax."""
    scores = cap * torch.tanh(query @ key.transpose(-1, -2) * scale / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.float().softmax(-1).to(value.dtype) @ value


def register() -> None:
    """Make the attention known to transformers by its name."""
    AttentionInterface.register(NAME, paged_attention)
