"""An additive table fitted to times of whole sub-networks: which ones to time, the fit, and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from flextron.costs.table import CostTable
from flextron.errors import CostError
from flextron.subnet import AXES, SearchSpace, Subnet

_SMOOTHNESS = 0.3


def designed(space: SearchSpace, count: int, draw: np.random.Generator) -> list[Subnet]:
    """Sub-networks of all sizes, the smallest first and the full model last; layers differ, to tell widths apart."""
    return [_around(space, level, draw) for level in np.linspace(0, 1, count)]


def random_subnets(space: SearchSpace, count: int, draw: np.random.Generator) -> list[Subnet]:
    """Sub-networks of random size, layers differing."""
    return [_around(space, level, draw) for level in draw.uniform(0.15, 0.95, count)]


def _around(space: SearchSpace, level: float, draw: np.random.Generator) -> Subnet:
    """Every layer's place among the choices is drawn around `level` of the full width."""

    def widths(choices: tuple[int, ...], center: float) -> tuple[int, ...]:
        places = np.clip(center + draw.normal(0, 0.25, space.layers) * (4 * center * (1 - center)), 0, 1)
        return tuple(choices[round(float(place) * (len(choices) - 1))] for place in places)

    shift = draw.normal(0, 0.2) * (4 * level * (1 - level))
    return Subnet(
        widths(space.neurons, float(np.clip(level + shift, 0, 1))),
        widths(space.kv_groups, float(np.clip(level - shift, 0, 1))),
    )


def fit(space: SearchSpace, subnets: Sequence[Subnet], milliseconds: Sequence[float], *, metric: str) -> CostTable:
    """The additive table, equal for all layers, that comes nearest to measured times in relative terms.

    Unknown are a fixed part and what every step from one width to the next adds, none of them negative (non-negative
    least squares); steps of neighbouring widths are drawn together a little, the first from 0 apart.

    Raises:
        CostError: fewer measurements than it takes, or such as do not tell neurons from KV groups.
    """
    _check_enough(space, subnets)
    measured = np.array(milliseconds, dtype=float)
    scale = float(measured.max())
    rows = np.array([_row(space, subnet) for subnet in subnets]) * (scale / measured)[:, None]
    unit = _row(space, space.full)
    rows = np.vstack([rows / unit, _smoothness(space)])
    solution, _ = nnls(rows, np.concatenate([np.ones(len(subnets)), np.zeros(len(rows) - len(subnets))]))
    steps = solution / unit * scale
    neurons, kv_groups = np.split(steps[1:], [len(space.neurons) - (space.neurons[0] == 0)])
    return CostTable(
        space,
        metric,
        "ms",
        float(steps[0]),
        (_curve(space.neurons, neurons),) * space.layers,
        (_curve(space.kv_groups, kv_groups),) * space.layers,
    )


def _check_enough(space: SearchSpace, subnets: Sequence[Subnet]) -> None:
    if len(subnets) < 4:
        raise CostError(f"a table needs at least 4 measured sub-networks, of different widths; got {len(subnets)}.")
    free = [axis for axis in AXES if len(space[axis]) > 1]
    sizes = np.array([[1, *(sum(subnet[axis]) for axis in free)] for subnet in subnets])
    if np.linalg.matrix_rank(sizes) <= len(free):
        raise CostError(
            f"{len(subnets)} measured sub-networks do not tell what {' and '.join(free)} cost, because these do not "
            "vary apart from each other. Measure also some that are wide on one axis and narrow on the other."
        )


def _row(space: SearchSpace, subnet: Subnet) -> np.ndarray[Any, Any]:
    """1, and for every step from a width to the next how many layers have taken it."""
    counts = [1.0]
    for axis in AXES:
        widths = np.array(subnet[axis])
        counts += [float((widths >= choice).sum()) for choice in space[axis] if choice > 0]
    return np.array(counts)


def _curve(choices: tuple[int, ...], steps: np.ndarray[Any, Any]) -> tuple[float, ...]:
    sums = np.cumsum(steps)
    return tuple(map(float, [0.0, *sums] if choices[0] == 0 else sums))


def _smoothness(space: SearchSpace) -> np.ndarray[Any, Any]:
    """One row for each pair of neighbouring steps of an axis: their difference, per unit of width, should be small."""
    rows, at, size = [], 1, len(_row(space, space.full))
    for axis in AXES:
        widths = np.diff([0, *(choice for choice in space[axis] if choice > 0)])
        for step in range(1, len(widths) - 1):
            row = np.zeros(size)
            row[at + step], row[at + step + 1] = 1, -widths[step] / widths[step + 1]
            rows.append(row * _SMOOTHNESS * len(widths))
        at += len(widths)
    return np.array(rows).reshape(-1, size)


def price_errors(table: CostTable, subnets: Sequence[Subnet], milliseconds: Sequence[float]) -> list[float]:
    """Relative errors of a table's prices, from 0 up."""
    return [abs(table.price(subnet) / ms - 1) for subnet, ms in zip(subnets, milliseconds, strict=True)]
