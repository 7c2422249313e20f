"""Scores of runs on tasks: accuracy over chance, what is kept of the full model's, and flips. No torch here.

Guessing scores a half on a task with two choices. So what a sub-network keeps is measured over chance: its accuracy
minus chance, as a share of the full model's accuracy minus chance.

Standard errors treat documents as independent and tasks as fixed: they say how much other documents would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

HEADLINE = ("arc_easy", "hellaswag", "lambada_openai", "piqa")
"""Tasks whose average is reported first: on the others, models of some hundred million weights do little but guess."""


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
    chance: float = 0.0
    """Accuracy of guessing: the mean of one over the number of choices; 0 where an answer has to be written."""

    @property
    def correct(self) -> tuple[float, ...]:
        """1 for each document that is correct by the main metric, 0 for the others."""
        return self.scores[self.metric]

    @property
    def accuracy(self) -> float:
        """Share of documents that are answered correctly."""
        return fmean(self.correct)

    @property
    def over_chance(self) -> float:
        """Accuracy minus that of guessing."""
        return self.accuracy - self.chance

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy. NaN for one document."""
        return _error_of_mean(self.correct)

    def flips(self, first: TaskResult) -> tuple[float, float]:
        """Return the share of documents that only one of the two runs answers correctly, and its standard error.

        Dutta et al., Accuracy is Not All You Need (NeurIPS 2024, arXiv 2407.09141), section 3: two models of equal
        accuracy can answer different documents correctly.

        Raises:
            ValueError: the other run has other documents.
        """
        changed = [float(own != other) for own, other in _pairs(self, first)]
        return fmean(changed), _error_of_mean(changed)

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
    tasks: tuple[str, ...]
    accuracy: float
    over_chance: float
    """Mean over the tasks of accuracy minus chance."""
    standard_error: float
    """Standard error of both."""
    kept: float
    """`over_chance` as a share of the first run's; NaN if the first run is not above chance."""
    kept_standard_error: float
    """Standard error of `kept`, paired by document (delta method)."""
    flips: float
    """Mean over the tasks of the share of documents that only one of this and the first run answers correctly."""
    flips_standard_error: float


def averages(results: Sequence[TaskResult], tasks: Sequence[str] = ()) -> list[Average]:
    """The average of every run over `tasks` (all, if none is named), in order. Each is compared with the first.

    A task may be named with or without its number of examples.

    Raises:
        ValueError: no result belongs to `tasks`.
    """
    by_run: dict[str, list[TaskResult]] = {}
    for result in results:
        if not tasks or result.task in tasks or plain_name(result.task) in tasks:
            by_run.setdefault(result.run, []).append(result)
    if not by_run:
        raise ValueError(f"there is no result of {', '.join(tasks)}.")
    first = next(iter(by_run.values()))
    return [_average(own, first) for own in by_run.values()]


def plain_name(task: str) -> str:
    """The name of a task without its number of examples: hellaswag@0 is hellaswag."""
    return task.partition("@")[0]


def floored(share: float, decimals: int = 1) -> str:
    """A share in percent, rounded down."""
    scale = 10**decimals
    return f"{math.floor(round(share * 100 * scale, 6)) / scale:.{decimals}f}%"


def _average(own: Sequence[TaskResult], first: Sequence[TaskResult]) -> Average:
    over_chance, reference = (fmean(result.over_chance for result in each) for each in (own, first))
    kept = over_chance / reference if reference > 0 else math.nan
    pairs = list(zip(own, first, strict=True))
    # d(a / b) = (da - (a / b) db) / b, document by document
    errors = [_error_of_mean([mine - kept * theirs for mine, theirs in _pairs(*both)]) for both in pairs]
    flips = [mine.flips(theirs) for mine, theirs in pairs]
    return Average(
        run=own[0].run,
        tasks=tuple(result.task for result in own),
        accuracy=fmean(result.accuracy for result in own),
        over_chance=over_chance,
        standard_error=_error_of_average([result.standard_error for result in own]),
        kept=kept,
        kept_standard_error=_error_of_average(errors) / reference if reference > 0 else math.nan,
        flips=fmean(share for share, _ in flips),
        flips_standard_error=_error_of_average([error for _, error in flips]),
    )


def _pairs(one: TaskResult, other: TaskResult) -> list[tuple[float, float]]:
    if (one.task, one.documents) != (other.task, other.documents):
        raise ValueError(f"{one.run} on {one.task} and {other.run} on {other.task} have scored other documents.")
    return list(zip(one.correct, other.correct, strict=True))


def _error_of_mean(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _error_of_average(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)
