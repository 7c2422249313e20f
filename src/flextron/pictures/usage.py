"""How per-token routing spent MLP neurons on a text: the figures for each token, and a report as text. No torch here.

`usage_page` writes them as a web page, `usage_figure` draws them.

Shapes: L layers, T tokens of one text, K widths of the search space.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flextron.subnet import SearchSpace

Floats = NDArray[np.float64]

CLASSES = ("start of a word", "inside a word", "number", "punctuation", "space or newline", "other")
ONE_WIDTH = 0.99
"""A layer has collapsed if at least this share of the tokens run one width in it."""
NO_ENTROPY_BITS = 0.05
"""A layer with less entropy does not tell tokens apart."""
COLORS = ("#fffde6", "#ffe0be", "#fec397", "#f8a771", "#f08a4b")
"""From few neurons to many: equal steps in CIELAB, darker throughout, and light enough for dark text."""
INK = "#111111"

_BAR = 32
_BINS = 32


@dataclass(frozen=True, eq=False)
class TokenUsage:
    """The number of MLP neurons that each token of a text ran in each layer."""

    tokens: tuple[str, ...]
    """Text of each token, decoded alone. It may contain newlines, be empty, or be a replacement character."""
    neurons_LT: NDArray[np.integer[Any]]
    """Neurons that each token ran in each layer, [L, T]. Each number is a width of the search space."""
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
        """Share of the full model's neurons that each token ran, mean over layers, 0 to 1, [T]."""
        return np.asarray(self.neurons_LT.mean(0) / self.full, dtype=np.float64)

    @property
    def mean_neurons_L(self) -> Floats:
        """Mean number of neurons that tokens ran in each layer, [L]."""
        return np.asarray(self.neurons_LT.mean(1), dtype=np.float64)

    @property
    def histogram_LK(self) -> NDArray[np.int64]:
        """Number of tokens that ran each width in each layer, [L, K]."""
        return np.stack([(self.neurons_LT == width).sum(1) for width in self.space.neurons], axis=1)

    @property
    def entropy_L(self) -> Floats:
        """Entropy of each layer's distribution of tokens over widths, in bits, [L]. 0 if all tokens ran one width."""
        parts_LK = self.histogram_LK / len(self.tokens)
        logs_LK = np.log2(parts_LK, where=parts_LK > 0, out=np.zeros_like(parts_LK))
        return np.asarray(np.abs((parts_LK * logs_LK).sum(1)), dtype=np.float64)

    @property
    def collapsed(self) -> tuple[int, ...]:
        """Layers in which (nearly) all tokens ran one width that is neither 0 nor full.

        Empty for a single token, which cannot differ from others.
        """
        if len(self.tokens) == 1:
            return ()
        mean_L = self.mean_neurons_L
        alike_L = self.histogram_LK.max(1) >= ONE_WIDTH * len(self.tokens)
        return tuple(int(layer) for layer in np.flatnonzero(alike_L & (mean_L > 0) & (mean_L < self.full)))

    @property
    def is_collapsed(self) -> bool:
        """Whether no layer tells tokens apart. True if all tokens run the full model, False for a single token."""
        return len(self.tokens) > 1 and bool((self.entropy_L < NO_ENTROPY_BITS).all())

    def by_class(self) -> dict[str, tuple[int, float]]:
        """For each of CLASSES in the text, the number of tokens and their mean share of the neurons."""
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
    """Whether a letter after this text continues a word. don't and l'eau are one word each."""
    text = text[:-1] if text.endswith(("'", "\u2019")) else text
    return bool(text) and unicodedata.category(text[-1])[0] in "LMN"


def usage_text(usage: TokenUsage) -> str:
    """Report the neurons used by layer and by class of tokens, in ASCII, at most 100 columns wide.

    A layer's line ends with a histogram of its tokens by width, from the narrowest: # marks the most frequent width, a
    digit gives tenths of that number, a dot means no token.
    """
    means = f"mean MLP neurons of {usage.full}"
    by_width = f"tokens by width, {usage.space.neurons[0]} to {usage.full}"
    lines = [
        *textwrap.wrap(summary(usage), 100),
        "",
        f"layer  {means:<39}  entropy, bits  {by_width}",
        *_layer_lines(usage),
        "",
        f"{'token class':<16}  tokens  share of the MLP neurons",
    ]
    for name, (count, share) in usage.by_class().items():
        lines.append(f"{name:<16}  {count:>6}  {_bar(share)}  {share:>6.1%}")
    if warning := verdict(usage):
        lines += ["", *textwrap.wrap(warning, 100)]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def summary(usage: TokenUsage) -> str:
    """One sentence with the budget, the average cost and the average share of neurons."""
    tokens = "1 token" if len(usage.tokens) == 1 else f"{len(usage.tokens):,} tokens"
    return (
        f"budget {usage.budget}: a token costs {usage.cost:.1%} of the full model's on average, "
        f"and runs {usage.shares_T.mean():.1%} of its MLP neurons ({tokens})"
    )


def verdict(usage: TokenUsage) -> str:
    """A warning about layers that do not tell tokens apart. Empty if all do."""
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


def color_scale(shares_T: Floats) -> tuple[float, float]:
    """The shares for the first and the last colour: the range of this text in steps of 5%, at least 20% wide."""
    low, high = np.floor(20 * shares_T.min()) / 20, np.ceil(20 * shares_T.max()) / 20
    apart = max(high - low, 0.2)
    low = min(max((low + high - apart) / 2, 0.0), 1 - apart)
    return low, low + apart


def colors(shares_T: Floats) -> list[str]:
    """The colour of each share, as #rrggbb."""
    low, high = color_scale(shares_T)
    stops = np.linspace(low, high, len(COLORS))
    channels = [[int(color[at : at + 2], 16) for color in COLORS] for at in (1, 3, 5)]
    rgb_T3 = np.stack([np.interp(shares_T, stops, channel) for channel in channels], axis=1).round().astype(int)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in rgb_T3]
