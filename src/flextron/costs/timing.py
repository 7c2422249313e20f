"""Times of sub-networks, each relative to the full model's just before and after, on a machine that others use too."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device, dtype_name
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

    @property
    def milliseconds(self) -> list[float]:
        """Median time of each sub-network."""
        return [self.full_ms * median(ratios) for ratios in self.ratios]


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
        "dtype": dtype_name(model.dtype),
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
) -> Timing:
    """Time all sub-networks in turn, in another order each round, each between two runs of the full model.

    Each time is divided by the mean of the full model's just before and after it, so that a machine that gets slower
    for a while slows both. Sub-networks whose rounds differ by more than SPREAD are timed again, RETRIES times at most.

    Args:
        repeats: runs of a sub-network in a round, with the full model in between; the median of their ratios counts.
    """
    ratios: list[list[float]] = [[] for _ in subnets]
    references: list[float] = []
    reference = prepare(full)
    reference()
    before = reference()
    for round_ in range(rounds + RETRIES):
        again = [index for index, seen in enumerate(ratios) if round_ < rounds or _spread(seen) > SPREAD]
        name = f"time, round {round_ + 1} of {rounds}" if round_ < rounds else "time again what differs"
        with bar(len(again), description=name, show=show and bool(again)) as advance:
            for index in map(int, draw.permutation(again)):
                run = prepare(subnets[index])
                if round_ == 0 or repeats > 1:
                    run()  # warms up
                if repeats > 1:  # else the full model has just run, for the one before
                    before = reference()
                times, around = _alternate(run, reference, repeats, before)
                before = around[-1]
                references += around
                ratios[index].append(median(2 * t / (a + b) for t, (a, b) in zip(times, pairwise(around), strict=True)))
                advance()
    middle = median(references)
    noise = median(abs(reference_ms / middle - 1) for reference_ms in references)
    return Timing(tuple(map(tuple, ratios)), middle, noise)


def _alternate(
    run: Callable[[], float], reference: Callable[[], float], repeats: int, before: float
) -> tuple[list[float], list[float]]:
    """Times of `run`, and of the reference `before` the first, between any two, and after the last."""
    times, around = [], [before]
    for _ in range(repeats):
        times.append(run())
        around.append(reference())
    return times, around


def _spread(ratios: Sequence[float]) -> float:
    """How far apart the timings lie."""
    return (max(ratios) - min(ratios)) / median(ratios)
