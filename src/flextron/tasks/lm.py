"""lm-eval's `HFLM` for an elastic model, which computes shared beginnings of texts only once.

All questions of a task begin with the same examples, and all answers to a question have the same context. Here such a
beginning runs once, and what follows continues its KV cache. Only logits that are scored are computed. No padding
stands between a context and its continuation, so sliding windows see the same as without batches.

Shapes: R rows, P tokens before, T tokens now, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

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


class ElasticLM(HFLM):  # type: ignore[misc]
    """lm-eval's view of an elastic model. It runs the sub-network in use, on the model's own weights."""

    def __init__(self, model: ElasticModel, *, batch_tokens: int | None = None) -> None:
        tokenizer = copy.deepcopy(model.tokenizer)  # a copy, because HFLM adds a padding token
        super().__init__(pretrained=model.lm, tokenizer=tokenizer, backend="causal")
        self.batch_tokens = batch_tokens or usual_batch_tokens(model.device)
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
        cache = copy.deepcopy(cache)
        if shared:
            cache.batch_repeat_interleave(len(batch))
        logits_RTV = self.model(
            self._tensor([context.tokens[shared:] for context in batch]), past_key_values=cache, logits_to_keep=1
        ).logits
        rows = [row for row, context in enumerate(batch) for _ in context.continuations]
        continuations = [continuation for context in batch for continuation in context.continuations]
        places = [place for context in batch for place in context.places]
        logits_RTV = logits_RTV[rows]
        if max(map(len, continuations)) > 1:
            logits_RTV = torch.cat([logits_RTV, self._continued(continuations, rows, len(batch[0].tokens), cache)], 1)
        log_RTV = F.log_softmax(logits_RTV.float(), -1)
        greedy_RT = log_RTV.argmax(-1)
        targets_RT = pad_sequence([torch.tensor(each) for each in continuations], batch_first=True).to(self.device)
        chosen_RT = log_RTV.gather(-1, targets_RT[..., None])[..., 0]
        real_RT = self._real(continuations)
        sums_R = (chosen_RT * real_RT).double().sum(-1).tolist()
        same_R = ((greedy_RT == targets_RT) | ~real_RT).all(-1).tolist()
        return dict(zip(places, zip(sums_R, same_R, strict=True), strict=True))

    def _continued(self, continuations: Sequence[Tokens], rows: list[int], before: int, cache: Any) -> torch.Tensor:
        """Logits after each token of the continuations except the last, [R, T - 1, V]."""
        cache.batch_select_indices(torch.tensor(rows, device=self.device))
        inputs_RT = pad_sequence([torch.tensor(each[:-1]) for each in continuations], batch_first=True).long()
        real_RT = self._real(continuations)[:, 1:]  # one shorter, like the inputs: the last target is no input
        mask_RT = torch.cat([real_RT.new_ones(len(rows), before), real_RT], 1).long()
        logits: torch.Tensor = self.model(
            inputs_RT.to(self.device), attention_mask=mask_RT, past_key_values=cache
        ).logits
        return logits

    def _real(self, continuations: Sequence[Tokens]) -> torch.Tensor:
        """True where a continuation, padded on the right, has a token, [R, T]."""
        lengths_R = torch.tensor([len(each) for each in continuations], device=self.device)
        return torch.arange(int(lengths_R.max()), device=self.device) < lengths_R[:, None]

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(row) for row in rows], device=self.device)


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
