"""Drawings of sub-networks: what they show, that they fit a terminal, and that text needs no torch or matplotlib."""

import os
import subprocess
import sys

import numpy as np
import pytest

from flextron.errors import SubnetError
from flextron.pictures.widths import save_figure, text_drawing, widths_figure
from flextron.subnet import SearchSpace, Subnet

SPACE = SearchSpace(4, (0, 10, 400, 790, 800), (0, 1, 2, 3))
UNEVEN = Subnet((0, 10, 790, 800), (3, 2, 0, 1))


def test_a_line_for_each_layer():
    assert text_drawing(UNEVEN, SPACE).splitlines() == [
        "layer  MLP neurons                                   KV groups",
        "    0  ........................................   0  ### 3",
        "    1  #.......................................  10  ##. 2",
        "    2  #######################################. 790  ... 0",
        "    3  ######################################## 800  #.. 1",
    ]


@pytest.mark.parametrize("layers", [1, 64])
def test_lines_fit_100_columns(layers):
    space = SearchSpace(layers, (0, 512, 131072), (0, 1, 64, 128))
    for subnet in (space.full, space.uniform(512, 64), space.smallest):
        lines = text_drawing(subnet, space).splitlines()
        assert len(lines) == layers + 1
        assert all(len(line) <= 100 and line.isascii() for line in lines)


def test_many_layers_have_a_character_each():
    space = SearchSpace(100, (0, 1, 55, 99, 100), (0, 1, 2))
    subnet = Subnet((0, 1, 55, 99, 100) * 20, (2,) * 90 + (1, 0) * 5)
    first, neurons, groups, second, neurons_2, groups_2 = text_drawing(subnet, space).splitlines()
    assert first.startswith("layers 0 to 79:")
    assert second.startswith("layers 80 to 99:")
    assert (neurons.split()[-1], neurons_2.split()[-1]) == (".159#" * 16, ".159#" * 4)
    assert (groups.split()[-1], groups_2.split()[-1]) == ("#" * 80, "#" * 10 + "5." * 5)
    assert len(neurons) <= 100


def test_another_models_sub_network_is_refused():
    other = Subnet((0,), (0,))
    with pytest.raises(SubnetError, match="1 layers"):
        text_drawing(other, SPACE)
    with pytest.raises(SubnetError, match="1 layers"):
        widths_figure({"0.5x": other}, SPACE, "")
    with pytest.raises(ValueError, match="at least one"):
        widths_figure({}, SPACE, "")


def test_figure_shows_the_shares_of_every_budget(tmp_path):
    figure = widths_figure({"1x": SPACE.full, "0.6x": UNEVEN}, SPACE, "tiny")
    neurons, groups = (axes for axes in figure.axes if axes.images)
    assert np.allclose(neurons.images[0].get_array(), [[100] * 4, [0, 1.25, 98.75, 100]])
    assert np.allclose(groups.images[0].get_array(), [[100] * 4, [100, 200 / 3, 0, 100 / 3]])
    assert neurons.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in groups.get_yticklabels()] == ["1x", "0.6x"]
    assert (neurons.get_title(), groups.get_title()) == ("MLP neurons kept, % of 800", "KV groups kept, % of 3")
    assert figure.get_suptitle() == "tiny"
    for name, start in (("widths.png", b"\x89PNG"), ("widths.pdf", b"%PDF")):
        save_figure(figure, tmp_path / "pictures" / name)
        assert (tmp_path / "pictures" / name).read_bytes().startswith(start)


def test_text_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; sys.argv = ['flextron']\n"
        "from flextron.pictures.widths import text_drawing; from flextron.subnet import SearchSpace\n"
        "space = SearchSpace(2, (0, 4), (0, 1)); print(text_drawing(space.full, space))\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.splitlines()[-1] == "[]"
