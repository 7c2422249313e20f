"""`LeanStep`: a few tokens through an elastic model on a CPU, each with its own widths, by compiled kernels.

transformers' forward pass of SmolLM2 takes some 2,000 operations, whose calls cost as much time as reading the weights.
Here all layers are one call of the kernels, which read torch's own memory: no weight of a projection is held twice.
Those of closing projections are laid out anew, column by column (`kernels.columns`).

Which models it computes right is not listed but found out: `LeanStep.of` runs a few tokens both ways and compares.

Shapes: M rows (tokens, rounded up to 1, 2, 4 or a multiple of 8), L layers, D model, G KV groups, S head size.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from flextron.elastic.loss import logits_of
from flextron.elastic.model import ElasticModel
from flextron.inference.lean.angles import Angles
from flextron.inference.lean.parts import last_norm
from flextron.inference.lean.room import PARTS, Memory, Places, Room
from flextron.inference.lean.trial import has_the_parts, kinds_if_equal
from flextron.inference.lean.weights import Kind, Norm, Weights, array_of, matrix_of

MOST_TOKENS = 128
"""Up to so many tokens a step is lean; with more, torch's products are faster than the kernels'."""
_lock = threading.Lock()  # Numba's simplest pool of threads takes one caller at a time
_kinds_of: WeakKeyDictionary[nn.Module, list[Kind] | None] = WeakKeyDictionary()


class LeanStep:
    """Runs steps of up to `MOST_TOKENS` tokens. It holds views of the weights, and copies of the norms' weights.

    The weights of closing projections lie in memory column by column from then on; nothing else about them changes.
    """

    def __init__(self, model: ElasticModel, kinds: Sequence[Kind]) -> None:
        """Prepare a model; `of` knows whether it can be run.

        Args:
            kinds: of each layer's attention.
        """
        lm: Any = model.lm
        self._lm = lm
        self.dtype: torch.dtype = lm.dtype
        """Of the weights, and of keys and values."""
        self._angles = Angles(lm)
        self._weights = Weights(model.layers, kinds, self._angles)
        self._norm = Norm(last_norm(lm))
        self._head = matrix_of(lm.get_output_embeddings())
        self._factor = float(getattr(lm.model, "embedding_multiplier", 1.0))
        first = model.layers[0]
        self.groups = first.attention.width.full
        self.head_size = first.attention.closing_size // (self.groups * first.attention.heads_per_unit)
        self._heads_per_group = first.attention.heads_per_unit
        attention = first.attention.closing_size + 2 * self.groups * self.head_size
        self._widest = max(attention, *(2 * layer.mlp.width.full for layer in model.layers))
        self._rooms: dict[int, Room] = {}
        self._memory = Memory()

    @classmethod
    def of(cls, model: ElasticModel) -> LeanStep | None:
        """Return a step for a model; None where this does not compute what the model computes."""
        if not has_the_parts(model):
            return None
        try:
            if model.lm not in _kinds_of:
                with _told("preparing fast decoding; at its first use on a machine this compiles for some 25 seconds"):
                    _kinds_of[model.lm] = kinds_if_equal(model, cls)
            kinds = _kinds_of[model.lm]
        except (RuntimeError, TypeError, AttributeError, IndexError):  # its modules do not fit together as Llama's do
            kinds = _kinds_of[model.lm] = None
        return None if kinds is None else cls(model, kinds)

    def new_cache(self, tokens: int, groups: int) -> torch.Tensor:
        """Return room for keys and values of the first groups of one layer, [tokens, 2, groups, S]."""
        return torch.zeros(tokens, 2, groups, self.head_size, dtype=self.dtype)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[int],
        places: Places,
        caches: Sequence[torch.Tensor],
        neurons_LM: np.ndarray,
        groups_LM: np.ndarray,
        cached_groups_L: Sequence[int],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Run tokens and return the logits after those at the places `wanted`, [len(wanted), V] in float32.

        Args:
            tokens: at most `MOST_TOKENS`; they may be of several texts.
            caches: of each layer, [tokens, 2, G, S].
            neurons_LM: neurons that each token uses in each layer, int64.
            groups_LM: KV groups that each token uses in each layer, int64.
            cached_groups_L: KV groups whose keys and values are written.
        """
        from flextron.inference.kernels.layers import layers  # Numba takes a second to import, which not all need
        from flextron.inference.kernels.norms import normalize

        count = len(tokens)
        room = self._room(_rounded(count))
        ids = torch.tensor(tokens)
        h_ND = self._lm.model.embed_tokens(ids).float() * self._factor
        room.fill(h_ND, *self._angles.of(places.positions), places)
        addresses = [(cache.data_ptr(), *cache.shape[::2]) for cache in caches]
        groups_LM = room.padded(groups_LM)
        heads = int(groups_LM.max()) * self._heads_per_group
        opened, hidden = (self._memory.of(name, len(room.h) * self._widest) for name in ("opened", "hidden"))
        scores = self._memory.of("scores", len(room.h) * heads * (int(room.positions.max()) + 1))
        with _lock, _in_threads_of_torch() as threads:
            layers(
                room.h,
                self._weights.of_kernel,
                (self._heads_per_group, self.head_size),
                (room.cos, room.sin),
                (room.tables, room.page, room.positions, room.slots),
                np.array(addresses, np.int64),
                array_of(caches[0][:0].flatten()),
                room.padded(neurons_LM),
                groups_LM,
                np.array(cached_groups_L, np.int64),
                (room.normed, opened, hidden, scores, room.sums, -(-threads // PARTS)),
            )
            chosen_MD = np.zeros((_rounded(len(wanted)), room.h.shape[1]), np.float32)
            chosen_MD[: len(wanted)] = room.h[list(wanted)]
            normalize(chosen_MD, self._norm.of_kernel, chosen_MD)
            return logits_of(self._lm, torch.from_numpy(chosen_MD), self._product)[: len(wanted)]

    def _product(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Multiply by the output projection, [M, V]."""
        from flextron.inference.kernels.products import product

        y_VM = np.empty((len(self._head[0]), len(x_MD)), np.float32)
        product(self._head, x_MD.numpy(), y_VM)
        return torch.from_numpy(y_VM).t().contiguous()

    def _room(self, rows: int) -> Room:
        if rows not in self._rooms:
            self._rooms[rows] = Room(rows, self._lm.config.hidden_size, len(self._angles.kinds))
        return self._rooms[rows]


@contextmanager
def _told(line: str) -> Iterator[None]:
    """Print a line to standard error, if the block takes more than two seconds."""
    timer = threading.Timer(2.0, print, [line], {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _in_threads_of_torch() -> Iterator[int]:
    """Compute in as many threads as torch does, and yield how many.

    Numba shares OpenMP with torch, and sets its number when it starts.
    """
    import numba

    threads, most = torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)
    try:
        numba.set_num_threads(min(threads, most))
        yield min(threads, most)
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _rounded(rows: int) -> int:
    return rows if rows <= 2 else -(-rows // 4) * 4
