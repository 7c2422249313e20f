"""A picture that shows how many MLP neurons each token of a text ran, drawn by matplotlib. No torch here.

Shapes: L layers, T tokens of one text, K widths of the search space.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flextron.pictures.usage import COLORS, INK, TokenUsage, color_scale, colors, summary, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 90
"""Characters in a line of the picture's text."""
LINES = 40
"""Lines of the picture's text."""

_FONT = "DejaVu Sans Mono"
_ADVANCE_EM = 1233 / 2048  # of that font's characters
_TEXT_INCHES = 9.4


def usage_figure(usage: TokenUsage) -> Figure:
    """Draw the text with tokens coloured by their share, above a heat map of the tokens' widths in each layer.

    Spaces, tabs and newlines become symbols, an empty token an empty set, and characters that the font lacks a box.
    A token longer than a line is cut. After LINES lines, a last one gives the number of tokens left out.
    """
    from matplotlib.figure import Figure

    shown = _shown(usage.tokens)
    places = _places(shown, usage.tokens)
    lines = places[-1][0] + 1 + (len(places) < len(shown))
    title = [*textwrap.wrap(summary(usage), 135), *textwrap.wrap(verdict(usage), 135)]
    text_at, text_height, map_height = 0.4 + 0.16 * len(title), 0.255 * lines, 2.9
    map_at = text_at + text_height + 0.95
    width, height = 10.0, map_at + map_height + 0.6
    figure = Figure(figsize=(width, height))

    def add_axes(left: float, top: float, across: float, down: float) -> Axes:
        """Add axes; all sizes are in inches from the upper left corner."""
        return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height))

    figure.text(0.3 / width, 1 - 0.2 / height, "\n".join(title), size=9.5, va="top", parse_math=False)
    _draw_tokens(add_axes(0.3, text_at, _TEXT_INCHES, text_height), usage, shown, places)
    _draw_scale(add_axes(7.1, map_at - 0.83, 2.6, 0.12), usage)
    _draw_widths(add_axes(0.9, map_at, 7.9, map_height), add_axes(8.95, map_at, 0.18, map_height), usage)
    return figure


def _shown(tokens: Sequence[str]) -> list[str]:
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont(_FONT)).get_charmap()
    return [_shown_token(token, glyphs) for token in tokens]


def _shown_token(token: str, glyphs: Container[int]) -> str:
    symbols = {"\n": "\u21b5", "\t": "\u2192"}
    shown = ""
    for char in unicodedata.normalize("NFC", token):
        if char.isspace():
            shown += symbols.get(char, "\u00b7")
        else:
            one_cell = char.isprintable() and unicodedata.category(char)[0] != "M" and ord(char) in glyphs
            shown += char if one_cell else "\u25a1"
    return (shown if len(shown) <= COLUMNS else shown[: COLUMNS - 1] + "\u2026") or "\u2205"


def _places(shown: Sequence[str], tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Line and column of each token that fits into LINES lines."""
    places = []
    line = column = 0
    for text, token in zip(shown, tokens, strict=True):
        if column + len(text) > COLUMNS:
            line, column = line + 1, 0
        if line == LINES:
            break
        places.append((line, column))
        column += len(text)
        if "\n" in token:
            line, column = line + 1, 0
    return places


def _draw_tokens(axes: Axes, usage: TokenUsage, shown: Sequence[str], places: Sequence[tuple[int, int]]) -> None:
    lines, columns = zip(*places, strict=True)
    left_out = len(shown) - len(places)
    axes.set(xlim=(0, COLUMNS), ylim=(lines[-1] + (1.5 if left_out else 0.5), -0.5))
    axes.set_axis_off()
    lengths = [len(text) for text in shown[: len(places)]]
    axes.barh(
        lines,
        lengths,
        left=columns,
        height=0.86,
        color=colors(usage.shares_T)[: len(places)],
        edgecolor="white",
        linewidth=0.8,
    )
    size = 72 * _TEXT_INCHES / COLUMNS / _ADVANCE_EM  # a character is as wide as a column
    style: dict[str, Any] = {"family": _FONT, "size": size, "va": "baseline", "color": INK, "parse_math": False}
    for (line, column), text in zip(places, shown, strict=False):
        axes.text(column, line + 0.2, text, **style)
    if left_out:
        axes.text(0, lines[-1] + 1.2, f"\u2026 and {left_out:,} tokens more", **style)


def _draw_scale(axes: Axes, usage: TokenUsage) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    low, high = color_scale(usage.shares_T)
    scale = ScalarMappable(Normalize(100 * low, 100 * high), LinearSegmentedColormap.from_list("usage", COLORS))
    bar = axes.figure.colorbar(scale, cax=axes, orientation="horizontal")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("token's share of the MLP neurons, %", size=8)


def _draw_widths(axes: Axes, bar_axes: Axes, usage: TokenUsage) -> None:
    from matplotlib.colors import PowerNorm

    widths = usage.space.neurons
    rows = np.arange(len(widths))
    parts_KL = 100 * usage.histogram_LK.T / len(usage.tokens)
    roots = PowerNorm(0.5, 0, parts_KL.max())  # few tokens stay visible beside a layer with all tokens at one width
    image = axes.imshow(parts_KL, origin="lower", aspect="auto", cmap="Blues", norm=roots, interpolation="none")
    axes.plot(np.interp(usage.mean_neurons_L, widths, rows), ".-", color="#c2622d", linewidth=1, label="mean")
    step = -(-len(widths) // 9)
    ticks = rows[::-1][::step]
    axes.set_yticks(ticks, [str(widths[row]) for row in ticks])
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set(title="widths that tokens ran in each layer", xlabel="layer", ylabel="MLP neurons")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.1)
    axes.figure.colorbar(image, cax=bar_axes, label="% of the tokens")
