"""How per-token routing spent MLP neurons on a text: figures for each token, as text, page and picture. No torch here.

Shapes: L layers, T tokens of one text, K widths that the search space offers.
"""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flextron.subnet import SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

CLASSES = ("start of a word", "inside a word", "number", "punctuation", "space or newline", "other")
ONE_WIDTH = 0.99
"""Part of the tokens at one width from which a layer counts as collapsed."""
NO_ENTROPY_BITS = 0.05
"""A layer of less entropy does not tell tokens apart."""
COLORS = ("#fffde6", "#ffe0be", "#fec397", "#f8a771", "#f08a4b")
"""From few neurons to many: equal steps in CIELAB, darker throughout, and light enough for dark text."""
INK = "#111111"
COLUMNS = 90
"""Characters in a line of the picture's text."""
LINES = 40
"""Lines of the picture's text."""

_BAR = 32
_BINS = 32
_FONT = "DejaVu Sans Mono"
_ADVANCE_EM = 1233 / 2048  # of that font's characters
_TEXT_INCHES = 9.4
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in b"\t\n"} | {0x7F: 0x2421}


@dataclass(frozen=True, eq=False)
class TokenUsage:
    """MLP neurons that each token of one text ran in each layer."""

    tokens: tuple[str, ...]
    """Text of each token as it decodes alone; may hold newlines, be empty, or be a replacement character."""
    neurons_LT: NDArray[np.integer[Any]]
    """Neurons that each token ran in each layer, [L, T]; each a width of the search space."""
    space: SearchSpace
    budget: str
    """The budget as the user wrote it, such as ttft=0.6x."""
    cost: float
    """Average cost of a token, as a share of the full model's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        neurons_LT = np.asarray(self.neurons_LT)
        object.__setattr__(self, "neurons_LT", neurons_LT)
        if not self.tokens:
            raise ValueError("there are no tokens to show the use of; give a text of at least one token.")
        expected = (self.space.layers, len(self.tokens))
        if neurons_LT.shape != expected or not np.issubdtype(neurons_LT.dtype, np.integer):
            raise ValueError(
                f"neurons_LT has shape {list(neurons_LT.shape)} of {neurons_LT.dtype}; {expected[0]} layers and "
                f"{expected[1]} tokens need whole numbers of shape {list(expected)}."
            )
        foreign = np.setdiff1d(neurons_LT, self.space.neurons)
        if len(foreign):
            raise ValueError(f"a token ran {foreign[0]} neurons; the search space has {list(self.space.neurons)}.")
        if not 0 <= self.cost < np.inf:
            raise ValueError(f"cost is {self.cost}; it is a share of the full model's, from 0 up.")

    @property
    def full(self) -> int:
        """Neurons of a layer of the full model."""
        return self.space.neurons[-1]

    @property
    def shares_T(self) -> Floats:
        """Part of the full model's neurons that each token ran, mean over layers, 0 to 1, [T]."""
        return np.asarray(self.neurons_LT.mean(0) / self.full, dtype=np.float64)

    @property
    def mean_neurons_L(self) -> Floats:
        """Neurons that an average token ran in each layer, [L]."""
        return np.asarray(self.neurons_LT.mean(1), dtype=np.float64)

    @property
    def histogram_LK(self) -> NDArray[np.int64]:
        """Tokens that ran each width of the search space in each layer, [L, K]."""
        return np.stack([(self.neurons_LT == width).sum(1) for width in self.space.neurons], axis=1)

    @property
    def entropy_L(self) -> Floats:
        """Entropy of each layer's distribution of tokens over widths, in bits, [L]; 0 where all ran one width."""
        parts_LK = self.histogram_LK / len(self.tokens)
        logs_LK = np.log2(parts_LK, where=parts_LK > 0, out=np.zeros_like(parts_LK))
        return np.asarray(np.abs((parts_LK * logs_LK).sum(1)), dtype=np.float64)

    @property
    def collapsed(self) -> tuple[int, ...]:
        """Layers in which (nearly) all tokens ran one width, though their mean is neither 0 nor the full width.

        None for a single token, which has nothing to differ from.
        """
        if len(self.tokens) == 1:
            return ()
        mean_L = self.mean_neurons_L
        alike_L = self.histogram_LK.max(1) >= ONE_WIDTH * len(self.tokens)
        return tuple(int(layer) for layer in np.flatnonzero(alike_L & (mean_L > 0) & (mean_L < self.full)))

    @property
    def is_collapsed(self) -> bool:
        """Whether no layer tells tokens apart; also true where all tokens run the full model, false for one token."""
        return len(self.tokens) > 1 and bool((self.entropy_L < NO_ENTROPY_BITS).all())

    def by_class(self) -> dict[str, tuple[int, float]]:
        """Number of tokens and mean share of the neurons for each of CLASSES that the text has."""
        classes_T = np.array(list(_classes(self.tokens)))
        shares_T = self.shares_T
        found = {}
        for name in CLASSES:
            of_class_T = classes_T == name
            if of_class_T.any():
                found[name] = (int(of_class_T.sum()), float(shares_T[of_class_T].mean()))
        return found


def _classes(tokens: Sequence[str]) -> Iterator[str]:
    before = ""
    for token in tokens:
        yield _class(token, before)
        before = (before + token)[-2:]


def _class(token: str, before: str) -> str:
    """The class of a token, by its own text and the two characters before it."""
    kinds = [unicodedata.category(char) for char in token]
    if token.isspace():
        return "space or newline"
    if re.fullmatch(r"<\S*\w\S*>", token.strip()):  # <|endoftext|>, </s>, <0x0A>
        return "other"
    if any(kind[0] in "LM" for kind in kinds):
        at = next(index for index, kind in enumerate(kinds) if kind[0] in "LMN")
        return "inside a word" if _ends_in_word(before + token[:at]) else "start of a word"
    if any(kind[0] == "N" for kind in kinds):
        return "number"
    if any(kind[0] == "P" or kind in ("Sm", "Sc", "Sk") for kind in kinds):
        return "punctuation"
    return "other"


def _ends_in_word(text: str) -> bool:
    """Whether a letter after this text goes on with a word; don't and l'eau are one each."""
    text = text[:-1] if text.endswith(("'", "\u2019")) else text
    return bool(text) and unicodedata.category(text[-1])[0] in "LMN"


def usage_text(usage: TokenUsage) -> str:
    """The use of neurons by layers and by classes of tokens, in ASCII, at most 100 columns wide.

    A layer's line ends with its tokens by width, from the narrowest: # stands where most are, a digit for the tenths
    of that number, a dot for none.
    """
    means = f"mean MLP neurons of {usage.full}"
    by_width = f"tokens by width, {usage.space.neurons[0]} to {usage.full}"
    lines = [
        *textwrap.wrap(_summary(usage), 100),
        "",
        f"layer  {means:<39}  entropy, bits  {by_width}",
        *_layer_lines(usage),
        "",
        f"{'token class':<16}  tokens  share of the MLP neurons",
    ]
    for name, (count, share) in usage.by_class().items():
        lines.append(f"{name:<16}  {count:>6}  {_bar(share)}  {share:>6.1%}")
    verdict = _verdict(usage)
    if verdict:
        lines += ["", *textwrap.wrap(verdict, 100)]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def _summary(usage: TokenUsage) -> str:
    tokens = "1 token" if len(usage.tokens) == 1 else f"{len(usage.tokens):,} tokens"
    return (
        f"budget {usage.budget}: a token costs {usage.cost:.1%} of the full model's on average, "
        f"and runs {usage.shares_T.mean():.1%} of its MLP neurons ({tokens})"
    )


def _verdict(usage: TokenUsage) -> str:
    """What to know about layers that do not tell tokens apart; empty if all do."""
    if usage.is_collapsed and usage.shares_T.min() == 1:
        return "All tokens run the full width in every layer: there was nothing to route."
    if usage.is_collapsed:
        return (
            "The router has collapsed: no layer tells tokens apart, and (nearly) all tokens run the same widths. "
            "Routing by token brings nothing here over one sub-network for all."
        )
    if usage.collapsed:
        layers = ", ".join(map(str, usage.collapsed))
        return f"Layers that do not tell tokens apart ({ONE_WIDTH:.0%} or more of the tokens run one width): {layers}."
    return ""


def _layer_lines(usage: TokenUsage) -> Iterator[str]:
    bins = np.array_split(usage.histogram_LK, min(_BINS, len(usage.space.neurons)), axis=1)
    counts_LB = np.stack([counts_LW.sum(1) for counts_LW in bins], axis=1)
    for layer, (mean, entropy) in enumerate(zip(usage.mean_neurons_L, usage.entropy_L, strict=True)):
        tokens = "".join(_tenth(count / counts_LB[layer].max()) for count in counts_LB[layer])
        yield f"{layer:>5}  {_bar(mean / usage.full)} {mean:>6.0f}  {entropy:>13.2f}  {tokens}"


def _bar(share: float) -> str:
    kept = round(share * _BAR)
    return "#" * kept + "." * (_BAR - kept)


def _tenth(part: float) -> str:
    if part in (0, 1):
        return ".#"[int(part)]
    return str(min(max(round(10 * part), 1), 9))


def _scale(shares_T: Floats) -> tuple[float, float]:
    """The shares that the first and the last colour stand for: of this text, in steps of 5%, and 20% apart or more."""
    low, high = np.floor(20 * shares_T.min()) / 20, np.ceil(20 * shares_T.max()) / 20
    apart = max(high - low, 0.2)
    low = min(max((low + high - apart) / 2, 0.0), 1 - apart)
    return low, low + apart


def _colors(shares_T: Floats) -> list[str]:
    """A colour for each share, as #rrggbb."""
    low, high = _scale(shares_T)
    stops = np.linspace(low, high, len(COLORS))
    channels = [[int(color[at : at + 2], 16) for color in COLORS] for at in (1, 3, 5)]
    rgb_T3 = np.stack([np.interp(shares_T, stops, channel) for channel in channels], axis=1).round().astype(int)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in rgb_T3]


_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: {INK}; background: #ffffff; }}
h1 {{ font-size: 1.4rem; }}
.scale {{ display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }}
.scale b {{ flex: 0 1 14rem; min-width: 6rem; height: 1.1rem; border: 1px solid #bbbbbb;
  background: linear-gradient(to right, {", ".join(COLORS)}); }}
.text {{ font: 1rem/2 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4; }}
.text span {{ padding: .2em 0; border-radius: .2em; box-shadow: inset -1px 0 #ffffff; }}
.text span:empty::before {{ content: "\\2205"; color: #555555; }}
.text i::before {{ content: "\\21b5"; font-style: normal; color: #555555; }}
.note {{ border-left: .3rem solid #c2622d; padding-left: .7rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #dddddd; text-align: right; }}
th:first-child, td:first-child {{ padding-left: 0; text-align: left; font-weight: normal; }}
"""


def usage_html(usage: TokenUsage) -> str:
    """One HTML page that needs no other file: the text with each token coloured by its share, a legend, the classes.

    A token's title (what the pointer shows) gives its share and the neurons of every layer. Control characters other
    than tab and newline become their symbols, so that the page is valid.
    """
    low, high = _scale(usage.shares_T)
    verdict = _verdict(usage)
    note = f'<p class="note">{html.escape(verdict)}</p>\n' if verdict else ""
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{count}</td><td>{share:.1%}</td></tr>\n'
        for name, (count, share) in usage.by_class().items()
    )
    summary = html.escape(_summary(usage).translate(_CONTROLS))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MLP neurons of each token</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>MLP neurons of each token</h1>
<p>{summary}.</p>
{note}<p class="scale"><span>{low:.0%}</span><b></b><span>{high:.0%} of the MLP neurons, mean over layers</span></p>
<p class="text" lang="" dir="auto">{"".join(_spans(usage))}</p>
<h2>By class of token</h2>
<table>
<tr><th scope="col">class</th><th scope="col">tokens</th><th scope="col">share of the MLP neurons</th></tr>
{rows}</table>
</body>
</html>
"""


def _spans(usage: TokenUsage) -> Iterator[str]:
    shares_T = usage.shares_T
    for token, share, color, neurons_L in zip(
        usage.tokens, shares_T, _colors(shares_T), usage.neurons_LT.T.tolist(), strict=True
    ):
        text = html.escape(token.translate(_CONTROLS)).replace("\n", "<i></i>\n")
        title = f"{share:.1%} of the MLP neurons; layers 0 to {len(neurons_L) - 1}: {' '.join(map(str, neurons_L))}"
        yield f'<span style="background:{color}" title="{title}">{text}</span>'


def usage_figure(usage: TokenUsage) -> Figure:
    """The text with each token coloured by its share, above a heat map of the tokens' widths in each layer.

    Spaces, tabs and newlines are drawn as symbols, an empty token as an empty set, and what the font lacks as a box.
    A token of more than a line is cut, and after LINES lines a last one says how many tokens are left out.
    """
    from matplotlib.figure import Figure

    shown = _shown(usage.tokens)
    places = _places(shown, usage.tokens)
    lines = places[-1][0] + 1 + (len(places) < len(shown))
    title = [*textwrap.wrap(_summary(usage), 135), *textwrap.wrap(_verdict(usage), 135)]
    text_at, text_height, map_height = 0.4 + 0.16 * len(title), 0.255 * lines, 2.9
    map_at = text_at + text_height + 0.95
    width, height = 10.0, map_at + map_height + 0.6
    figure = Figure(figsize=(width, height))

    def add_axes(left: float, top: float, across: float, down: float) -> Axes:
        """Axes at a place in inches from the upper left corner."""
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
    """Line and column of each token, as far as LINES lines reach."""
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
    colors = _colors(usage.shares_T)[: len(places)]
    axes.barh(lines, lengths, left=columns, height=0.86, color=colors, edgecolor="white", linewidth=0.8)
    size = 72 * _TEXT_INCHES / COLUMNS / _ADVANCE_EM  # a character is as wide as a column
    style: dict[str, Any] = {"family": _FONT, "size": size, "va": "baseline", "color": INK, "parse_math": False}
    for (line, column), text in zip(places, shown, strict=False):
        axes.text(column, line + 0.2, text, **style)
    if left_out:
        axes.text(0, lines[-1] + 1.2, f"\u2026 and {left_out:,} tokens more", **style)


def _draw_scale(axes: Axes, usage: TokenUsage) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    low, high = _scale(usage.shares_T)
    colors = ScalarMappable(Normalize(100 * low, 100 * high), LinearSegmentedColormap.from_list("usage", COLORS))
    bar = axes.figure.colorbar(colors, cax=axes, orientation="horizontal")
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
