"""A latency table: whole models timed at designed sub-networks, and an additive table fitted to them.

Flextron (Cai et al., ICML 2024), section 4.2, measures a look-up table with the deployment engine. Ours: the table is
additive over layers and fitted to whole models, because a layer timed alone in a loop measures the cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import DynamicCache

from flextron.costs.table import CostTable
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device
from flextron.errors import CostError
from flextron.inference import decoder as decoding
from flextron.progress import bar
from flextron.subnet import AXES, SearchSpace, Subnet

PHASES = {"prefill": "ttft", "decode": "tpot"}
"""What each phase's time is called: time to first token, time per output token."""
TOKENS = {"ttft": "prompt_tokens", "tpot": "context_tokens"}
"""The condition that says how long the text was."""
REPEATS = {"prefill": 1, "decode": 12}
"""Runs of a sub-network in one round."""
SPREAD = 0.08
"""A sub-network whose timings differ by more is timed again."""
RETRIES = 2
_SMOOTHNESS = 0.3


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


def measure_latency(
    model: ElasticModel,
    *,
    phase: str = "decode",
    batch: int = 1,
    tokens: int = 512,
    designs: int = 28,
    held_out: int = 8,
    rounds: int = 2,
    seed: int = 0,
    show: bool = False,
    runner: Runner | None = None,
) -> CostTable:
    """The latency table of a model on the device where it is, in ms; conditions and the error of the fit are in it.

    Args:
        phase: "prefill", the time to the first token of a prompt of `tokens` tokens; or "decode", the time of one more
            token after `tokens` tokens, as `flextron.generate` runs it.
        batch: sequences at once.
        designs: sub-networks to fit the table to.
        held_out: random sub-networks that the fit does not see, on which its error is measured; 0 leaves that out.
        rounds: timings of each sub-network, interleaved with the others and with the full model.
        runner: another engine, such as `exporting.gguf.timing.in_llamacpp` gives, for this phase, batch and tokens.

    Raises:
        ValueError: another phase, numbers that are too small, or a text too long for the model.
        CostError: sub-networks that do not tell neurons from KV groups, in a very small search space.
    """
    check_phase(phase)
    _check_numbers(
        batch=(batch, 1), tokens=(tokens, 1), designs=(designs, 8), held_out=(held_out, 0), rounds=(rounds, 1)
    )
    _check_length(model, tokens + (phase == "decode"))
    space, metric, draw = model.search_space, PHASES[phase], np.random.default_rng(seed)
    subnets = [*designed(space, designs, draw), *random_subnets(space, held_out, draw)]
    runner = runner or _own_runner(model, phase, batch=batch, tokens=tokens)
    timing = time_interleaved(
        runner.prepare, space.full, subnets, rounds=rounds, repeats=runner.repeats, draw=draw, show=show
    )
    table = fit(space, subnets[:designs], timing.milliseconds[:designs], metric=metric)
    errors = price_errors(table, subnets[designs:], timing.milliseconds[designs:])
    conditions = {
        **runner.conditions,
        "phase": phase,
        "batch": batch,
        TOKENS[metric]: tokens,
        "rounds": rounds,
        "seed": seed,
        "sub_networks": designs,
        "full_ms": timing.full_ms,
        "machine_noise": timing.noise,
        "held_out": held_out,
        "error_median": median(errors) if errors else None,
        "error_worst": max(errors, default=None),
    }
    return replace(table, conditions=conditions)


def check_phase(phase: str) -> None:
    """Pass if `phase` is one that is timed.

    Raises:
        ValueError: it is not.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; it must be one of: {', '.join(PHASES)}.")


def _check_numbers(**values_and_least: tuple[int, int]) -> None:
    for name, (value, least) in values_and_least.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")


def _check_length(model: ElasticModel, positions: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None) or positions
    if positions > most:
        raise ValueError(f"a text of {positions} tokens is too long for this model, which has {most} positions.")


def price_errors(table: CostTable, subnets: Sequence[Subnet], milliseconds: Sequence[float]) -> list[float]:
    """Relative errors of a table's prices, from 0 up."""
    return [abs(table.price(subnet) / ms - 1) for subnet, ms in zip(subnets, milliseconds, strict=True)]


def here(model: ElasticModel) -> dict[str, Any]:
    """The conditions that a table must share with the present to be used: device, type, versions."""
    return {
        "device": describe_device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": _release(version("torch")),
        "transformers": _release(version("transformers")),
    }


def _release(full_version: str) -> str:
    return ".".join(full_version.split(".")[:2])


def engine(model: ElasticModel, phase: str, batch: int) -> str:
    """What runs: flextron's own decoder where it can, else transformers."""
    return "flextron decoder" if phase == "decode" and batch == 1 and decoding.supports(model) else "transformers"


def designed(space: SearchSpace, count: int, draw: np.random.Generator) -> list[Subnet]:
    """Sub-networks of all sizes, the smallest first and the full model last; layers differ, to tell widths apart."""
    return [_around(space, level, draw) for level in np.linspace(0, 1, count)]


def random_subnets(space: SearchSpace, count: int, draw: np.random.Generator) -> list[Subnet]:
    """Sub-networks of random size, layers differing."""
    return [_around(space, level, draw) for level in draw.uniform(0.15, 0.95, count)]


def _around(space: SearchSpace, level: float, draw: np.random.Generator) -> Subnet:
    """Every layer's place among the choices is drawn around `level` of the full width."""

    def widths(choices: tuple[int, ...], center: float) -> tuple[int, ...]:
        places = np.clip(center + draw.normal(0, 0.25, space.layers) * (4 * center * (1 - center)), 0, 1)
        return tuple(choices[round(float(place) * (len(choices) - 1))] for place in places)

    shift = draw.normal(0, 0.2) * (4 * level * (1 - level))
    return Subnet(
        widths(space.neurons, float(np.clip(level + shift, 0, 1))),
        widths(space.kv_groups, float(np.clip(level - shift, 0, 1))),
    )


def _own_runner(model: ElasticModel, phase: str, *, batch: int, tokens: int) -> Runner:
    prepare = timed_run(model, phase, batch=batch, tokens=tokens)
    return Runner(prepare, REPEATS[phase], {**here(model), "engine": engine(model, phase, batch)})


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
    decoder = decoding.Decoder(model, subnet, max_tokens=tokens + 1)

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


def fit(space: SearchSpace, subnets: Sequence[Subnet], milliseconds: Sequence[float], *, metric: str) -> CostTable:
    """The additive table, equal for all layers, that comes nearest to measured times in relative terms.

    Unknown are a fixed part and what every step from one width to the next adds, none of them negative (non-negative
    least squares); steps of neighbouring widths are drawn together a little, the first from 0 apart.

    Raises:
        CostError: fewer measurements than it takes, or such as do not tell neurons from KV groups.
    """
    _check_enough(space, subnets)
    measured = np.array(milliseconds, dtype=float)
    scale = float(measured.max())
    rows = np.array([_row(space, subnet) for subnet in subnets]) * (scale / measured)[:, None]
    unit = _row(space, space.full)
    rows = np.vstack([rows / unit, _smoothness(space)])
    solution, _ = nnls(rows, np.concatenate([np.ones(len(subnets)), np.zeros(len(rows) - len(subnets))]))
    steps = solution / unit * scale
    neurons, kv_groups = np.split(steps[1:], [len(space.neurons) - (space.neurons[0] == 0)])
    return CostTable(
        space,
        metric,
        "ms",
        float(steps[0]),
        (_curve(space.neurons, neurons),) * space.layers,
        (_curve(space.kv_groups, kv_groups),) * space.layers,
    )


def _check_enough(space: SearchSpace, subnets: Sequence[Subnet]) -> None:
    if len(subnets) < 4:
        raise CostError(f"a table needs at least 4 measured sub-networks, of different widths; got {len(subnets)}.")
    free = [axis for axis in AXES if len(getattr(space, axis)) > 1]
    sizes = np.array([[1, *(sum(getattr(subnet, axis)) for axis in free)] for subnet in subnets])
    if np.linalg.matrix_rank(sizes) <= len(free):
        raise CostError(
            f"{len(subnets)} measured sub-networks do not tell what {' and '.join(free)} cost, because these do not "
            "vary apart from each other. Measure also some that are wide on one axis and narrow on the other."
        )


def _row(space: SearchSpace, subnet: Subnet) -> np.ndarray[Any, Any]:
    """1, and for every step from a width to the next how many layers have taken it."""
    counts = [1.0]
    for axis in AXES:
        widths = np.array(getattr(subnet, axis))
        counts += [float((widths >= choice).sum()) for choice in getattr(space, axis) if choice > 0]
    return np.array(counts)


def _curve(choices: tuple[int, ...], steps: np.ndarray[Any, Any]) -> tuple[float, ...]:
    sums = np.cumsum(steps)
    return tuple(map(float, [0.0, *sums] if choices[0] == 0 else sums))


def _smoothness(space: SearchSpace) -> np.ndarray[Any, Any]:
    """One row for each pair of neighbouring steps of an axis: their difference, per unit of width, should be small."""
    rows, at, size = [], 1, len(_row(space, space.full))
    for axis in AXES:
        widths = np.diff([0, *(choice for choice in getattr(space, axis) if choice > 0)])
        for step in range(1, len(widths) - 1):
            row = np.zeros(size)
            row[at + step], row[at + step + 1] = 1, -widths[step] / widths[step + 1]
            rows.append(row * _SMOOTHNESS * len(widths))
        at += len(widths)
    return np.array(rows).reshape(-1, size)
