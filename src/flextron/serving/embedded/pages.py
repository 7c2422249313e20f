"""Keys and values of all requests, in pages of a fixed number of tokens; equal beginnings at equal levels are shared.

A page is filled by one request. Once it is full, and all its tokens and those before ran at one level, it gets a name:
a hash of the level and of all tokens up to its end. Requests that begin with the same tokens at the same level share
it. Keys and values of another level would be wrong, so that the level is a part of the name.

Shapes: N tokens to write, B texts that are read together, T tokens of each, G KV groups, H head size.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch

PAGE_TOKENS = 32
Pages: TypeAlias = "int | torch.Tensor"
"""Where to read: the first page of one text whose pages adjoin, or the pages of several texts, [B, pages]."""


class NoPagesError(Exception):
    """All pages are held by running requests."""


@dataclass
class Held:
    """The pages of one request."""

    level: int | None
    """The level of all tokens so far; None once they differ, after which pages are not shared any more."""
    pages: list[int] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("i"))
    """The tokens whose keys and values are written."""
    named: int = 0
    """Pages, from the first, that have a name."""
    name: bytes = b""
    """Name of the last named page."""


class PagePool:
    """Which pages are free, held or kept for later requests. It knows no tensors."""

    def __init__(self, pages: int, page_tokens: int = PAGE_TOKENS) -> None:
        self.page_tokens = page_tokens
        self._holders = [0] * pages
        self._free = set(range(pages))
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Named pages that nobody holds, the longest unused first."""

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def held(self) -> int:
        """Number of pages that requests hold."""
        return len(self) - len(self._free) - len(self._kept)

    def match(self, prompt: Sequence[int], level: int) -> Held:
        """Hold the pages that begin with `prompt` at `level`, whole pages only; at least one token is left to run."""
        held = Held(level)
        for start in range(0, len(prompt) - self.page_tokens, self.page_tokens):
            tokens = array("i", prompt[start : start + self.page_tokens])
            name = _name(held, tokens)
            page = self._by_name.get(name)
            if page is None:
                break
            self._take(page)
            held.pages.append(page)
            held.tokens.extend(tokens)
            held.named, held.name = held.named + 1, name
        return held

    def missing(self, held: Held, tokens: int) -> int:
        """Return how many pages `tokens` more tokens need beside those that are held."""
        return -(-(len(held.tokens) + tokens) // self.page_tokens) - len(held.pages)

    @property
    def available(self) -> int:
        """Number of pages that can be taken."""
        return len(self._free) + len(self._kept)

    def extend(self, held: Held, tokens: int) -> None:
        """Hold enough pages for `tokens` more tokens.

        Raises:
            NoPagesError: there are not as many; then none is taken.
        """
        missing = self.missing(held, tokens)
        if missing > self.available:
            raise NoPagesError(f"{missing} pages are needed, {self.available} are free")
        for _ in range(missing):
            held.pages.append(self._next(held.pages[-1] + 1 if held.pages else None))

    def written(self, held: Held, tokens: Sequence[int], level: int) -> None:
        """Note tokens whose keys and values have been written at `level`, and name the pages that are full."""
        held.tokens.extend(tokens)
        if level != held.level:
            held.level = None
        while held.level is not None and (held.named + 1) * self.page_tokens <= len(held.tokens):
            start = held.named * self.page_tokens
            held.name = _name(held, held.tokens[start : start + self.page_tokens])
            page = held.pages[held.named]
            if held.name not in self._by_name:
                self._by_name[held.name] = page
                self._names[page] = held.name
            held.named += 1

    def release(self, held: Held) -> None:
        """Give all pages back; named ones are kept as long as there is room."""
        for page in held.pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._kept[page] = None
            else:
                self._free.add(page)
        held.pages, held.tokens, held.named, held.name = [], array("i"), 0, b""

    def _take(self, page: int) -> None:
        self._kept.pop(page, None)
        self._free.discard(page)
        self._holders[page] += 1

    def _next(self, wanted: int | None) -> int:
        """Take a page: the wanted one where it is free, as neighbours in memory need no copy when they are read."""
        if wanted is not None and wanted in self._free:
            page = wanted
        elif self._free:
            page = self._roomy()
        else:
            page, _ = self._kept.popitem(last=False)
            self._drop_name(page)
        self._take(page)
        return page

    def _roomy(self) -> int:
        """Return a free page with free ones after it: the middle of the longest run, where two texts may grow."""
        ordered = sorted(self._free)
        best, start = (0, ordered[0]), 0
        for place in range(1, len(ordered) + 1):
            if place == len(ordered) or ordered[place] != ordered[place - 1] + 1:
                best = max(best, (place - start, ordered[start]))
                start = place
        length, first = best
        return first if first == 0 or not self._holders[first - 1] else first + length // 2

    def _drop_name(self, page: int) -> None:
        name = self._names.pop(page)
        if self._by_name.get(name) == page:
            del self._by_name[name]


def _name(held: Held, tokens: array[int]) -> bytes:
    digest = hashlib.blake2b(held.name or str(held.level).encode(), digest_size=16)
    digest.update(tokens.tobytes())
    return digest.digest()


class PagedCache:
    """The tensors behind a `PagePool`: for each layer, keys and values together, [tokens, 2, G, H]."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._layers: dict[int, torch.Tensor] = {}

    def slots(self, held: Held, first: int, count: int) -> Iterator[int]:
        """Yield the places of `count` tokens of a request, from its token `first` on."""
        size = self.pool.page_tokens
        return (held.pages[token // size] * size + token % size for token in range(first, first + count))

    def layer(
        self, layer: int, groups: int, size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return keys and values of one layer, [tokens, 2, groups, size]; room is made at the first call."""
        if layer not in self._layers:
            shape = (len(self.pool) * self.pool.page_tokens, 2, groups, size)
            self._layers[layer] = torch.zeros(shape, dtype=dtype, device=device)
        return self._layers[layer]

    def write(
        self, layer: int, slots_N: torch.Tensor, key_NGH: torch.Tensor, value_NGH: torch.Tensor, full: int
    ) -> None:
        """Write keys and values of the first of `full` groups."""
        cached = self.layer(layer, full, key_NGH.shape[-1], key_NGH.dtype, key_NGH.device)
        for part, new in enumerate((key_NGH, value_NGH)):
            cached[:, part, : new.shape[1]].index_copy_(0, slots_N, new)

    def pages(self, texts: Sequence[Held], length: int) -> Pages:
        """Return where to read `length` tokens of each text; for what it does not have, its last page again."""
        count = -(-length // self.pool.page_tokens)
        ids = [(held.pages[:count] + held.pages[-1:] * count)[:count] for held in texts]
        if len(ids) == 1 and all(after == before + 1 for before, after in pairwise(ids[0])):
            return ids[0][0]
        return torch.tensor(ids)

    def read(self, layer: int, pages: Pages, length: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, each [B, T, G, H], of the first groups; views where one text's pages adjoin."""
        size, cached = self.pool.page_tokens, self._layers[layer]
        if isinstance(pages, int):
            read = cached[None, pages * size : pages * size + length]
        else:  # whole pages are rows, which are copied three times as fast as by an index of two dimensions
            rows = cached.view(len(self.pool), -1).index_select(0, pages.flatten())
            read = rows.view(len(pages), -1, *cached.shape[1:])[:, :length]
        keys, values = read[..., :groups, :].unbind(2)
        return keys, values
