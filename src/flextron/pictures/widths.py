"""Draw the widths of one sub-network as text, or of several as heat maps. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flextron.atomic import new_file
from flextron.subnet import AXES, SearchSpace, Subnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"neurons": "MLP neurons", "kv_groups": "KV groups"}
LAYERS_WITH_A_LINE = 64
"""Models with more layers get one character per layer."""
COLUMNS = 80
"""Layers in a line, if each gets one character."""
_BARS = {"neurons": 40, "kv_groups": 24}
_TENTHS = ".123456789#"


def text_drawing(subnet: Subnet, space: SearchSpace) -> str:
    """Draw the widths of every layer as bars of ASCII characters, at most 100 columns wide.

    Each layer gets a line, with # for kept and . for removed units. With more than 64 layers, each gets one character:
    # is full, . is skipped, and a digit gives the kept tenths, rounded down but at least 1.

    Raises:
        SubnetError: the sub-network is not in the search space.
    """
    space.check(subnet)
    lines = _lines if subnet.layers <= LAYERS_WITH_A_LINE else _rows
    return "\n".join(line.rstrip() for line in lines(subnet, space))


def _lines(subnet: Subnet, space: SearchSpace) -> list[str]:
    sizes = {axis: min(_BARS[axis], space[axis][-1]) for axis in AXES}
    digits = {axis: len(str(space[axis][-1])) for axis in AXES}
    columns = {axis: max(sizes[axis] + 1 + digits[axis], len(NAMES[axis])) for axis in AXES}
    header = "  ".join(["layer", *(NAMES[axis].ljust(columns[axis]) for axis in AXES)])
    lines = []
    for layer in range(subnet.layers):
        cells = []
        for axis in AXES:
            width, full = subnet[axis][layer], space[axis][-1]
            cells.append(f"{_bar(width, full, sizes[axis])} {width:>{digits[axis]}}".ljust(columns[axis]))
        lines.append("  ".join([f"{layer:>5}", *cells]))
    return [header, *lines]


def _bar(width: int, full: int, size: int) -> str:
    """A bar of `size` characters. All are # only at the full width, and none only at 0."""
    kept = size if width == full else min(max(round(width / full * size), width > 0), size - 1)
    return "#" * kept + "." * (size - kept)


def _rows(subnet: Subnet, space: SearchSpace) -> list[str]:
    label = max(map(len, NAMES.values()))
    lines = []
    for start in range(0, subnet.layers, COLUMNS):
        end = min(start + COLUMNS, subnet.layers)
        lines.append(f"layers {start} to {end - 1}: # full, 1 to 9 tenths, . skipped")
        for axis in AXES:
            full = space[axis][-1]
            lines.append(f"{NAMES[axis]:<{label}}  " + "".join(_tenths(w, full) for w in subnet[axis][start:end]))
    return lines


def _tenths(width: int, full: int) -> str:
    return _TENTHS[max(10 * width // full, width > 0)]


def widths_figure(subnets: Mapping[str, Subnet], space: SearchSpace, title: str) -> Figure:
    """Draw heat maps of the kept MLP neurons and KV groups: one column per layer, one row per sub-network, by name.

    Raises:
        SubnetError: a sub-network is not in the search space.
        ValueError: `subnets` is empty.
    """
    from matplotlib.figure import Figure

    if not subnets:
        raise ValueError("a picture of widths needs at least one sub-network.")
    for subnet in subnets.values():
        space.check(subnet)
    figure = Figure(figsize=(11, 2.6 + 0.4 * len(subnets)), layout="constrained")
    for axes, axis in zip(figure.subplots(2, 1), AXES, strict=True):
        full = space[axis][-1]
        shares = [[100 * width / full for width in subnet[axis]] for subnet in subnets.values()]
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        axes.set_yticks(range(len(subnets)), list(subnets))
        axes.set(title=f"{NAMES[axis]} kept, % of {full}", xlabel="layer", ylabel="budget")
        figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize=10)
    return figure


def save_figure(figure: Figure, file: str | Path) -> None:
    """Save a figure in the format of the file's ending, and make its folder if needed."""
    with new_file(file, overwrite=True) as partial:
        figure.savefig(partial, dpi=130, format=Path(file).suffix.removeprefix(".") or None)
