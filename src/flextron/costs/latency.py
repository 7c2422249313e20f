"""A latency table: whole models timed at designed sub-networks, and an additive table fitted to them.

Flextron (Cai et al., ICML 2024), section 4.2, measures a look-up table with the deployment engine. Ours: the table is
additive over layers and fitted to whole models, because a layer timed alone in a loop measures the cache.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import numpy as np

from flextron.costs.fitting import designed, fit, price_errors, random_subnets
from flextron.costs.table import CostTable
from flextron.costs.timing import PHASES, TOKENS, Runner, check_phase, own_runner, time_interleaved
from flextron.elastic.model import ElasticModel


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

    Where other programs kept the machine busy, the rounds are repeated, and at last the conditions have a "warning".

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
    runner = runner or own_runner(model, phase, batch=batch, tokens=tokens)
    timing = time_interleaved(
        runner.prepare, space.full, subnets, rounds=rounds, repeats=runner.repeats, draw=draw, show=show
    )
    table = fit(space, subnets[:designs], timing.milliseconds[:designs], metric=metric)
    errors = price_errors(table, subnets[designs:], timing.milliseconds[designs:])
    error = median(errors) if errors else None
    warning = timing.doubt(error)
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
        "rounds_differ": timing.rounds_differ,
        "other_programs": timing.processor and timing.processor.share_of_others,
        "held_out": held_out,
        "error_median": error,
        "error_worst": max(errors, default=None),
        **({} if warning is None else {"warning": warning}),
    }
    return replace(table, conditions=conditions)


def _check_numbers(**values_and_least: tuple[int, int]) -> None:
    for name, (value, least) in values_and_least.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")


def _check_length(model: ElasticModel, positions: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None) or positions
    if positions > most:
        raise ValueError(f"a text of {positions} tokens is too long for this model, which has {most} positions.")
