"""lm-eval's `HFLM` for an elastic model, which computes shared beginnings of texts only once.

All questions of a task begin with the same examples, and all answers to a question have the same context. Here such a
beginning runs once, and what follows continues its KV cache. Only logits that are scored are computed. No padding
stands between a context and its continuation, so sliding windows see the same as without batches.

Shapes: C contexts, R rows (one for each continuation), T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from flextron.data.blocks import batch_tokens as usual_batch_tokens
from flextron.elastic.model import ElasticModel
from flextron.progress import bar

LEAST_SHARED = 64
"""Contexts that share at least this many tokens share a cache."""
CACHED = 16
"""A cache may hold this many times the tokens of a batch."""
CHUNK_TOKENS = 512
"""Tokens of continuations that a CPU runs at once: enough to keep it busy, few enough for memory."""
Tokens = tuple[int, ...]


@dataclass
class _Context:
    """A context, and the continuations to score after it."""

    tokens: Tokens
    places: list[int]
    continuations: list[Tokens]

    @property
    def to_compute(self) -> int:
        return sum(map(len, self.continuations))


class _Row(NamedTuple):
    """A continuation to score."""

    place: int
    """Index of its request."""
    context: int
    """Index of its context in the batch."""
    tokens: Tokens


class ElasticLM(HFLM):  # type: ignore[misc]
    """lm-eval's view of an elastic model. It runs the sub-network in use, on the model's own weights."""

    def __init__(self, model: ElasticModel, *, batch_tokens: int | None = None) -> None:
        tokenizer = copy.deepcopy(model.tokenizer)  # a copy, because HFLM adds a padding token
        super().__init__(pretrained=model.lm, tokenizer=tokenizer, backend="causal")
        self.batch_tokens = batch_tokens or usual_batch_tokens(model.device)
        self.chunk_tokens = usual_batch_tokens(model.device, CHUNK_TOKENS)
        self.encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        """Tokens of each pair of texts, kept because every run on a task has the same pairs."""
        self.shown: str | None = None
        """Title of the progress bar. None shows no bar."""
        self.stderr = sys.stderr
        """Where the progress bar goes, even while lm-eval's own output to standard error is hidden."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = (context, continuation)
        if pair not in self.encoded:
            self.encoded[pair] = super()._encode_pair(context, continuation)
        return self.encoded[pair]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request, the continuation's log-probability in nats, and whether greedy decoding would write it."""
        contexts: dict[Tokens, _Context] = {}
        for place, (_request, context, continuation) in enumerate(requests):
            kept = tuple(context[-(self.max_length + 1 - len(continuation)) :])
            found = contexts.setdefault(kept, _Context(kept, [], []))
            found.places.append(place)
            found.continuations.append(tuple(continuation))
        answers: dict[int, tuple[float, bool]] = {}
        with redirect_stderr(self.stderr), self._bar(len(contexts)) as advance:
            for shared, group in _groups(sorted(contexts.values(), key=lambda each: each.tokens)):
                cache = self._cache_of(group[0].tokens[:shared])
                for batch in self._batches(group, shared):
                    answers.update(self._score(batch, shared, cache))
                    for _context in batch:
                        advance()
        return [answers[place] for place in range(len(requests))]

    def _bar(self, total: int) -> Any:
        return bar(total, description=self.shown or "", show=self.shown is not None)

    def _cache_of(self, tokens: Tokens) -> Any:
        cache = DynamicCache(config=self.model.config)
        if tokens:
            self.model(self._tensor([tokens]), past_key_values=cache, logits_to_keep=1)
        return cache

    def _batches(self, group: Sequence[_Context], shared: int) -> Iterator[list[_Context]]:
        """Yield batches of contexts of equal length, the longest first, as large as `batch_tokens` allows."""
        by_length: dict[int, list[_Context]] = defaultdict(list)
        for context in group:
            by_length[len(context.tokens)].append(context)
        for length in sorted(by_length, reverse=True):
            batch: list[_Context] = []
            computed = cached = 0
            for context in by_length[length]:
                longest = max(map(len, context.continuations))
                computes = length - shared + context.to_compute
                caches = len(context.continuations) * (length + longest)
                full = computed + computes > self.batch_tokens or cached + caches > CACHED * self.batch_tokens
                if batch and full:
                    yield batch
                    batch, computed, cached = [], 0, 0
                batch.append(context)
                computed, cached = computed + computes, cached + caches
            yield batch

    def _score(self, batch: Sequence[_Context], shared: int, cache: Any) -> dict[int, tuple[float, bool]]:
        """The answers of a batch, by the index of their requests."""
        cache = _copied(cache)
        if shared:
            cache.batch_repeat_interleave(len(batch))
        logits_CV = self.model(
            self._tensor([context.tokens[shared:] for context in batch]), past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        log_CV = F.log_softmax(logits_CV.float(), -1)
        all_rows = [
            _Row(place, number, tokens)
            for number, context in enumerate(batch)
            for place, tokens in zip(context.places, context.continuations, strict=True)
        ]
        contexts = [row.context for row in all_rows]
        firsts = [row.tokens[0] for row in all_rows]
        likeliest_C = log_CV.argmax(-1).tolist()
        answers = {
            row.place: (log, likeliest_C[row.context] == row.tokens[0])
            for row, log in zip(all_rows, log_CV[contexts, firsts].tolist(), strict=True)
        }
        for rows in self._chunks([row for row in all_rows if len(row.tokens) > 1]):
            for row, (log, same) in zip(rows, self._continued(rows, len(batch[0].tokens), cache), strict=True):
                first, first_same = answers[row.place]
                answers[row.place] = (first + log, first_same and same)
        return answers

    def _chunks(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Yield rows of about the same length, so that little is padding and the logits take little memory."""
        chunk: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.tokens)):
            if chunk and (len(chunk) + 1) * len(chunk[0].tokens) > self.chunk_tokens:
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk

    def _continued(self, rows: Sequence[_Row], before: int, cache: Any) -> list[tuple[float, bool]]:
        """Of each row: the log-probability of all tokens after the first, and whether greedy decoding would write them.

        Args:
            before: number of tokens in `cache`, which holds a row for each context.
        """
        cache = _copied(cache)
        cache.batch_select_indices(torch.tensor([row.context for row in rows], device=self.device))
        tokens_RT = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True).to(self.device)
        lengths_R = torch.tensor([len(row.tokens) for row in rows], device=self.device)
        real_RT = torch.arange(1, tokens_RT.shape[1], device=self.device) < lengths_R[:, None]
        mask_RT = torch.cat([real_RT.new_ones(len(rows), before), real_RT], 1).long()
        logits_RTV = self.model(tokens_RT[:, :-1], attention_mask=mask_RT, past_key_values=cache).logits
        log_RTV = F.log_softmax(logits_RTV.float(), -1)
        targets_RT = tokens_RT[:, 1:]
        chosen_RT = log_RTV.gather(-1, targets_RT[..., None])[..., 0]
        sums_R = (chosen_RT * real_RT).double().sum(-1).tolist()
        same_R = ((log_RTV.argmax(-1) == targets_RT) | ~real_RT).all(-1).tolist()
        return list(zip(sums_R, same_R, strict=True))

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(row) for row in rows], device=self.device)


def _copied(cache: Any) -> Any:
    """A cache that can be changed without changing this one; the tensors are shared until then."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _groups(contexts: Sequence[_Context]) -> Iterator[tuple[int, list[_Context]]]:
    """Group sorted contexts by their beginning, with the number of shared tokens. The rest is one group, with 0."""
    alone: list[_Context] = []
    for shared, group in _runs(contexts, lambda each: each.tokens):
        if shared:
            yield shared, group
        else:
            alone += group
    if alone:
        yield 0, alone


def _runs(items: Sequence[_Context], tokens_of: Callable[[_Context], Tokens]) -> Iterator[tuple[int, list[_Context]]]:
    group: list[_Context] = []
    shared = 0
    for item in items:
        tokens = tokens_of(item)
        common = _common(tokens_of(group[0])[:shared], tokens[:-1]) if group else 0
        if group and common >= max(LEAST_SHARED, shared // 2):
            group.append(item)
            shared = common
            continue
        if group:
            yield (shared if len(group) > 1 else 0), group
        group, shared = [item], len(tokens) - 1
    if group:
        yield (shared if len(group) > 1 else 0), group


def _common(one: Tokens, other: Tokens) -> int:
    """Number of tokens with which both begin."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
