"""Times of sub-networks, each relative to the full model's just before and after, on a machine that others use too."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from itertools import pairwise
from operator import add
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from flextron.costs.busy import ProcessorTime, processor_time
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device
from flextron.inference.decoder import Decoder, supports
from flextron.progress import bar
from flextron.subnet import Subnet

PHASES = {"prefill": "ttft", "decode": "tpot"}
"""What each phase's time is called: time to first token, time per output token."""
TOKENS = {"ttft": "prompt_tokens", "tpot": "context_tokens"}
"""The condition that says how long the text was."""
REPEATS = {"prefill": 1, "decode": 12}
"""Runs of a sub-network in one round."""
SPREAD = 0.08
"""A sub-network whose timings differ by more is timed again."""
RETRIES = 2
OFF, UNSTEADY, VERY_UNSTEADY = 0.1, 0.05, 0.2
"""A table is in doubt that is OFF on sub-networks it has not seen, while rounds differ by UNSTEADY or, where there is
one round, the full model's times by VERY_UNSTEADY; times without a table are, where rounds differ by VERY_UNSTEADY."""


def check_phase(phase: str) -> None:
    """Pass if `phase` is one that is timed.

    Raises:
        ValueError: it is not.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; it must be one of: {', '.join(PHASES)}.")


def phase_of(metric: str) -> str:
    """The phase whose time is called `metric`, "ttft" or "tpot"."""
    return next(phase for phase, name in PHASES.items() if name == metric)


@dataclass(frozen=True)
class Timing:
    """Interleaved timings of sub-networks on one machine, relative to the full model's just before and after."""

    ratios: tuple[tuple[float, ...], ...]
    """Of each sub-network, its time as a part of the full model's at that moment, in each round."""
    full_ms: float
    """Median time of the full model."""
    noise: float
    """Median relative deviation of the full model's times from their median: how unsteady the machine was."""
    processor: ProcessorTime | None = None
    """What this process and others used meanwhile."""

    @property
    def milliseconds(self) -> list[float]:
        """Median time of each sub-network."""
        return [self.full_ms * median(ratios) for ratios in self.ratios]

    @property
    def spreads(self) -> list[float]:
        """Of each sub-network, the median relative deviation of its rounds from their median; 0 for one round."""
        return [_deviation(ratios) for ratios in self.ratios]

    @property
    def rounds_differ(self) -> float | None:
        """Median of `spreads` over sub-networks; None for one round."""
        several = [spread for spread, ratios in zip(self.spreads, self.ratios, strict=True) if len(ratios) > 1]
        return median(several) if several else None

    @property
    def warning(self) -> str | None:
        """Why these times are not to be trusted, in a sentence; None where they are."""
        return self.doubt()

    def doubt(self, error: float | None = None) -> str | None:
        """As `warning`, of a table that was fitted to these times and is `error` off where the fit has not looked."""
        if self.processor is not None and self.processor.is_busy:
            share = self.processor.share_of_others
            cause = f"measured on a busy machine: other programs used {share:.0%} of the processor"
        elif self._is_unsteady(error):
            whose, apart = "the same sub-network", self.rounds_differ
            if apart is None:
                whose, apart = "the full model", self.noise
            cause = f"measured on an unsteady machine: times of {whose} differ by {apart:.0%}"
        else:
            return None
        off = "" if error is None else f"; the table is {error:.0%} off on sub-networks that it has not seen"
        return cause + off

    def _is_unsteady(self, error: float | None) -> bool:
        """Whether rounds differ and the error shows it: tiny models vary on quiet machines too, and are priced well."""
        differ = self.rounds_differ
        if error is None:
            return differ is not None and differ >= VERY_UNSTEADY
        return error >= OFF and (self.noise >= VERY_UNSTEADY if differ is None else differ >= UNSTEADY)


def trust_warning(conditions: Mapping[str, Any]) -> str | None:
    """Why a latency table with these conditions is not to be trusted, such as "measured on a busy machine: ..."."""
    warning = conditions.get("warning")
    return None if warning is None else str(warning)


Prepare = Callable[[Subnet], Callable[[], float]]
"""Of a sub-network, a function that runs it once and returns ms."""


@dataclass(frozen=True)
class Runner:
    """What runs sub-networks to time them."""

    prepare: Prepare
    repeats: int
    """Runs of a sub-network in one round."""
    conditions: dict[str, Any]
    """That stand beside the numbers, the engine's name among them."""


def own_runner(model: ElasticModel, phase: str, *, batch: int, tokens: int) -> Runner:
    """What times a model in this process: prefill of [batch, tokens], or one more token after them."""
    prepare = timed_run(model, phase, batch=batch, tokens=tokens)
    return Runner(prepare, REPEATS[phase], {**present_conditions(model), "engine": engine(model, phase, batch)})


def present_conditions(model: ElasticModel) -> dict[str, Any]:
    """The conditions that a table must share with the present to be used: device, type, versions."""
    return {
        "device": describe_device(model.device),
        "dtype": model.weights_type,
        "torch": _release(version("torch")),
        "transformers": _release(version("transformers")),
    }


def _release(full_version: str) -> str:
    return ".".join(full_version.split(".")[:2])


def engine(model: ElasticModel, phase: str, batch: int) -> str:
    """What runs: flextron's own decoder where it can, else transformers."""
    return "flextron decoder" if phase == "decode" and batch == 1 and supports(model) else "transformers"


def timed_run(model: ElasticModel, phase: str, *, batch: int, tokens: int) -> Prepare:
    """How to time a sub-network: prefill of [batch, tokens], or one more token after them."""
    tokens_BT = torch.arange(batch * tokens, device=model.device).view(batch, tokens) % model.config.vocab_size
    if phase == "prefill":
        return lambda subnet: lambda: _prefill_ms(model, subnet, tokens_BT)
    if engine(model, phase, batch) == "transformers":
        return lambda subnet: _cached_step(model, subnet, tokens_BT)
    return lambda subnet: _decoder_step(model, subnet, tokens)


@torch.inference_mode()
def _prefill_ms(model: ElasticModel, subnet: Subnet, tokens_BT: torch.Tensor) -> float:
    with model.use(subnet):
        start = time.perf_counter()
        model(tokens_BT, use_cache=True, logits_to_keep=1).logits.sum().item()  # which also waits for a GPU
        return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def _cached_step(model: ElasticModel, subnet: Subnet, tokens_BT: torch.Tensor) -> Callable[[], float]:
    """One step of transformers after a real prefill; every run starts from the same cache length."""
    with model.use(subnet):
        cache = DynamicCache(config=model.config)
        model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> float:
        same = _fork(cache)
        with model.use(subnet):
            start = time.perf_counter()
            model(tokens_BT[:, -1:], past_key_values=same, use_cache=True).logits.sum().item()
            return 1000 * (time.perf_counter() - start)

    return run


def _fork(cache: DynamicCache) -> DynamicCache:
    """A cache that grows apart from `cache`, from the same tensors: growing replaces a layer's tensors."""
    # `crop` would not do: a layer with a sliding window has dropped what it would need.
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


@torch.inference_mode()
def _decoder_step(model: ElasticModel, subnet: Subnet, tokens: int) -> Callable[[], float]:
    """One step of the own decoder after `tokens` tokens of zeros; a real prefill would take most of the time."""
    decoder = Decoder(model, subnet, max_tokens=tokens + 1)

    def run() -> float:
        decoder.pretend(tokens)
        start = time.perf_counter()
        decoder.step(0).argmax().item()
        return 1000 * (time.perf_counter() - start)

    return run


def time_interleaved(
    prepare: Prepare,
    full: Subnet,
    subnets: Sequence[Subnet],
    *,
    rounds: int,
    repeats: int,
    draw: np.random.Generator,
    show: bool = False,
    read: Callable[[], ProcessorTime] = processor_time,
) -> Timing:
    """Time all sub-networks in turn, in another order each round, each between two runs of the full model.

    Each time is divided by the mean of the full model's just before and after it, so that a machine that gets slower
    for a while slows both. Rounds in which other programs kept the machine busy are repeated, for as long again as all
    rounds took at most; the calmest count. Sub-networks whose rounds differ by more than SPREAD are timed again,
    RETRIES times at most.

    Args:
        repeats: runs of a sub-network in a round, with the full model in between; the median of their ratios counts.
        read: tells what programs use of the processor.
    """
    course = _Course(prepare, full, subnets, repeats, draw, read, show)
    everything = range(len(subnets))
    done = [course.round(everything, f"time, round {number + 1} of {rounds}") for number in range(rounds)]
    _repeat_busy(done, lambda: course.round(everything, "time again, as the machine is busy"))
    for _ in range(RETRIES):
        differing = [index for index in everything if _range(_ratios(done, index)) > SPREAD]
        if differing:
            done.append(course.round(differing, "time again what differs"))
    references = [ms for round_ in done for ms in round_.references]
    ratios = tuple(_ratios(done, index) for index in everything)
    processor = reduce(add, (round_.processor for round_ in done))
    return Timing(ratios, median(references), _deviation(references), processor)


@dataclass(frozen=True)
class _Round:
    """One timing of some sub-networks."""

    ratios: dict[int, float]
    references: list[float]
    processor: ProcessorTime


class _Course:
    """Times sub-networks, a round at a time."""

    def __init__(
        self,
        prepare: Prepare,
        full: Subnet,
        subnets: Sequence[Subnet],
        repeats: int,
        draw: np.random.Generator,
        read: Callable[[], ProcessorTime],
        show: bool,
    ) -> None:
        self.prepare, self.subnets, self.repeats, self.draw, self.read = prepare, subnets, repeats, draw, read
        self.show = show
        self.reference = prepare(full)
        self.reference()
        self.before = self.reference()
        self.warm: set[int] = set()

    def round(self, indices: Sequence[int], description: str) -> _Round:
        """Time these sub-networks once, in random order."""
        ratios: dict[int, float] = {}
        references: list[float] = []
        start = self.read()
        with bar(len(indices), description=description, show=self.show) as advance:
            for index in map(int, self.draw.permutation(indices)):
                ratios[index], around = self._ratio(index)
                references += around
                advance()
        return _Round(ratios, references, self.read() - start)

    def _ratio(self, index: int) -> tuple[float, list[float]]:
        """A sub-network's time as a part of the full model's, and the full model's times around it, in ms."""
        run = self.prepare(self.subnets[index])
        if index not in self.warm or self.repeats > 1:
            run()
            self.warm.add(index)
        if self.repeats > 1:  # else the full model has just run, for the one before
            self.before = self.reference()
        times, around = _alternate(run, self.reference, self.repeats, self.before)
        self.before = around[-1]
        return median(2 * t / (a + b) for t, (a, b) in zip(times, pairwise(around), strict=True)), around


def _repeat_busy(done: list[_Round], again: Callable[[], _Round]) -> None:
    """Replace rounds of a busy machine by calmer ones, in at most as much time as all of them took."""
    left = sum(round_.processor.wall for round_ in done)
    while True:
        busiest = max(done, key=_share)
        if not busiest.processor.is_busy or busiest.processor.wall > left:
            return
        new = again()
        left -= new.processor.wall
        if _share(new) < _share(busiest):
            done[done.index(busiest)] = new


def _share(round_: _Round) -> float:
    return round_.processor.share_of_others or 0.0


def _alternate(
    run: Callable[[], float], reference: Callable[[], float], repeats: int, before: float
) -> tuple[list[float], list[float]]:
    """Times of `run`, and of the reference `before` the first, between any two, and after the last."""
    times, around = [], [before]
    for _ in range(repeats):
        times.append(run())
        around.append(reference())
    return times, around


def _ratios(rounds: Sequence[_Round], index: int) -> tuple[float, ...]:
    """A sub-network's ratios, of the rounds in which it was timed."""
    return tuple(round_.ratios[index] for round_ in rounds if index in round_.ratios)


def _range(ratios: Sequence[float]) -> float:
    """How far apart the timings lie."""
    return (max(ratios) - min(ratios)) / median(ratios)


def _deviation(values: Sequence[float]) -> float:
    """Median relative deviation from the median."""
    middle = median(values)
    return median(abs(value / middle - 1) for value in values)
