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
        self.slots = [slot for row in rows for slot in cache.slots(row.held, row.past, row.count)]
        self.slots_N = torch.tensor(self.slots, device=device)
        self.positions = [row.past + i for row in rows for i in range(row.count)]
        shortest = LONG_TEXT if device.type == "cpu" else 1 << 30
        together = [row for row in rows if row.count == 1 and row.past < shortest]
        groups = [together] if len(together) > 1 else []
        groups += [[row] for row in rows if not groups or row not in together]
        self.readings = [Reading.of(cache, group, device, whole=len(groups) == 1) for group in groups]


@dataclass(frozen=True)
class Reading:
    """Rows that read the cache in one operation: several texts that each have one token, or one text."""

    places: torch.Tensor | None
    """Of their tokens in the batch, [B * Q]; None where they are the whole batch in its order."""
    texts: int
    pages: Pages
    positions_BQ: torch.Tensor
    """Of their tokens in their texts."""
    length: int
    """Tokens that are read of each text; those that a text does not have are masked."""
    masks: dict[tuple[int | None, int, torch.dtype], torch.Tensor | None]
    """Filled when first asked for; see `mask`."""

    @classmethod
    def of(cls, cache: PagedCache, rows: Sequence[Row], device: torch.device, *, whole: bool) -> Reading:
        """Prepare what is the same in all layers.

        Args:
            whole: these are all rows of the batch.
        """
        positions = torch.tensor([range(row.past, row.past + row.count) for row in rows], device=device)
        places = [place for row in rows for place in range(row.first, row.first + row.count)]
        length = max(row.past + row.count for row in rows)
        pages = cache.pages([row.held for row in rows], length)
        return cls(None if whole else torch.tensor(places, device=device), len(rows), pages, positions, length, {})

    def mask(self, window: int | None, per_group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what is added to the scores, [B, 1, M, T]: 0 for a token that is seen, else minus infinity.

        None where each token sees all of them.
        """
        key = (window, per_group, dtype)
        if key not in self.masks:
            seen_T = torch.arange(self.length, device=self.positions_BQ.device)
            mask_BQT = seen_T <= self.positions_BQ[..., None]
            if window is not None:
                mask_BQT &= seen_T > self.positions_BQ[..., None] - window
            added_BQT = torch.zeros(mask_BQT.shape, dtype=dtype, device=mask_BQT.device)
            added_B1MT = added_BQT.masked_fill_(~mask_BQT, -torch.inf).repeat(1, per_group, 1)[:, None]
            self.masks[key] = None if bool(mask_BQT.all()) else added_B1MT
        return self.masks[key]


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_NHD, key_NGD, value_NGD = (states[0].transpose(0, 1) for states in (query, key, value))
    batch, groups = paged.batch, query_NHD.shape[1] // paged.heads_per_group
    batch.cache.write(paged.layer, batch.slots_N, key_NGD, value_NGD, paged.full_groups)
    output_NHD = query_NHD.new_empty(query_NHD.shape) if len(batch.readings) > 1 else query_NHD
    for reading in batch.readings:
        key_BTGD, value_BTGD = batch.cache.read(paged.layer, reading.pages, reading.length, groups)
        some_NHD = query_NHD if reading.places is None else query_NHD.index_select(0, reading.places)
        mask = reading.mask(sliding_window, paged.heads_per_group, query_NHD.dtype)
        query_BQHD = some_NHD.reshape(reading.texts, -1, *some_NHD.shape[1:])
        mixed_NHD = _attend(query_BQHD, key_BTGD, value_BTGD, mask, scale, softcap).flatten(0, 1)
        if reading.places is None:
            return mixed_NHD[None], None
        output_NHD[reading.places] = mixed_NHD
    return output_NHD[None], None


def _attend(
    query_BQHD: torch.Tensor,
    key_BTGD: torch.Tensor,
    value_BTGD: torch.Tensor,
    mask_B1MT: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of each text to its own keys. The heads of a group stand as tokens, so that no key is repeated."""
    texts, count, heads, size = query_BQHD.shape
    groups = key_BTGD.shape[2]
    per_group = heads // groups
    query_BGMD = query_BQHD.view(texts, count, groups, per_group, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key_BGTD, value_BGTD = key_BTGD.transpose(1, 2), value_BTGD.transpose(1, 2)
    if softcap is None:
        mixed = F.scaled_dot_product_attention(query_BGMD, key_BGTD, value_BGTD, attn_mask=mask_B1MT, scale=scale)
    else:
        mixed = _softly_capped(query_BGMD, key_BGTD, value_BGTD, mask_B1MT, scale, softcap)
    by_head: torch.Tensor = mixed.reshape(texts, groups, per_group, count, -1)
    return by_head.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _softly_capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """As Gemma 2 has it: scores are capped by a tangent before the softmax."""
    scores = cap * torch.tanh(query @ key.transpose(-1, -2) * scale / cap)
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(-1).to(value.dtype) @ value


def register() -> None:
    """Make the attention known to transformers by its name."""
    AttentionInterface.register(NAME, paged_attention)
