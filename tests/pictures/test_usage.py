"""The use of neurons by tokens: numbers by hand, classes, and what the text, the page and the picture show."""

import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from flextron.pictures.usage import COLORS, INK, TokenUsage, usage_text
from flextron.pictures.usage_figure import COLUMNS, LINES, usage_figure
from flextron.pictures.usage_page import usage_html
from flextron.pictures.widths import save_figure
from flextron.subnet import SearchSpace

WIDTHS = (0, 4, 8)
TOKENS = ("The", " cat", "s", "\n")
USAGE = TokenUsage(TOKENS, np.array([[0, 8, 4, 4], [8, 8, 8, 0]]), SearchSpace(2, WIDTHS, (0, 1)), "ttft=0.6x", 0.613)
AWKWARD = (
    "",
    "\ufffd",
    "<b>",
    "\"&'",
    " $x$",
    "\t",
    "\r",
    "\n\n",
    "東京",
    "🙂",
    "e\u0301",
    "\u0915\u093f",
    "  ",
    "x" * 200,
)


def usage_of(tokens, rows, widths=WIDTHS):
    return TokenUsage(tuple(tokens), np.array(rows), SearchSpace(len(rows), widths, (0, 1)), "ttft=0.6x", 0.5)


def test_numbers_by_hand():
    assert USAGE.shares_T.tolist() == [0.5, 1, 0.75, 0.25]
    assert USAGE.mean_neurons_L.tolist() == [4, 6]
    assert USAGE.histogram_LK.tolist() == [[1, 2, 1], [1, 0, 3]]
    assert USAGE.entropy_L == pytest.approx([1.5, 0.25 * 2 + 0.75 * math.log2(4 / 3)])
    assert USAGE.collapsed == ()
    assert not USAGE.is_collapsed
    assert USAGE.by_class() == {"start of a word": (2, 0.75), "inside a word": (1, 0.75), "space or newline": (1, 0.25)}


@pytest.mark.parametrize(
    ("tokens", "neurons", "cost", "message"),
    [
        ((), np.zeros((2, 0), int), 1.0, "at least one token"),
        (("a",), np.zeros((1, 2), int), 1.0, r"shape \[1, 2\] of int64; 2 layers and 1 tokens"),
        (("a",), np.zeros((2, 1)), 1.0, "float64; 2 layers and 1 tokens need whole numbers"),
        (("a",), np.array([[4], [5]]), 1.0, r"ran 5 neurons; the search space has \[0, 4, 8\]"),
        (("a",), np.array([[4], [8]]), math.nan, "cost is nan"),
        (("a",), np.array([[4], [8]]), -0.1, "cost is -0.1"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, neurons, cost, message):
    with pytest.raises(ValueError, match=message):
        TokenUsage(tokens, neurons, SearchSpace(2, WIDTHS, (0, 1)), "1x", cost)


def test_layers_of_one_width_are_collapsed_unless_skipped_or_full():
    rows = np.zeros((5, 200), int)
    rows[1], rows[2], rows[3], rows[4, ::2] = 8, 4, 4, 8
    rows[3, :2] = 0
    usage = usage_of(["a"] * 200, rows)
    assert usage.collapsed == (2, 3)
    assert not usage.is_collapsed
    assert usage_text(usage).splitlines()[-1].endswith("run one width): 2, 3.")
    rows[3, 2] = 0
    assert usage_of(["a"] * 200, rows).collapsed == (2,)


def test_a_collapsed_router_is_reported():
    same = usage_of("ab", [[4, 4], [0, 0]])
    assert same.is_collapsed
    assert same.entropy_L.tolist() == [0, 0]
    assert "The router has collapsed" in usage_text(same)
    assert "The router has collapsed" in usage_html(same)
    full = usage_of("ab", [[8, 8]])
    assert full.is_collapsed
    assert "collapsed" not in usage_text(full)
    assert "nothing to route" in usage_text(full)


def test_one_token_of_one_layer_is_not_a_collapse():
    usage = usage_of(["a"], [[4]])
    assert (usage.collapsed, usage.is_collapsed) == ((), False)
    assert usage.by_class() == {"start of a word": (1, 0.5)}
    assert "(1 token)" in usage_text(usage)
    assert len(usage_figure(usage).axes[0].texts) == 1


@pytest.mark.parametrize(
    ("before", "token", "name"),
    [
        ("", "The", "start of a word"),
        ("a", " cat", "start of a word"),
        ("\n", "cat", "start of a word"),
        ("(", "cat", "start of a word"),
        (" '", "cat", "start of a word"),
        ("cat", ".get", "start of a word"),
        ("a", " 3D", "start of a word"),
        ("cat", "s", "inside a word"),
        ("cat", "'s", "inside a word"),
        ("don'", "t", "inside a word"),
        ("3", "rd", "inside a word"),
        ("\u0915", "\u093f", "inside a word"),
        ("", " 1,200", "number"),
        ("", "½", "number"),
        ("cat", "...", "punctuation"),
        ("a", " +=", "punctuation"),
        ("", "$", "punctuation"),
        ("", " \n\t", "space or newline"),
        ("", "", "other"),
        ("", "\ufffd", "other"),
        ("", "🙂", "other"),
        ("", "<|endoftext|>", "other"),
        ("", "</s>", "other"),
    ],
)
def test_class_of_a_token(before, token, name):
    with_token, without = (usage_of(tokens, [[4] * len(tokens)]).by_class() for tokens in ((before, token), (before,)))
    grown = [key for key in with_token if with_token[key][0] > without.get(key, (0, 0))[0]]
    assert grown == [name]


def test_text_shows_layers_and_classes():
    assert usage_text(USAGE).splitlines() == [
        "budget ttft=0.6x: a token costs 61.3% of the full model's on average, and runs 62.5% of its MLP",
        "neurons (4 tokens)",
        "",
        "layer  mean MLP neurons of 8                    entropy, bits  tokens by width, 0 to 8",
        "    0  ################................      4           1.50  5#5",
        "    1  ########################........      6           0.81  3.#",
        "",
        "token class       tokens  share of the MLP neurons",
        "start of a word        2  ########################........   75.0%",
        "inside a word          1  ########################........   75.0%",
        "space or newline       1  ########........................   25.0%",
    ]


@pytest.mark.parametrize("layers", [1, 126])
def test_text_is_ascii_and_fits_100_columns(layers):
    widths = tuple(range(0, 131073, 1024))
    rows = np.random.default_rng(0).choice(widths, (layers, len(AWKWARD)))
    rows[: layers // 2] = 1024
    text = usage_text(usage_of(AWKWARD, rows, widths))
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100


class Page(HTMLParser):
    """Tokens' texts, titles and colours, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.titles, self.styles, self.lang = [], [], [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag != "script"
        if tag == "html":
            self.lang = attrs["lang"]
        if tag == "span" and "title" in attrs:
            self.texts.append("")
            self.titles.append(attrs["title"])
            self.styles.append(attrs["style"])
        if tag != "meta":
            self.open.append((tag, "title" in attrs))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("span", True) in self.open:
            self.texts[-1] += data


def test_page_holds_every_tokens_text():
    page = Page(usage_html(usage_of(AWKWARD, [[4] * len(AWKWARD)])))
    assert page.lang == "en"
    assert page.texts == [token.replace("\r", "\u240d") for token in AWKWARD]


def test_page_colours_tokens_and_names_their_neurons():
    text = usage_html(USAGE)
    page = Page(text)
    assert page.titles[0] == "50.0% of the MLP neurons; layers 0 to 1: 0 8"
    assert len(set(page.styles)) == 4
    assert page.styles[1] == f"background:{COLORS[-1]}"
    assert page.styles[3] == f"background:{COLORS[0]}"
    assert "<span>25%</span>" in text
    assert "<td>2</td><td>75.0%</td>" in text
    assert "budget ttft=0.6x: a token costs 61.3%" in text
    assert "<i></i>\n</span>" in text


def test_colours_darken_evenly_and_keep_text_readable():
    def luminance(color):
        parts = [part / 255 for part in bytes.fromhex(color[1:])]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    steps = np.diff([116 * luminance(color) ** (1 / 3) - 16 for color in COLORS])
    assert steps == pytest.approx([steps.mean()] * 4, abs=0.5)
    assert all((luminance(color) + 0.05) / (luminance(INK) + 0.05) >= 7 for color in COLORS)


def test_figure_draws_every_token(tmp_path):
    figure = usage_figure(usage_of(AWKWARD, [[4] * len(AWKWARD), [0, 8] * (len(AWKWARD) // 2)]))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert len(shown) == len(AWKWARD)
    assert shown[:5] == ["∅", "\ufffd", "<b>", "\"&'", "·$x$"]
    assert shown[5:13] == ["→", "·", "↵↵", "□□", "□", "é", "□□", "··"]
    assert shown[13] == "x" * (COLUMNS - 1) + "…"
    save_figure(figure, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_of_the_figure_do_not_overlap():
    tokens = ["Wiff", " lffi", "<=>", "!=", "naïve", " 10"] * 8
    figure = usage_figure(usage_of(tokens, [[4] * len(tokens)]))
    figure.canvas.draw()
    texts = figure.axes[0].texts
    boxes = [bar.get_window_extent() for bar in figure.axes[0].patches]
    for text, box in zip(texts, boxes, strict=True):
        extent = text.get_window_extent()
        assert box.x0 - 1 <= extent.x0
        assert extent.x1 <= box.x1 + 1
    places = [(round(box.y0), box.x0, box.x1) for box in boxes]
    for (line, _, end), (next_line, start, _) in pairwise(places):
        assert next_line != line or start >= end - 0.01


def test_a_long_text_ends_with_the_number_of_tokens_left_out():
    tokens = ["a\n"] * (LINES + 7)
    figure = usage_figure(usage_of(tokens, [[4] * len(tokens)]))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["a↵"] * LINES + ["… and 7 tokens more"]


def test_figure_maps_widths_by_layer():
    axes = usage_figure(USAGE).axes[2]
    (image,) = axes.images
    assert image.get_array().tolist() == [[25, 25], [50, 0], [25, 75]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8", "4", "0"]
    assert axes.lines[0].get_ydata().tolist() == [1, 1.5]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "MLP neurons")


def test_text_and_page_need_neither_torch_nor_matplotlib():
    code = (
        "import sys, numpy as np; sys.argv = ['flextron']\n"
        "from flextron.subnet import SearchSpace; from flextron.pictures.usage import *\n"
        "from flextron.pictures.usage_page import usage_html\n"
        "usage = TokenUsage(('a',), np.array([[4]]), SearchSpace(1, (0, 4), (0, 1)), '1x', 1.0)\n"
        "usage_text(usage), usage_html(usage)\n"
        "print([name for name in ('torch', 'matplotlib') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.splitlines()[-1] == "[]"
