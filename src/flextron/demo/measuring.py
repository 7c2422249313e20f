"""What the tour measures of sub-networks, before training and after: losses, times, and how far to trust them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from flextron.choosing.baselines import equal_widths, greedy
from flextron.costs.pricing import Ceiling
from flextron.costs.table import CostTable
from flextron.costs.timing import REPEATS, Timing, time_interleaved, timed_run, trust_warning
from flextron.data.blocks import TokenBlocks
from flextron.demo.plan import BUDGETS, TIMING_ROUNDS
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device, dtype_name
from flextron.evaluation import evaluate
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static.router import Router
from flextron.subnet import Subnet


@dataclass(frozen=True)
class Candidate:
    """A sub-network to measure, the budget that it is for, and how it was chosen."""

    name: str
    method: str
    subnet: Subnet
    predicted_ms: float


def baselines(sensitivity: Sensitivity, table: CostTable) -> list[Candidate]:
    """The full model, and what can be chosen for each budget without a router."""
    full = table.search_space.full
    chosen = [
        *((budget, "greedy", greedy(sensitivity, table, budget * table.full)) for budget in BUDGETS),
        *((budget, "equal widths", equal_widths(table, budget * table.full)) for budget in BUDGETS),
    ]
    return [
        Candidate("full", "full", full, table.price(full)),
        *(Candidate(f"{budget}x", method, subnet, table.price(subnet)) for budget, method, subnet in chosen),
    ]


def routed(router: Router, table: CostTable) -> list[Candidate]:
    """The router's answer to each budget."""
    subnets = [router.choose([Ceiling(table, budget * table.full, f"ttft={budget}x")]) for budget in BUDGETS]
    return [
        Candidate(f"{budget}x", "router", subnet, table.price(subnet))
        for budget, subnet in zip(BUDGETS, subnets, strict=True)
    ]


def measured(
    model: ElasticModel, candidates: list[Candidate], table: CostTable, blocks: TokenBlocks, *, prompt_tokens: int
) -> dict[str, Any]:
    """Loss and time of every candidate, as `report.write` takes them; the first candidate is the full model."""
    subnets = [candidate.subnet for candidate in candidates]
    evaluations = evaluate(model, subnets, blocks, show=True)
    timing = _timed(model, subnets, prompt_tokens)
    rows = [
        {**asdict(candidate), **asdict(evaluation), "prefill_ms": ms, "spread": spread}
        for candidate, evaluation, ms, spread in zip(
            candidates, evaluations, timing.milliseconds, timing.spreads, strict=True
        )
    ]
    return {
        "conditions": _conditions(model, blocks, prompt_tokens),
        "warning": trust_warning(table.conditions) or timing.warning,
        "search_space": asdict(model.search_space),
        "rows": rows,
    }


def _timed(model: ElasticModel, subnets: list[Subnet], prompt_tokens: int) -> Timing:
    """Times of one forward pass over a prompt, each between two of the full model's."""
    return time_interleaved(
        timed_run(model, "prefill", batch=1, tokens=prompt_tokens),
        model.search_space.full,
        subnets,
        rounds=TIMING_ROUNDS,
        repeats=REPEATS["prefill"],
        draw=np.random.default_rng(0),
        show=True,
    )


def _conditions(model: ElasticModel, blocks: TokenBlocks, prompt_tokens: int) -> dict[str, Any]:
    return {
        "device": describe_device(model.device),
        "dtype": dtype_name(model.dtype),
        "prefill": f"batch 1, {prompt_tokens} tokens, logits of the last, median of {TIMING_ROUNDS} interleaved rounds",
        "loss": f"{blocks.predicted_tokens} tokens of {blocks.text}",
        "versions": {package: version(package) for package in ("flextron", "torch", "transformers")},
    }
