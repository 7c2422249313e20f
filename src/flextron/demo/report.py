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
    "budget, method, kept, before training, nats/token, above full, bits/byte, predicted ms, measured ms, speed-up"
)


def write(folder: Path, results: dict[str, Any]) -> Path:
    """Write the report and its pictures from measured results; returns the report's path."""
    save_figure(_loss_figure(results), folder / "loss.png")
    save_figure(_widths_figure(results), folder / "widths.png")
    path = folder / "report.md"
    write_text(path, _markdown(results))
    return path


def _markdown(results: dict[str, Any]) -> str:
    conditions = results["conditions"]
    full = results["rows"][0]
    lines = [
        f"# {conditions['model']}: one checkpoint, any latency",
        "",
        f"Units are ranked, and all sub-networks trained together on {conditions['training']}.",
        f"A router chooses every layer's widths for a time to the first token; it learnt from {conditions['router']}."
        if conditions["router"]
        else "No router: its surrogate could not predict losses well enough.",
        "",
        f"| {COLUMNS.replace(', ', ' | ')} |",
        "|---:|---|" + "---:|" * (COLUMNS.count(",") - 1),
        *(_table_row(row, full) for row in results["rows"]),
        "",
        "*budget*: share of the full model's time. *kept*: share of the layers' weights, embeddings apart. *Before "
        f"training*: nats/token. Loss: {conditions['loss']}, ± standard error; *above full* is paired. Time: "
        f"{conditions['prefill']}. {conditions['device']}, {conditions['dtype']}; "
        + ", ".join(f"{package} {version}" for package, version in conditions["versions"].items())
        + ".",
        "",
        "![loss against time](loss.png)",
        "",
        "![widths of each layer](widths.png)",
        "",
        *_per_token(results.get("per_token", [])),
        f"## What the full model and the router's answers write after “{conditions['prompt']}”",
        "",
        *(
            f"- **{row['name']}**: {' '.join(row['completion'].split())}"
            for row in results["rows"]
            if "completion" in row
        ),
    ]
    return "\n".join(lines) + "\n"


def _per_token(rows: list[dict[str, Any]]) -> list[str]:
    """What routing every token by itself gives, against the router's answer of the same average cost."""
    if not rows:
        return []
    return [
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
        "",
    ]


def _table_row(row: dict[str, Any], full: dict[str, Any]) -> str:
    before = "" if row["before_training"] is None else f"{row['before_training']:.3f}"
    return (
        f"| {row['name']} | {row['method']} | {row['share']:.1%} | {before} "
        f"| {row['nats_per_token']:.3f} ± {row['standard_error']:.3f} "
        f"| {row['difference']:+.3f} ± {row['difference_standard_error']:.3f} | {row['bits_per_byte']:.3f} "
        f"| {row['predicted_ms']:.0f} | {row['prefill_ms']:.0f} | {full['prefill_ms'] / row['prefill_ms']:.2f}x |"
    )


def _loss_figure(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for method, (style, color) in STYLES.items():
        rows = [row for row in results["rows"] if row["method"] in ("full", method)]
        times = [row["prefill_ms"] for row in rows]
        axes.plot(times, [row["nats_per_token"] for row in rows], style, color=color, label=method)
        before = [row["before_training"] for row in rows]
        if len(rows) > 1 and None not in before:
            axes.plot(times, before, ":", color=color, alpha=0.5, label=f"{method}, before training")
    conditions = results["conditions"]
    _label(axes, "measured time to the first token, ms", "nats per token")
    axes.legend(frameon=False)
    prompt = conditions["prefill"].split(", logits")[0]
    figure.suptitle(f"{conditions['model']}, {conditions['dtype']}, {conditions['device']}, {prompt}", fontsize=9)
    return figure


def _widths_figure(results: dict[str, Any]) -> Figure:
    rows = [row for row in results["rows"] if row["method"] in ("full", "router")]
    space = SearchSpace(**results["search_space"])
    subnets = {row["name"]: Subnet(**row["subnet"]) for row in rows}
    return widths_figure(subnets, space, "what the router keeps for each budget of time to the first token")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
