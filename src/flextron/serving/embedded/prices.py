"""What a step will take: predicted from the levels' costs, fitted to a few batches at start, corrected as it runs.

A step reads the weights once, as far as its widest row needs, then computes for each token:

    T = idle + read * weights(widest) + compute * sum of weights(level of each token)
             + attend * sum of past tokens * groups(level) + row * rows

Steps of few tokens, which run by compiled kernels, have factors of their own. Their kernels compute all tokens at the
widest level, and as many as 1, 2 or a multiple of 4.

No torch here: the engine measures, this predicts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.optimize import nnls

REMEMBERED = 40
"""Steps that the correction looks back on."""
_MANY_TOKENS = 4
"""A step with more tokens per row than this counts as reading prompts; its correction is its own."""


@dataclass(frozen=True)
class RowWork:
    """What one row of a step does."""

    level: int
    tokens: int
    past: int
    """Tokens of its text before these."""


@dataclass(frozen=True)
class LevelCosts:
    """What a level costs relative to the full model, which has 1 in each."""

    read: float
    """The weights that one token reads, or its measured time where there is a latency table."""
    compute: float
    """The time of a token of a long prompt, or its multiplications."""
    groups: float
    """The KV groups that attention reads."""


class StepPrices:
    """Predicts the milliseconds of steps."""

    def __init__(self, levels: Sequence[LevelCosts]) -> None:
        self._levels = levels
        self._few_tokens = 0
        self._factors = dict.fromkeys((False, True), (0.0, 1.0, 0.1, 0.0, 0.0))
        self._ratios: dict[bool, deque[float]] = {many: deque(maxlen=REMEMBERED) for many in (False, True)}
        self._correction = {False: 1.0, True: 1.0}
        self._errors: deque[float] = deque(maxlen=REMEMBERED)
        self._gaps: deque[float] = deque(maxlen=REMEMBERED)

    def fit(self, steps: Sequence[Sequence[RowWork]], milliseconds: Sequence[float], *, few_tokens: int = 0) -> None:
        """Fit the factors, none below 0, to measured steps by least squares of relative errors.

        Args:
            few_tokens: up to so many tokens a step runs by compiled kernels.
        """
        self._few_tokens = few_tokens
        few_N = np.array([self._is_few(rows) for rows in steps])
        times_N = np.array(milliseconds)
        features_NF = np.array([self._features(rows) for rows in steps])
        fitted = {}
        for few in set(few_N.tolist()):
            mine = few_N == few
            factors, _ = nnls(features_NF[mine] / times_N[mine, None], np.ones(mine.sum()))
            fitted[few] = tuple(factors.tolist())
        for few in self._factors:  # a kind that was not measured is taken for the other
            self._factors[few] = fitted.get(few, fitted.get(not few, self._factors[few]))

    def predict(self, rows: Sequence[RowWork]) -> float:
        """Return the milliseconds that a step is predicted to take."""
        return self._raw(rows) * self._correction[_reads_prompts(rows)]

    def observe(self, rows: Sequence[RowWork], milliseconds: float) -> None:
        """Learn from a step that took so long."""
        predicted, many = self.predict(rows), _reads_prompts(rows)
        self._errors.append(abs(predicted - milliseconds) / milliseconds)
        self._gaps.append(predicted / milliseconds)
        ratios = self._ratios[many]
        ratios.append(milliseconds / max(self._raw(rows), 1e-9))
        self._correction[many] = median(ratios)

    @property
    def error(self) -> float:
        """Median relative error of the last predictions, each made before its step."""
        return median(self._errors) if self._errors else 0.0

    @property
    def predicted_over_measured(self) -> float:
        """Median of the last predictions over what was measured."""
        return median(self._gaps) if self._gaps else 1.0

    @property
    def margin(self) -> float:
        """The part of the slack that a step may be predicted to take: less where predictions are off by 20%."""
        return 0.9 if self.error <= 0.2 else 0.75

    def _raw(self, rows: Sequence[RowWork]) -> float:
        factors = self._factors[self._is_few(rows)]
        return sum(factor * feature for factor, feature in zip(factors, self._features(rows), strict=True))

    def _is_few(self, rows: Sequence[RowWork]) -> bool:
        return sum(row.tokens for row in rows) <= self._few_tokens

    def _features(self, rows: Sequence[RowWork]) -> tuple[float, ...]:
        read = compute = attend = 0.0
        for row in rows:
            cost = self._levels[row.level]
            read = max(read, cost.read)
            compute += cost.compute * row.tokens
            attend += cost.groups * row.tokens * (row.past + row.tokens / 2)
        if self._is_few(rows):
            tokens = sum(row.tokens for row in rows)
            padded = tokens if tokens <= 2 else -(-tokens // 4) * 4
            compute = padded * max((self._levels[row.level].compute for row in rows), default=0.0)
        return 1.0, read, compute, attend, float(len(rows))


def _reads_prompts(rows: Sequence[RowWork]) -> bool:
    return sum(row.tokens for row in rows) > _MANY_TOKENS * len(rows)
