"""Sub-networks and costs as arrays: one row for each sub-layer, one column for each choice of width.

Shapes: N sub-networks, S sub-layers (every layer on the first of AXES, then every layer on the next), K the largest
number of choices of any sub-layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flextron.costs.table import CostTable
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import AXES, SearchSpace, Subnet

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def choice_counts(space: SearchSpace) -> Indices:
    """Return the number of choices of each sub-layer, [S]."""
    return np.repeat([len(space[axis]) for axis in AXES], space.layers)


def allowed(space: SearchSpace) -> Mask:
    """Return which columns are choices, [S, K]."""
    counts = choice_counts(space)
    return np.arange(counts.max())[None, :] < counts[:, None]


def to_indices(space: SearchSpace, subnets: Sequence[Subnet]) -> Indices:
    """Return the index of each sub-layer's choice, [N, S].

    Raises:
        SubnetError: a sub-network is not in the search space.
    """
    index_of = {axis: {width: index for index, width in enumerate(space[axis])} for axis in AXES}
    for subnet in subnets:
        space.check(subnet)
    return np.array(
        [[index_of[axis][width] for axis in AXES for width in subnet[axis]] for subnet in subnets],
        dtype=np.int64,
    ).reshape(len(subnets), len(AXES) * space.layers)


def to_subnet(space: SearchSpace, indices_S: Indices) -> Subnet:
    """Return the sub-network that makes these choices."""
    indices = dict(zip(AXES, np.split(indices_S, len(AXES)), strict=True))
    return Subnet(**{axis: tuple(space[axis][index] for index in indices[axis]) for axis in AXES})


def usable(space: SearchSpace, neuron_step: int | None = None) -> Mask:
    """Return which choices may be taken, [S, K].

    With `neuron_step`, an MLP may only take the full width or a multiple of the step.

    Raises:
        ValueError: the narrowest width is no multiple of the step, or no width between 0 and the full one is.
    """
    usable_SK = allowed(space)
    if neuron_step is None:
        return usable_SK
    widths = np.array(space.neurons)
    multiples = widths % neuron_step == 0 if neuron_step > 0 else np.zeros(len(widths), bool)
    if not multiples[0] or not multiples[widths > 0][:-1].any():
        raise ValueError(
            f"neuron_step is {neuron_step}; the narrowest width, and one between 0 and the full width, must be "
            f"multiples of it. The widths are {', '.join(map(str, space.neurons))}. Use a divisor of these, or rank "
            "again with --neuron-step."
        )
    usable_SK[: space.layers, : len(widths)] = multiples | (widths == widths[-1])
    return usable_SK


def as_matrix(space: SearchSpace, rows: dict[str, Any]) -> Floats:
    """Return `rows`, numbers for each layer and choice by axis, as one matrix [S, K]; unused columns hold 0."""
    matrix = np.zeros(allowed(space).shape)
    for part, axis in enumerate(AXES):
        values = np.array(rows[axis], dtype=float)
        matrix[part * space.layers : (part + 1) * space.layers, : values.shape[1]] = values
    return matrix


def cost_matrix(table: CostTable) -> Floats:
    """Return the cost of each choice, [S, K], without the fixed part."""
    return as_matrix(table.search_space, {axis: table[axis] for axis in AXES})


def increase_matrix(sensitivity: Sensitivity, *, counted: bool = False) -> Floats:
    """Return the loss increase of each choice alone, [S, K], as `Sensitivity.curves`."""
    return as_matrix(sensitivity.search_space, {axis: sensitivity.curves(axis, counted=counted) for axis in AXES})


def parts_left_out(space: SearchSpace) -> Floats:
    """Return the part of its sub-layer that each choice leaves out, 0 to 1, [S, K]."""
    return as_matrix(
        space,
        {axis: [[1 - width / space[axis][-1] for width in space[axis]]] * space.layers for axis in AXES},
    )


def prices(costs_SK: Floats, fixed: float, indices_NS: Indices) -> Floats:
    """Return the cost of each sub-network, [N]."""
    costs_N: Floats = fixed + costs_SK[np.arange(costs_SK.shape[0]), indices_NS].sum(-1)
    return costs_N
