"""How the static router answers a budget: with the largest sub-network on its path that keeps every limit.

A path is a list of nested sub-networks, from the smallest to the full model.

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
    """Return the sub-network that keeps all `ceilings` and uses one of them up, to within a step of one sub-layer.

    The answer starts at the last sub-network of the path that fits: costs rise along the path. Sub-layers are then
    widened towards the next sub-network, most utility per cost first, until one does not fit. So no limit is exceeded,
    and a larger budget never narrows a sub-layer. At the end every sub-layer takes the widest choice that costs the
    same in all tables.

    Args:
        path_NS: nested sub-networks, from the smallest of the space to the full model.
        utilities_SK: utility of each choice; only differences within a sub-layer matter.
        ceilings: limits that the smallest sub-network keeps (`pricing.check_possible`).
        usable_SK: choices that may be taken (`choices.usable`); they include the path's.
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
    """Return, for each choice, the widest usable choice that costs the same in every table, [S, K].

    An MLP, for instance, costs nothing in a KV cache.
    """
    widest_SK = np.tile(np.arange(usable_SK.shape[1]), (len(usable_SK), 1))
    for layer, usable_K in enumerate(usable_SK):
        choices = np.flatnonzero(usable_K)
        for choice, wider in zip(choices[-2::-1], choices[:0:-1], strict=True):
            if all(costs_SK[layer, choice] == costs_SK[layer, wider] for costs_SK in costs):
                widest_SK[layer, choice] = widest_SK[layer, wider]
    return widest_SK


def _by_gain(utilities_SK: Floats, costs_SK: Floats, current_S: Indices, next_S: Indices) -> list[int]:
    """Return the sub-layers that differ, largest utility gain per cost first."""
    every = np.arange(len(current_S))
    gained_S = utilities_SK[every, next_S] - utilities_SK[every, current_S]
    paid_S = costs_SK[every, next_S] - costs_SK[every, current_S]
    layers = np.flatnonzero(next_S > current_S)
    return [int(layer) for layer in layers[np.argsort(-(gained_S / (paid_S + 1e-12))[layers], kind="stable")]]
