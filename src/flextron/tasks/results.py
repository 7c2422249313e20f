"""Scores of runs on tasks: accuracies, paired differences, averages, and shares of the full model's. No torch here.

Standard errors treat documents as independent and tasks as fixed: they say how much other documents would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class TaskResult:
    """The score of one run on one task."""

    run: str
    task: str
    shots: int
    """Examples before each question."""
    metric: str
    """The main metric among `scores`: `acc`, or `acc_norm`, which divides log-likelihoods by length in characters."""
    scores: dict[str, tuple[float, ...]]
    """For each metric, 1 for each correct document and 0 for the others. All runs have the same documents."""
    documents: tuple[str, ...]
    """TASK/INDEX of each document in lm-eval's data."""
    share: float
    """Share of the layers' weights that the run uses, for token routing on average."""
    cost: float | None
    """For token routing, the average cost of a token as a share of the full model's. Else None."""

    @property
    def correct(self) -> tuple[float, ...]:
        """1 for each document that is correct by the main metric, 0 for the others."""
        return self.scores[self.metric]

    @property
    def accuracy(self) -> float:
        """Share of documents that are answered correctly."""
        return fmean(self.correct)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy. NaN for one document."""
        return _error_of_mean(self.correct)

    def difference(self, first: TaskResult) -> tuple[float, float]:
        """Return the accuracy minus the other run's, paired by document, and its standard error.

        Raises:
            ValueError: the other run has other documents.
        """
        differences = [own - other for own, other in _pairs(self, first)]
        return fmean(differences), _error_of_mean(differences)


@dataclass(frozen=True)
class Average:
    """A run's average over tasks. All tasks count the same."""

    run: str
    accuracy: float
    standard_error: float
    retention: float
    """This average as a share of the first run's average."""
    retention_standard_error: float
    """Standard error of `retention`, paired by document (delta method)."""


def averages(results: Sequence[TaskResult]) -> list[Average]:
    """The average of every run, in order. `retention` compares each with the first."""
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
