"""The picture of README.md: loss against measured time, from the figures in docs/results.md; nothing is run.

python benchmarks/readme_picture.py docs/results.md docs/loss-against-time.png
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")
LINES = {
    "**elastic, static router**": ("flextron, one router", "#1b6ca8", "o-", 2.6),
    "elastic, routed per token": ("flextron, every token its own widths", "#5fb0e5", "o-", 2.6),
    "(c) same weights, greedy": ("greedy choice", "#3a9d5d", "^--", 1.4),
    "(a) same weights, equal widths (Mix'n'Match)": (
        "equal widths (Mix'n'Match)",
        "#c77c11",
        "v--",
        1.4,
    ),
    "(b) same weights, layer dropping": ("layers dropped", "#b5382a", "D--", 1.4),
}
"""Row of the table -> its label, colour, marker and line width."""
CELL = re.compile(r"([\d.]+)x: ([\d.]+)(?: \([+-][\d.]+ ± ([\d.]+)\))?")


@dataclass(frozen=True)
class Point:
    """One cell of the table."""

    time: float
    """As a part of the full model's time to the first token."""
    loss: float
    """Nats per token."""
    error: float
    """Standard error of the difference to the router at equal time; 0 for the router."""


def rows_of(page: str) -> dict[str, list[Point]]:
    """The first table of losses in docs/results.md, by method.

    Raises:
        ValueError: the page has no such table, or a method that the picture shows is missing.
    """
    lines = re.findall(
        r"^\| (.+?) \|(.+)\|$", page.partition("## Loss on")[2].partition("\n## ")[0], flags=re.MULTILINE
    )
    rows = {
        name: [Point(float(t), float(y), float(e or 0)) for t, y, e in CELL.findall(cells)] for name, cells in lines
    }
    if missing := [name for name in LINES if not rows.get(name)]:
        raise ValueError(f"no figures for {', '.join(missing)}; is this docs/results.md?")
    return rows


def full_loss(page: str) -> float:
    """Nats per token of the full model after elastic training."""
    found = re.search(r"after elastic training ([\d.]+\d)", page)
    if found is None:
        raise ValueError("no loss of the full model after elastic training; is this docs/results.md?")
    return float(found[1])


def caption(page: str) -> str:
    """Conditions, as the page has them."""
    trained = re.search(r"trained before, on ([\d,]+) tokens", page)
    asked = re.search(r"Losses are means over (\d+) tokens .* time to the first token of a (\d+)-token prompt", page)
    machine = re.search(r"python [\d.]+; (.+?);", page)
    if trained is None or asked is None or machine is None:
        raise ValueError("no conditions in the page; is this docs/results.md?")
    return (
        f"SmolLM2-135M-Instruct with flextron's pack of {trained[1]} training tokens, one seed; {asked[2]}-token "
        f"prompts on an {machine[1]}. Loss on {int(asked[1]):,} held-out tokens. All lines choose from the same "
        "weights. Bars: standard error of the difference to the router at equal time (text and timing). Per-token "
        "times come from the latency table, all others were measured. Source: docs/results.md; drawn by "
        "benchmarks/readme_picture.py."
    )


def draw(page: str) -> Figure:
    """The picture, with its conditions below it."""
    rows = rows_of(page)
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    full = Point(1.0, full_loss(page), 0.0)
    for name, (label, colour, style, width) in LINES.items():
        _draw_line(axes, [full, *rows[name]], label=label, colour=colour, style=style, width=width)
    axes.plot(full.time, full.loss, "k*", markersize=13, zorder=5)
    axes.annotate("full model", (full.time, full.loss), (10, -12), textcoords="offset points")
    axes.set(
        xlabel="time to the first token, part of the full model's", ylabel="loss, nats per token (lower is better)"
    )
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.supxlabel("\n".join(textwrap.wrap(caption(page), 138)), fontsize=7.5, color="#444444", ha="left", x=0.02)
    return figure


def _draw_line(axes: Axes, points: list[Point], *, label: str, colour: str, style: str, width: float) -> None:
    times, losses, errors = zip(*((point.time, point.loss, point.error) for point in points), strict=True)
    axes.errorbar(
        times, losses, yerr=errors, fmt=style, color=colour, label=label, linewidth=width, markersize=5, capsize=2
    )


def main(source: str, out: str) -> None:
    draw(Path(source).read_text(encoding="utf8")).savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
