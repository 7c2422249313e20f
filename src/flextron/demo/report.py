"""A quickstart's report: report.md, loss.png (loss against measured time) and widths.png (widths by budget)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flextron.atomic import write_text
from flextron.pictures.widths import save_figure, widths_figure
from flextron.subnet import SearchSpace, Subnet

mpl.use("agg")
STYLES = {"router": ("o-", "#1f5fa8"), "greedy": ("^:", "#3c8d5a"), "equal widths": ("s--", "#c2622d")}
COLUMNS = (
    *("budget", "method", "kept", "nats/token", "above full"),
    *("bits/byte", "predicted ms", "measured ms", "speed-up"),
)
BEFORE = "before training"
"""A column after `kept`, where the tour trains."""
FAR_OFF = 0.1
"""Difference of a measured time from the predicted one that the table names."""


def write(folder: Path, results: dict[str, Any]) -> Path:
    """Write the report and its pictures from measured results, of before or after training; returns its path."""
    save_figure(_loss_figure(results), folder / "loss.png")
    save_figure(_widths_figure(results), folder / "widths.png")
    path = folder / "report.md"
    write_text(path, "\n".join(_markdown(results)) + "\n")
    return path


def _markdown(results: dict[str, Any]) -> list[str]:
    conditions = results["conditions"]
    full = results["rows"][0]
    trains = any(row.get("before_training") is not None for row in results["rows"])
    columns = [*COLUMNS[:3], *([BEFORE] if trains else []), *COLUMNS[3:]]
    return [
        f"# {conditions['model']}: one checkpoint, any latency",
        "",
        *([f"**Do not trust the times below.** {results['warning']}", ""] if results["warning"] else []),
        *_how(conditions),
        "",
        f"| {' | '.join(columns)} |",
        "|---:|---|" + "---:|" * (len(columns) - 2),
        *(_table_row(row, full, trains=trains) for row in results["rows"]),
        "",
        "*budget*: share of the full model's time. *kept*: share of the layers' weights, embeddings apart. "
        f"{'*Before training*: nats/token. ' if trains else ''}Loss: {conditions['loss']}, ± standard error; "
        "*above full* is paired. Time: "
        f"{conditions['prefill']}, ± their median deviation. {conditions['device']}, {conditions['dtype']}; "
        + ", ".join(f"{package} {version}" for package, version in conditions["versions"].items())
        + ".",
        "",
        "![loss against time](loss.png)",
        "",
        "![widths of each layer](widths.png)",
        *_per_token(results.get("per_token", [])),
        *_accuracy(conditions),
        *_completions(results),
        *_left_out(conditions),
    ]


def _how(conditions: dict[str, Any]) -> list[str]:
    """How the sub-networks came about."""
    if not conditions["training"]:
        return [
            "Units are ranked; nothing is trained yet, and there is no router: this is the report so far. The same "
            "command goes on."
        ]
    if not conditions["router"] and not conditions.get("prompt"):
        router = "There is no router yet: this is the report so far. The same command goes on."
    elif not conditions["router"]:
        router = "There is no router: it could not predict losses well enough."
    else:
        learnt = f"it learnt from {conditions['router']}."
        router = f"A router chooses every layer's widths for a time to the first token; {learnt}"
    return [f"Units are ranked, and all sub-networks trained together on {conditions['training']}.", router]


def _accuracy(conditions: dict[str, Any]) -> list[str]:
    """Accuracy by size that was measured when the model was packed."""
    table = conditions.get("accuracy")
    return ["", "## Accuracy over chance, measured when the model was packed", "", table] if table else []


def _completions(results: dict[str, Any]) -> list[str]:
    rows = [row for row in results["rows"] if "completion" in row]
    if not rows:
        return []
    return [
        "",
        f"## What the full model and the router's answers write after “{results['conditions']['prompt']}”",
        "",
        *(f"- **{row['name']}**: {' '.join(row['completion'].split())}" for row in rows),
    ]


def _left_out(conditions: dict[str, Any]) -> list[str]:
    """What a quick run does not do, and the command that does."""
    command = conditions.get("left_out")
    if not command:
        return []
    if "--from-scratch" in command:
        return [
            "",
            "## Train it yourself",
            "",
            "This model came trained, as a pack. The whole way, ranking and a little training included, takes 6 to 8 "
            "minutes on two cores:",
            "",
            "```",
            command,
            "```",
        ]
    return [
        "",
        "## What this quick run left out",
        "",
        "Widths for every token by itself, four times the text to rank and train on, and finer measurements. This adds "
        "them, in 10 to 18 minutes on two cores:",
        "",
        "```",
        command,
        "```",
    ]


def _per_token(rows: list[dict[str, Any]]) -> list[str]:
    """What routing every token by itself gives, against the router's answer of the same average cost."""
    if not rows:
        return []
    return [
        "",
        "## Every token with its own widths",
        "",
        "| budget | average cost | router | per token | difference |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {row['budget']}x | {row['cost']:.3f}x | {row['static']['nats_per_token']:.3f} "
            f"| {row['per_token']['nats_per_token']:.3f} | {row['per_token']['difference']:+.3f} "
            f"± {row['per_token']['difference_standard_error']:.3f} |"
            for row in rows
        ),
        "",
        "nats/token on the same tokens, the router's answer at the average cost that tokens had. What they got: "
        "[tokens.html](tokens.html).",
        "",
        "![what tokens got](tokens.png)",
    ]


def _table_row(row: dict[str, Any], full: dict[str, Any], *, trains: bool) -> str:
    before = row.get("before_training")
    learnt = f"| {'' if before is None else f'{before:.3f}'} " if trains else ""
    return (
        f"| {row['name']} | {row['method']} | {row['share']:.1%} {learnt}"
        f"| {row['nats_per_token']:.3f} ± {row['standard_error']:.3f} "
        f"| {row['difference']:+.3f} ± {row['difference_standard_error']:.3f} | {row['bits_per_byte']:.3f} "
        f"| {row['predicted_ms']:.0f} | {_measured_ms(row)} | {full['prefill_ms'] / row['prefill_ms']:.2f}x |"
    )


def _measured_ms(row: dict[str, Any]) -> str:
    off = row["prefill_ms"] / row["predicted_ms"] - 1
    note = f", {abs(off):.0%} {'above' if off > 0 else 'below'} predicted" if abs(off) > FAR_OFF else ""
    return f"{row['prefill_ms']:.0f} ± {_spread_ms(row):.0f}{note}"


def _spread_ms(row: dict[str, Any]) -> float:
    spread: float = row["prefill_ms"] * row["spread"]
    return spread


def _loss_figure(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for method in STYLES:
        rows = [row for row in results["rows"] if row["method"] in ("full", method)]
        if len(rows) > 1:
            _draw(axes, method, sorted(rows, key=lambda row: -row["predicted_ms"]))
    _label(axes, "measured time to the first token, ms (bars: median deviation)", "nats per token")
    axes.legend(frameon=False)
    figure.suptitle(_title(results), fontsize=9)
    return figure


def _draw(axes: Axes, method: str, rows: list[dict[str, Any]]) -> None:
    """One method's curve with error bars, and below it in faint what it was before training."""
    style, color = STYLES[method]
    times = [row["prefill_ms"] for row in rows]
    axes.errorbar(
        times,
        [row["nats_per_token"] for row in rows],
        xerr=[_spread_ms(row) for row in rows],
        yerr=[row["difference_standard_error"] for row in rows],
        fmt=style,
        color=color,
        capsize=3,
        label=method,
    )
    before = [row["before_training"] for row in rows if row.get("before_training") is not None]
    if len(before) == len(rows):
        axes.plot(times, before, ":", color=color, alpha=0.5, label=f"{method}, before training")


def _title(results: dict[str, Any]) -> str:
    conditions = results["conditions"]
    trained = f"trained on {conditions['training']}" if conditions["training"] else "not trained yet"
    prompt = conditions["prefill"].split(", logits")[0]
    title = f"{conditions['model']}, {trained}\n{conditions['dtype']}, {conditions['device']}, {prompt}"
    return f"BUSY MACHINE, DO NOT TRUST THE TIMES\n{title}" if results["warning"] else title


def _widths_figure(results: dict[str, Any]) -> Figure:
    """Widths that the router chooses, or without one the greedy choice."""
    methods = {row["method"] for row in results["rows"]}
    method, says = ("router", "the router keeps") if "router" in methods else ("greedy", "the greedy choice keeps")
    rows = [row for row in results["rows"] if row["method"] in ("full", method)]
    space = SearchSpace(**results["search_space"])
    subnets = {row["name"]: Subnet(**row["subnet"]) for row in rows}
    return widths_figure(subnets, space, f"what {says} for each budget of time to the first token")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
