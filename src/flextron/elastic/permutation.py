"""Permute the units of every layer in place; the full model computes the same function.

Shapes: L layers, N neurons, G KV groups, Q query heads in a group, R rows, C columns.
"""

from __future__ import annotations

import torch

from flextron.elastic.checkpoint import Ranking
from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection


@torch.no_grad()
def permute(model: ElasticModel, ranking: Ranking) -> None:
    """Permute the model's units by `ranking` and record it in `model.ranking`, composed with any earlier one.

    Rows of the opening projections and columns of the closing one move together, so the full model computes the same
    up to the order of sums (1e-5 in fp32).

    Raises:
        ValueError: `ranking` is not a permutation of this model's units; then nothing has moved.
    """
    ranking.check(**model.search_space.sizes, query_heads=model.layers[0].attention.heads_per_unit)
    for index, layer in enumerate(model.layers):
        _permute_sub_layer(layer.mlp, ranking.neurons[index].long())
        _permute_sub_layer(layer.attention, ranking.kv_groups[index].long(), ranking.query_heads[index].long())
    model.ranking = ranking if model.ranking is None else _compose(model.ranking, ranking)


def _permute_sub_layer(sub: SubLayer, units: torch.Tensor, heads_GQ: torch.Tensor | None = None) -> None:
    if not sub.axis.narrows:
        return
    if sub.axis.experts:
        for held, name in sub.expert_tensors():
            held[name].copy_(held[name][units.to(held[name].device)])
        return
    unit_columns = sub.closing_size // sub.width.full
    for module in sub.opens:
        unit_rows = module.matrix().shape[0] // sub.width.full // module.stacked
        has_heads = (
            unit_rows >= unit_columns
        )  # K and V have one head a group; gated queries have two rows for each column
        order = _expand(units, heads_GQ if has_heads else None, unit_rows)
        _reorder(module, order)
    columns = _expand(units, heads_GQ, unit_columns)
    closing = sub.closes.matrix()
    closing.copy_(closing[:, columns.to(closing.device)])


def _expand(units: torch.Tensor, heads_GQ: torch.Tensor | None, unit_size: int) -> torch.Tensor:
    """Return the old index of every row (or column), in the new order, for units of `unit_size` consecutive rows."""
    if heads_GQ is None:
        heads_GQ = torch.zeros(len(units), 1, dtype=torch.long)
    head_size = unit_size // heads_GQ.shape[1]
    starts_GQ = units[:, None] * unit_size + heads_GQ * head_size
    return (starts_GQ[:, :, None] + torch.arange(head_size)).flatten()


def _reorder(module: Projection, order: torch.Tensor) -> None:
    matrix = module.matrix()
    rows = torch.cat([order + block * len(order) for block in range(module.stacked)]).to(matrix.device)
    matrix.copy_(matrix[rows])
    if module.bias is not None:
        module.bias.copy_(module.bias[rows])


def _compose(first: Ranking, second: Ranking) -> Ranking:
    groups = second.kv_groups.long()
    query_heads = first.query_heads.gather(1, groups[:, :, None].expand_as(second.query_heads))
    return Ranking(
        neurons=first.neurons.gather(1, second.neurons.long()),
        kv_groups=first.kv_groups.gather(1, groups),
        query_heads=query_heads.gather(2, second.query_heads.long()),
        score=second.score,
        tokens=second.tokens,
        text=second.text,
    )
