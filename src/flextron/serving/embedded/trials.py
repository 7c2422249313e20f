"""The prices of steps: from latency tables or weights at first, then from batches of zeros that are timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from flextron.elastic.model import ElasticModel
from flextron.serving.embedded.attention import Batch, Row
from flextron.serving.embedded.mixed import MixedModel
from flextron.serving.embedded.pages import Held, PagedCache
from flextron.serving.embedded.prices import LevelCosts, RowWork, StepPrices
from flextron.serving.engine import Level

_MOST_ROWS = 16
_WARM_UP = 2
_COUNTS = (128, 64, 32)
_BESIDE = 4


def costs_of(model: ElasticModel, levels: Sequence[Level]) -> list[LevelCosts]:
    """Return what levels cost, by their latency tables where there are any, else by their weights."""
    full = levels[-1]
    head = model.lm.get_output_embeddings().weight.numel()
    most = model.layer_weights(full.subnet) + head

    def relative(ms: float | None, of: float | None, level: Level) -> float:
        return ms / of if ms and of else (model.layer_weights(level.subnet) + head) / most

    groups = max(1, sum(full.subnet.kv_groups))
    return [
        LevelCosts(
            relative(level.step_ms, full.step_ms, level),
            relative(level.prefill_ms_per_token, full.prefill_ms_per_token, level),
            sum(level.subnet.kv_groups) / groups,
        )
        for level in levels
    ]


def fit_prices(
    prices: StepPrices, mixed: MixedModel, cache: PagedCache, *, levels: int, rows: int, prompt_tokens: int
) -> None:
    """Time some batches, and fit `prices` to them; find out first which steps `mixed` runs by compiled kernels.

    Args:
        levels: number of levels.
        rows: largest number of texts in a step.
        prompt_tokens: tokens of the longest prompt to time.
    """
    mixed.few_tokens = _few_tokens(mixed, cache, levels - 1)
    steps = _steps(levels, min(rows, _MOST_ROWS), prompt_tokens)
    timed = [time_step(mixed, cache, step) for step in [*steps[:_WARM_UP], *steps]][_WARM_UP:]
    prices.fit([step for step, _ in timed], [milliseconds for _, milliseconds in timed], few_tokens=mixed.few_tokens)


def _few_tokens(mixed: MixedModel, cache: PagedCache, level: int) -> int:
    """Return up to how many tokens the kernels are faster than torch here: it has instructions for products of many."""
    most = mixed.few_tokens
    for tokens in (count for count in _COUNTS if count <= most):
        step = [*[RowWork(level, 1, 1)] * _BESIDE, RowWork(level, tokens - _BESIDE, 0)]
        times: dict[int, list[float]] = {tokens: [], 0: []}
        for limit in (*times, *times, *times):  # in turn, the first time to warm up
            mixed.few_tokens = limit
            times[limit].append(time_step(mixed, cache, step)[1])
        if min(times[tokens][1:]) <= min(times[0][1:]):
            return tokens
    return min(most, _COUNTS[-1] // 2)


def with_times(levels: Sequence[Level], prices: StepPrices, prompt_tokens: int) -> tuple[Level, ...]:
    """Return the levels with the times that they take in this engine; a latency table is of another loop."""
    return tuple(
        replace(
            level,
            step_ms=prices.predict([RowWork(place, 1, prompt_tokens)]),
            prefill_ms_per_token=prices.predict([RowWork(place, prompt_tokens, 0)]) / prompt_tokens,
        )
        for place, level in enumerate(levels)
    )


def time_step(mixed: MixedModel, cache: PagedCache, step: Sequence[RowWork]) -> tuple[list[RowWork], float]:
    """Run one step on zeros. Return its rows, without those that the cache has no room for, and its milliseconds."""
    pool, helds = cache.pool, list[Held]()
    placed: list[Row] = []
    first = 0
    try:
        for row in step:
            held = Held(None)
            if pool.missing(held, row.past + row.tokens) > pool.available:
                break
            pool.extend(held, row.past + row.tokens)
            held.tokens.extend([0] * row.past)
            helds.append(held)
            placed.append(Row(held, first, row.tokens, row.past))
            first += row.tokens
        run = list(step[: len(placed)])
        levels = [row.level for row in run]
        start = time.perf_counter()
        batch = Batch(cache, placed, mixed.device)
        last = [row.first + row.count - 1 for row in placed]
        mixed.logits(batch, [0] * first, levels, levels, last).argmax(-1).tolist()
        return run, 1000 * (time.perf_counter() - start)
    finally:
        for held in helds:
            pool.release(held)


def _steps(levels: int, rows: int, prompt_tokens: int) -> list[list[RowWork]]:
    top, long = levels - 1, prompt_tokens
    steps = []
    for level in sorted({0, levels // 2, top}):
        steps += [[RowWork(level, 1, min(16, long))] * count for count in sorted({1, 2, max(1, rows // 2), rows})]
        steps += [[RowWork(level, 1, long)] * count for count in sorted({1, max(1, rows // 2)})]
        parts = [(16, 0), (32, 0), (64, 0), (128, 0), (64, 128)]
        beside = [RowWork(level, 1, min(16, long))] * max(1, rows // 2)
        together = [32, 64]
        if level in (0, top):  # these take longest
            parts += [(192, 0), (256, 0), (160, 96)]
            together += [160]
        steps += [[RowWork(level, min(tokens, long), min(past, long))] for tokens, past in parts]
        steps += [[*beside, RowWork(level, min(tokens, long), 0)] for tokens in together]
    return [*steps, [RowWork(top, 1, min(16, long))] + [RowWork(0, 1, min(16, long))] * (rows - 1)]
