"""The answer to a budget: along a router's path of nested sub-networks, the largest that every limit allows.

Shapes: N sub-networks on the path, S sub-layers, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flextron.costs.pricing import Ceiling
from flextron.routers.choices import Floats, Indices, Mask, cost_matrix, prices, to_subnet
from flextron.subnet import SearchSpace, Subnet

TOLERANCE = 1e-9


def answer(
    space: SearchSpace,
    path_NS: Indices,
    utilities_SK: Floats,
    ceilings: Sequence[Ceiling],
    usable_SK: Mask,
) -> Subnet:
    """The sub-network of a path that keeps all `ceilings` and uses one up, to within a step of a sub-layer.

    Costs rise along the path, so the last that fits is found at once; from there to the next one, sub-layers are
    widened in the order of utility gained per cost until one does not fit. A larger budget therefore never gives a
    narrower sub-layer, and no limit is exceeded. What costs nothing more in any table is added.

    Args:
        path_NS: nested sub-networks from the smallest of the space to the full model.
        utilities_SK: what each choice is worth; only their differences within a sub-layer matter.
        ceilings: limits, all of which the smallest sub-network keeps (`pricing.check_possible` says so).
        usable_SK: choices that may be taken (`choices.usable`), the path's among them.
    """
    tables = [
        (cost_matrix(ceiling.table), ceiling.table.fixed, ceiling.limit * (1 + TOLERANCE)) for ceiling in ceilings
    ]
    fits_N = np.ones(len(path_NS), dtype=bool)
    for costs_SK, fixed, limit in tables:
        fits_N &= prices(costs_SK, fixed, path_NS) <= limit
    last = int(np.flatnonzero(fits_N).max(initial=0))
    if last + 1 == len(path_NS):
        return to_subnet(space, path_NS[last])
    for_free_SK = _widest_for_free(usable_SK, [costs_SK for costs_SK, _, _ in tables])
    current_S, next_S = path_NS[last].copy(), path_NS[last + 1]
    costs_SK = np.sum([costs / limit for costs, _, limit in tables], axis=0)
    for layer in _by_gain(utilities_SK, costs_SK, current_S, next_S):
        for choice in range(next_S[layer], current_S[layer], -1):
            if not usable_SK[layer, choice]:
                continue
            wider_S = current_S.copy()
            wider_S[layer] = choice
            if all(prices(costs, fixed, wider_S[None])[0] <= limit for costs, fixed, limit in tables):
                current_S = wider_S
                break
        if current_S[layer] < next_S[layer]:
            break
    return to_subnet(space, for_free_SK[np.arange(len(current_S)), current_S])


def _widest_for_free(usable_SK: Mask, costs: Sequence[Floats]) -> Indices:
    """For each choice the widest usable one of the same cost in every table, [S, K]; an MLP is free in a KV cache."""
    widest_SK = np.tile(np.arange(usable_SK.shape[1]), (len(usable_SK), 1))
    for layer, usable_K in enumerate(usable_SK):
        choices = np.flatnonzero(usable_K)
        for choice, wider in zip(choices[-2::-1], choices[:0:-1], strict=True):
            if all(costs_SK[layer, choice] == costs_SK[layer, wider] for costs_SK in costs):
                widest_SK[layer, choice] = widest_SK[layer, wider]
    return widest_SK


def _by_gain(utilities_SK: Floats, costs_SK: Floats, current_S: Indices, next_S: Indices) -> list[int]:
    """The sub-layers that differ, the one that gains most utility per cost first."""
    every = np.arange(len(current_S))
    gained_S = utilities_SK[every, next_S] - utilities_SK[every, current_S]
    paid_S = costs_SK[every, next_S] - costs_SK[every, current_S]
    layers = np.flatnonzero(next_S > current_S)
    return [int(layer) for layer in layers[np.argsort(-(gained_S / (paid_S + 1e-12))[layers], kind="stable")]]
