"""What runs score on tasks: accuracies, paired differences, averages and what is kept of the full model's. No torch.

Standard errors take documents as independent and tasks as fixed: they say what other documents would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class TaskResult:
    """What one run scores on one task."""

    run: str
    task: str
    shots: int
    """Examples before each question."""
    metric: str
    """`acc`, or `acc_norm`: the likeliest answer per character; of `scores`, the one that counts."""
    scores: dict[str, tuple[float, ...]]
    """Of each metric, 1 for every document that is answered right, else 0; the same documents for every run."""
    documents: tuple[str, ...]
    """TASK/PLACE of each document in lm-eval's data."""
    share: float
    """Share of the layers' weights that the run keeps, or that its tokens used on average."""
    cost: float | None
    """With per-token routing, what a computed token has cost on average, as a part of the full model's."""

    @property
    def correct(self) -> tuple[float, ...]:
        """1 for every document that is answered right by the metric that counts, else 0."""
        return self.scores[self.metric]

    @property
    def accuracy(self) -> float:
        """Share of the documents that are answered right."""
        return fmean(self.correct)

    @property
    def standard_error(self) -> float:
        """Of the accuracy; NaN for one document."""
        return _error_of_mean(self.correct)

    def difference(self, first: TaskResult) -> tuple[float, float]:
        """Accuracy above another run's, paired by document, and its standard error.

        Raises:
            ValueError: the other has scored other documents.
        """
        differences = [own - other for own, other in _pairs(self, first)]
        return fmean(differences), _error_of_mean(differences)


@dataclass(frozen=True)
class Average:
    """A run's average over tasks, each counting alike."""

    run: str
    accuracy: float
    standard_error: float
    retention: float
    """Share of the first run's average that is left."""
    retention_standard_error: float
    """Paired by document: how both vary together is counted (delta method)."""


def averages(results: Sequence[TaskResult]) -> list[Average]:
    """The average of every run, in the order in which they come; the first is what `retention` compares with."""
    by_run: dict[str, list[TaskResult]] = {}
    for result in results:
        by_run.setdefault(result.run, []).append(result)
    first = next(iter(by_run.values()))
    return [_average(own, first) for own in by_run.values()]


def floored(share: float, decimals: int = 1) -> str:
    """A share in percent, rounded down."""
    scale = 10**decimals
    return f"{math.floor(round(share * 100 * scale, 6)) / scale:.{decimals}f}%"


def _average(own: Sequence[TaskResult], first: Sequence[TaskResult]) -> Average:
    accuracy, reference = (fmean(result.accuracy for result in each) for each in (own, first))
    kept = accuracy / reference if reference else math.nan
    # d(a / b) = (da - (a / b) db) / b, document by document
    errors = [
        _error_of_mean([mine - kept * theirs for mine, theirs in _pairs(*both)])
        for both in zip(own, first, strict=True)
    ]
    return Average(
        run=own[0].run,
        accuracy=accuracy,
        standard_error=_error_of_average([result.standard_error for result in own]),
        retention=kept,
        retention_standard_error=_error_of_average(errors) / reference if reference else math.nan,
    )


def _pairs(one: TaskResult, other: TaskResult) -> list[tuple[float, float]]:
    if (one.task, one.documents) != (other.task, other.documents):
        raise ValueError(f"{one.run} on {one.task} and {other.run} on {other.task} have scored other documents.")
    return list(zip(one.correct, other.correct, strict=True))


def _error_of_mean(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _error_of_average(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)
