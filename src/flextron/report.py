"""A quickstart's report: report.md, loss.png (loss against cost) and widths.png (widths per layer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flextron.atomic import write_text

mpl.use("agg")
STYLES = {"greedy": ("o-", "#1f5fa8"), "equal widths": ("s--", "#c2622d")}


def write(folder: Path, results: dict[str, Any]) -> Path:
    """Write the report and its pictures from measured results; returns the report's path."""
    _save(_loss_figure(results), folder / "loss.png")
    _save(_widths_figure(results), folder / "widths.png")
    path = folder / "report.md"
    write_text(path, _markdown(results))
    return path


def _markdown(results: dict[str, Any]) -> str:
    conditions = results["conditions"]
    full = results["rows"][0]
    lines = [
        f"# {conditions['model']}: one checkpoint, {len(results['rows'])} sub-networks",
        "",
        f"Units are ranked, the cheapest left out, and all sub-networks trained together on {conditions['training']}.",
        "",
        "| kept | method | before training | nats/token | above full | bits/byte | prefill ms | speed-up |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
        *(_table_row(row, full) for row in results["rows"]),
        "",
        "*kept*: share of the layers' weights, embeddings apart. *Before training*: nats/token. "
        f"Loss: {conditions['loss']}, ± standard error; *above "
        f"full* is paired. Prefill: {conditions['prefill']}. {conditions['device']}, {conditions['dtype']}; "
        + ", ".join(f"{package} {version}" for package, version in conditions["versions"].items())
        + ".",
        "",
        "![loss against cost](loss.png)",
        "",
        "![widths of each layer](widths.png)",
        "",
        f"## What each writes after “{conditions['prompt']}”",
        "",
        *(f"- **{row['name']}, {row['method']}**: {' '.join(row['completion'].split())}" for row in results["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any], full: dict[str, Any]) -> str:
    return (
        f"| {row['share']:.1%} | {row['method']} | {row['before_training']:.3f} "
        f"| {row['nats_per_token']:.3f} ± {row['standard_error']:.3f} "
        f"| {row['difference']:+.3f} ± {row['difference_standard_error']:.3f} | {row['bits_per_byte']:.3f} "
        f"| {row['prefill_ms']:.0f} | {full['prefill_ms'] / row['prefill_ms']:.2f}x |"
    )


def _loss_figure(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_share, by_time = figure.subplots(1, 2, sharey=True)
    for method, (style, color) in STYLES.items():
        rows = [row for row in results["rows"] if row["method"] == method or row is results["rows"][0]]
        losses = [row["nats_per_token"] for row in rows]
        shares = [100 * row["share"] for row in rows]
        by_share.plot(shares, losses, style, color=color, label=method)
        before = [row["before_training"] for row in rows]
        by_share.plot(shares, before, ":", color=color, label=f"{method}, before training")
        by_time.plot([row["prefill_ms"] for row in rows], losses, style, color=color, label=method)
    conditions = results["conditions"]
    _label(by_share, "share of the layers' weights kept, %", "nats per token")
    _label(by_time, "measured prefill, ms", "")
    by_share.legend(frameon=False)
    figure.suptitle(f"{conditions['model']}, {conditions['dtype']}, {conditions['device']}", fontsize=10)
    return figure


def _widths_figure(results: dict[str, Any]) -> Figure:
    rows = [row for row in results["rows"] if row["method"] == "greedy"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, axis, title in zip(
        figure.subplots(2, 1), ("neurons", "kv_groups"), ("MLP neurons kept", "KV groups kept"), strict=True
    ):
        full = max(rows[0]["subnet"][axis])
        image = axes.imshow(
            [[100 * width / full for width in row["subnet"][axis]] for row in rows],
            aspect="auto", cmap="viridis", vmin=0, vmax=100,
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set(title=f"{title}, % of {full}", xlabel="layer", ylabel="share kept")
        figure.colorbar(image, ax=axes)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
