"""The answer to a budget, explained: what it is predicted to cost and measured at, who chose it, and what to know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flextron.atomic import clear_errors, write_text
from flextron.budget import Budget
from flextron.choosing.routing import Routed
from flextron.costs.pricing import Ceiling, format_cost
from flextron.costs.saved import find_table, foreign_conditions
from flextron.costs.timing import OFF, REPEATS, TOKENS, Timing, present_conditions, time_interleaved, timed_run
from flextron.data.blocks import require_tokenizer
from flextron.elastic.loss import body_of
from flextron.elastic.model import ElasticModel
from flextron.errors import FlextronError
from flextron.pictures.usage import TokenUsage
from flextron.pictures.usage_figure import usage_figure
from flextron.pictures.usage_page import usage_html
from flextron.pictures.widths import save_figure, text_drawing
from flextron.routers.token.batch import TokenRouting
from flextron.subnet import Subnet

ROUNDS = 3
"""Timings of the sub-network and the full model, in turn."""


def explain(
    model: ElasticModel, routed: Routed, folder: str | Path, *, measure: bool = True, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """An answer to a budget as JSON: sub-network, costs of each limit, predicted loss, notes.

    Args:
        measure: time the sub-network against the full model where the budget limits a time and the latency table was
            measured here; a few seconds for each limit.
        warnings: what `route` warned of, to stand before its notes.
    """
    router = routed.router
    return {
        "subnet": asdict(routed.subnet),
        "share": model.share(routed.subnet),
        "limits": [_limit(model, ceiling, routed.subnet, folder, measure=measure) for ceiling in routed.ceilings],
        "chosen_by": "greedy" if router is None else "router",
        "router_metric": None if router is None else router.about.metric,
        "predicted_nats_per_token": None
        if router is None or router.about.kept  # whose surrogate knows other weights
        else router.predicted_loss(routed.subnet),
        "notes": [*warnings, *routed.notes],
    }


def _limit(
    model: ElasticModel, ceiling: Ceiling, subnet: Subnet, folder: str | Path, *, measure: bool
) -> dict[str, Any]:
    table = ceiling.table
    numbers: dict[str, Any] = {"at_most": ceiling.limit, "predicted": table.price(subnet), "full_model": table.full}
    measured = measured_ms(model, ceiling, subnet, folder) if measure and table.unit == "ms" else None
    if measured is not None:
        numbers |= {"measured": measured.ms, "full_model_measured": measured.full_ms}
        numbers |= {"measured_off_predicted": measured.ms / table.price(subnet) - 1}
        numbers |= {"table_error": table.conditions.get("error_median"), "measured_warning": measured.warning}
    return {"limit": ceiling.text, "unit": table.unit, **numbers}


class Measured(NamedTuple):
    """Times by the measure of a limit."""

    ms: float
    full_ms: float
    warning: str | None
    """Why they are not to be trusted, where they are not."""


def measured_ms(model: ElasticModel, ceiling: Ceiling, subnet: Subnet, folder: str | Path) -> Measured | None:
    """Time of a sub-network and of the full model by the measure of a limit; None where its tables are not of here.

    Texts are as long as the tables', and times are scaled as theirs are, so that prediction and measurement compare.
    """
    (limit,) = Budget.parse(ceiling.text).limits
    parts = []
    for metric in ("ttft", "tpot") if limit.metric == "e2e" else (limit.metric,):
        conditions = find_table(model, folder, metric, tokens=limit.prompt_tokens, foreign=True)
        about = conditions.conditions
        if "torch" not in about or foreign_conditions(conditions, present_conditions(model)):
            return None
        tokens = about[TOKENS[metric]]
        times = (limit.prompt_tokens or tokens) / tokens if metric == "ttft" else (limit.new_tokens or 2) - 1
        parts.append((times, about["phase"], about["batch"], tokens))
    timings = [(times, _timed(model, subnet, phase, batch=batch, tokens=n)) for times, phase, batch, n in parts]
    warnings = [timing.warning for _, timing in timings if timing.warning is not None]
    return Measured(
        sum(times * timing.milliseconds[0] for times, timing in timings),
        sum(times * timing.full_ms for times, timing in timings),
        next(iter(warnings), None),
    )


def _timed(model: ElasticModel, subnet: Subnet, phase: str, *, batch: int, tokens: int) -> Timing:
    return time_interleaved(
        timed_run(model, phase, batch=batch, tokens=tokens),
        model.search_space.full,
        [subnet],
        rounds=ROUNDS,
        repeats=REPEATS[phase],
        draw=np.random.default_rng(0),
    )


def _measured_line(limit: dict[str, Any]) -> str:
    """What was measured, and how far that is from what was predicted, where the table's own error is less."""
    ms, full_ms, off = limit["measured"], limit["full_model_measured"], limit["measured_off_predicted"]
    line = f"  measured: {format_cost(ms, 'ms')}, {ms / full_ms:.3f}x of {format_cost(full_ms, 'ms')}"
    if abs(off) > max(OFF, limit["table_error"] or 0):
        line += f"; measured is {abs(off):.0%} {'above' if off > 0 else 'below'} predicted"
    if limit["measured_warning"] is not None:
        line += f" ({limit['measured_warning']})"
    return line


def as_text(routed: Routed, explained: dict[str, Any], folder: str | Path) -> str:
    """What `explain` gave, for people: a drawing, costs, who chose, and notes."""
    space = routed.ceilings[0].table.search_space
    lines = [f"{routed.subnet}; {explained['share']:.1%} of the layers' weights", ""]
    lines += [text_drawing(routed.subnet, space), ""]
    for predicted, limit in zip(routed.costs(), explained["limits"], strict=True):
        lines.append(predicted)
        if "measured" in limit:
            lines.append(_measured_line(limit))
    if routed.router is None:
        lines.append(f"chosen by sensitivities (greedy); a router chooses better: flextron train-router {folder}")
    elif routed.router.about.kept:
        lines.append(
            f"chosen by the router for {routed.router.about.metric}, at whose answers the weights were trained"
        )
    else:
        about = routed.router.about
        expected = f"{explained['predicted_nats_per_token']:.3f} nats per token of {about.text}"
        lines.append(f"chosen by the router for {about.metric}; it expects {expected}, half to the full model's words")
    return "\n".join([*lines, *(f"note: {note}" for note in explained["notes"])])


def as_json(budget: str, explained: dict[str, Any]) -> str:
    """What `explain` gave, for programs."""
    return json.dumps({"budget": budget, **explained}, indent=1, allow_nan=False)


@torch.inference_mode()
def usage_of(model: ElasticModel, routing: TokenRouting, text: str, budget: str) -> TokenUsage:
    """What every token of a text uses within a budget, from one forward pass.

    Raises:
        FlextronError: no tokenizer, or an empty text.
    """
    tokenizer = require_tokenizer(model.tokenizer)
    tokens_BT: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    if not tokens_BT.numel():
        raise FlextronError("the text is empty; give some text to look at.")
    neurons: dict[int, torch.Tensor] = {}
    routing.forget()
    routing.seen = lambda layer, widths_BT: neurons.update({layer: widths_BT[0].cpu()})
    try:
        with routing.use():
            body_of(model.lm)(input_ids=tokens_BT.to(model.device), use_cache=False)
    finally:
        routing.seen = None
    return TokenUsage(
        tokens=tuple(tokenizer.batch_decode(tokens_BT[0, :, None], clean_up_tokenization_spaces=False)),
        neurons_LT=torch.stack([neurons[layer] for layer in range(len(model.layers))]).numpy(),
        space=model.search_space,
        budget=budget,
        cost=routing.average_cost,
    )


def save_usage(usage: TokenUsage, file: Path) -> None:
    """Write a picture of what tokens used: a page that shows all of it (.html), or a figure."""
    if file.suffix != ".html":
        save_figure(usage_figure(usage), file)
        return
    with clear_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, usage_html(usage))
