"""`flextron evaluate --tasks`: run the tasks, and report as a table, results.json, results.md and results.png."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any

from flextron.atomic import write_text
from flextron.choosing.choice import choose
from flextron.choosing.explaining import measured_ms
from flextron.choosing.routing import route, route_tokens
from flextron.config import EvaluateConfig
from flextron.costs.pricing import Ceiling
from flextron.costs.table import CostTable
from flextron.data.blocks import load_blocks
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device
from flextron.errors import CheckpointError
from flextron.evaluation import evaluate
from flextron.pictures.widths import save_figure
from flextron.routers.token.batch import TokenRouting
from flextron.subnet import Subnet
from flextron.tasks.harness import evaluate_tasks
from flextron.tasks.names import data_folder
from flextron.tasks.results import HEADLINE, Average, TaskResult, averages, floored, plain_name

VERSION = 2
KEPT = "scores.jsonl"
"""File in the results folder with the scores that are not computed again."""


@dataclass(frozen=True)
class _Run:
    """One thing to score, and its cost in the metric of the budget's first limit."""

    what: Subnet | TokenRouting
    cost: float | None = None
    """Predicted cost as a share of the full model's. For token routing it is known only after the run."""
    metric: str | None = None
    ceiling: Ceiling | None = None
    """For a budget of time, the limit whose time is measured after scoring."""


def evaluate_on_tasks(
    model: ElasticModel, config: EvaluateConfig, *, original: ElasticModel | None = None, warn: Callable[[str], None]
) -> str:
    """Score everything the config names, write its files, and return the text to print.

    Args:
        original: also measure the divergence of each run from this model on the config's text.

    Raises:
        FlextronError: `route` or `evaluate_tasks` fails.
    """
    runs = _runs(model, config, warn)
    folder = config.out_dir
    results = evaluate_tasks(
        model,
        {name: run.what for name, run in runs.items()},
        config.tasks,
        data=config.task_data,
        limit=config.limit,
        keep=None if folder is None else folder / KEPT,
        show=True,
    )
    summary = _summary(model, config, runs, results)
    if original is not None:
        _add_divergences(summary, model, config, runs, original)
    said = json.dumps(summary, indent=1, allow_nan=False) if config.json else markdown(summary)
    if folder is not None:
        try:
            write_text(folder / "results.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
            write_text(folder / "results.md", markdown(summary))
            save_figure(_figure(summary), folder / "results.png")
        except CheckpointError:
            print(said)  # a full disk does not take the results along
            raise
    return said


def _runs(model: ElasticModel, config: EvaluateConfig, warn: Callable[[str], None]) -> dict[str, _Run]:
    routed = {
        budget: route(model, budget, config.model, any_device=config.any_device, warn=warn) for budget in config.budget
    }
    tables = [answer.ceilings[0].table for answer in routed.values()]
    subnets = {wish: choose(model, wish, config.model) for wish in config.subnet}
    runs = {name: _static(subnet, tables[0] if tables else None) for name, subnet in subnets.items()}
    for budget, answer in routed.items():
        for note in answer.notes:
            warn(note)
        ceiling = answer.ceilings[0]
        runs[budget] = _static(answer.subnet, ceiling.table, ceiling if ceiling.table.unit == "ms" else None)
    for budget in config.budget if config.per_token else ():
        routing = route_tokens(model, budget, config.model, any_device=config.any_device, warn=warn)
        runs[f"{budget} per token"] = _Run(routing, metric=routed[budget].ceilings[0].table.metric)
    return runs


def _static(subnet: Subnet, table: CostTable | None, ceiling: Ceiling | None = None) -> _Run:
    if table is None:
        return _Run(subnet)
    return _Run(subnet, table.price(subnet) / table.full, table.metric, ceiling)


def _measured(model: ElasticModel, run: _Run, folder: str) -> float | None:
    """Time measured now, as a share of the full model's. None if the latency table was measured elsewhere."""
    if run.ceiling is None or not isinstance(run.what, Subnet):
        return None
    times = measured_ms(model, run.ceiling, run.what, folder)
    return None if times is None else times[0] / times[1]


def _summary(
    model: ElasticModel, config: EvaluateConfig, runs: dict[str, _Run], results: Sequence[TaskResult]
) -> dict[str, Any]:
    """Everything to print and write, as JSON without NaN."""
    headline = [name for name in HEADLINE if name in {plain_name(result.task) for result in results}]
    rows = []
    for average, over_all in zip(averages(results, headline), averages(results), strict=True):
        own = [result for result in results if result.run == average.run]
        run = runs[average.run]
        costs = [result.cost for result in own if result.cost is not None]
        rows.append(
            {
                "run": average.run,
                "per_token": bool(costs),
                "share": fmean(result.share for result in own),
                "cost": fmean(costs) if costs else run.cost,
                "cost_metric": run.metric,
                "measured": _measured(model, run, config.model) if config.measure else None,
                "headline": _without_run(average),
                "all": _without_run(over_all),
                "tasks": {result.task: _task(result, results) for result in own},
            }
        )
    data = data_folder(config.task_data)
    about = {
        "model": config.model,
        "weights": model.fingerprint(),
        "dtype": model.weights_type,
        "device": describe_device(model.device),
        "limit": config.limit,
        "data": "lm-eval's own" if data is None else "local files",
        "versions": {package: version(package) for package in ("flextron", "lm-eval", "transformers", "torch")},
    }
    summary: dict[str, Any] = _without_nan({"version": VERSION, "conditions": about, "runs": rows})
    return summary


def _without_run(average: Average) -> dict[str, Any]:
    return {key: value for key, value in asdict(average).items() if key != "run"}


def _add_divergences(
    summary: dict[str, Any],
    model: ElasticModel,
    config: EvaluateConfig,
    runs: dict[str, _Run],
    original: ElasticModel,
) -> None:
    """Add every run's loss on the config's text, and its divergence from the original model there."""
    blocks = load_blocks(model.tokenizer, config.text, tokens=config.tokens, block_tokens=config.block_tokens)
    found = evaluate(model, [run.what for run in runs.values()], blocks, original=original, show=True)
    for row, result in zip(summary["runs"], found, strict=True):
        row |= {"nats_per_token": result.nats_per_token, "divergence": result.divergence}
        row["divergence_standard_error"] = _without_nan(result.divergence_standard_error)
    summary["conditions"] |= {"original": config.original, "text": config.text, "tokens": found[0].tokens}


def _task(result: TaskResult, results: Sequence[TaskResult]) -> dict[str, Any]:
    first = next(other for other in results if other.task == result.task)
    difference, error = result.difference(first)
    flips, flips_error = result.flips(first)
    return {
        "shots": result.shots,
        "metric": result.metric,
        "accuracy": result.accuracy,
        "chance": result.chance,
        "over_chance": result.over_chance,
        "flips": flips,
        "flips_standard_error": flips_error,
        "standard_error": result.standard_error,
        "difference": difference,
        "difference_standard_error": error,
        "documents": len(result.documents),
        "means": {metric: fmean(values) for metric, values in result.scores.items()},
    }


def markdown(summary: dict[str, Any]) -> str:
    """Write the results as a Markdown table, and below it the conditions of the measurement."""
    rows, about = summary["runs"], summary["conditions"]
    tasks = rows[0]["tasks"]
    titles = [f"{name}, {task['metric']}, {task['shots']}-shot" for name, task in tasks.items()]
    prices = _prices(rows)
    kl = ["KL"] if "divergence" in rows[0] else []
    columns = [*prices, "over chance", "kept", "flips", *kl, *titles]
    guessing = ["guessing", *["" for _ in prices], "0", "", "", *["" for _ in kl]]
    lines = [
        f"| | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
        *(_line(_cells(row, prices)) for row in rows),
        _line([*guessing, *(f"{100 * task['chance']:.1f}" for task in tasks.values())]),
    ]
    return "\n".join([*lines, "", *_legend(rows, about), ""])


def _prices(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Columns for what a run costs, and their keys in `rows`: those that have a value."""
    keys = {"cost": "cost", "time": "measured"}
    return {column: key for column, key in keys.items() if any(row[key] is not None for row in rows)}


def _cells(row: dict[str, Any], prices: dict[str, str]) -> list[str]:
    average = row["headline"]
    kept = "" if average["kept"] is None else f"{floored(average['kept'])} ± {_points(average['kept_standard_error'])}"
    flips = _percent(average["flips"], average["flips_standard_error"])
    kl = [_nats(row["divergence"], row["divergence_standard_error"])] if "divergence" in row else []
    over_chance = _percent(average["over_chance"], average["standard_error"])
    scored = [_percent(task["accuracy"], task["standard_error"]) for task in row["tasks"].values()]
    return [row["run"], *(_times(row[key]) for key in prices.values()), over_chance, kept, flips, *kl, *scored]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _legend(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """What the columns mean, and the conditions."""
    tasks, average, first = rows[0]["tasks"], rows[0]["headline"], rows[0]["run"]
    metrics = sorted({row["cost_metric"] for row in rows if row["cost_metric"]})
    meanings = {
        "cost": f"part of the full model's by the table for {', '.join(metrics)}",
        "time": "part of the full model's, measured now",
    }
    priced = "".join(f" *{column}*: {meanings[column]}." for column in _prices(rows))
    documents = ", ".join(f"{name} {task['documents']}" for name, task in tasks.items())
    lines = [
        f"Percent ± standard error. *over chance*: accuracy minus that of guessing, averaged over "
        f"{', '.join(average['tasks'])}. *kept*: its share of {first}'s, rounded down. *flips*: documents that "
        f"only one of this run and {first} answers correctly. The last columns are plain accuracies.{priced}",
    ]
    if "original" in about:
        lines.append(
            f"*KL*: divergence from the predictions of {about['original']} on {about['tokens']} tokens of "
            f"{about['text']}, in nats per token ± standard error."
        )
    sampled = f" (a fixed sample of at most {about['limit']} each)" if about["limit"] else ""
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    lines.append(f"Documents: {documents}{sampled}.")
    lines.append(f"{about['model']}, {about['dtype']}, {about['device']}; {versions}; data: {about['data']}.")
    return lines


def _figure(summary: dict[str, Any]) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("agg")
    rows = summary["runs"]
    priced = all(row["cost"] is not None for row in rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for per_token, style, color, label in (
        (False, "o-", "#1f5fa8", "sub-network"),
        (True, "s--", "#c2622d", "per token"),
    ):
        own = sorted(
            ((row["cost"] if priced else row["share"], row) for row in rows if row["per_token"] is per_token),
            key=lambda point: point[0],
        )
        if own:
            heights = [100 * row["headline"]["over_chance"] for _, row in own]
            errors = [100 * (row["headline"]["standard_error"] or 0) for _, row in own]
            axes.errorbar([x for x, _ in own], heights, errors, fmt=style, color=color, capsize=3, label=label)
    metrics = sorted({row["cost_metric"] for row in rows if row["cost_metric"]})
    x = (
        f"cost by the table ({', '.join(metrics)}), part of the full model's"
        if priced
        else "share of the layers' weights"
    )
    axes.set(xlabel=x, ylabel="average accuracy over chance, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(f"{', '.join(rows[0]['headline']['tasks'])}; ± standard error", fontsize=9)
    return figure


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f} ± {_points(error)}"


def _nats(value: float, error: float | None) -> str:
    return f"{value:.3f} ± {'?' if error is None else f'{error:.3f}'}"


def _points(error: float | None) -> str:
    return "?" if error is None else f"{100 * error:.1f}"


def _times(part: float | None) -> str:
    return "" if part is None else f"{part:.3f}x"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
