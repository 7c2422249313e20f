"""Exact cost tables by formula: parameters, bytes of weights and of the KV cache, and FLOPs of a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import DynamicCache

from flextron.costs.table import CostTable, linear_table
from flextron.elastic.model import ElasticLayer, ElasticModel, SubLayer
from flextron.environment import dtype_name

FORMULAS = ("parameters", "weights", "kv", "flops")


def formula_table(model: ElasticModel, metric: str, *, context_tokens: int | None = None) -> CostTable:
    """An exact table, by formula.

    parameters: those of the exported sub-network, tied ones once; weights: their bytes. Both leave out all of a
        sub-layer of width 0, closing bias and norms too, as export does.
    kv: bytes of the KV cache of one sequence of `context_tokens` tokens, in the model's dtype, as transformers'
        DynamicCache holds them: layers of sliding attention keep one token less than their window. The two numbers per
        token that a skipped attention leaves there are not counted.
    flops: of one token's forward pass, two for each weight in a matrix product of the layers and of the output
        projection. Left out: attention scores, which grow with the context, biases, norms and activations.

    Raises:
        ValueError: another metric, or kv without `context_tokens`.
    """
    if metric in ("parameters", "weights"):
        return _held(model, metric)
    if metric == "kv":
        if context_tokens is None:
            raise ValueError("a table of the KV cache needs context_tokens, such as 4096.")
        return _kv(model, context_tokens)
    if metric == "flops":
        return _flops(model)
    raise ValueError(f"no formula for {metric!r}; there is one for {', '.join(FORMULAS)}.")


def _held(model: ElasticModel, metric: str) -> CostTable:
    """What the weights are: number or bytes."""

    def size(parameters: Iterable[torch.Tensor]) -> int:
        return sum(p.numel() * (p.element_size() if metric == "weights" else 1) for p in parameters)

    def row(layer: ElasticLayer, sub: SubLayer, widths: tuple[int, ...]) -> tuple[float, ...]:
        units = size(_of_units(sub))
        rest = size(_of_module(layer, sub)) - units
        return tuple(units // sub.width.full * width + rest if width else 0 for width in widths)

    space = model.search_space
    elastic = sum(size(_of_module(layer, sub)) for layer in model.layers for sub in (layer.mlp, layer.attention))
    return CostTable(
        space,
        metric,
        "bytes" if metric == "weights" else metric,
        size(model.lm.parameters()) - elastic,
        tuple(row(layer, layer.mlp, space.neurons) for layer in model.layers),
        tuple(row(layer, layer.attention, space.kv_groups) for layer in model.layers),
        {"formula": metric, **({"dtype": dtype_name(model.dtype)} if metric == "weights" else {})},
    )


def _of_units(sub: SubLayer) -> Iterator[torch.Tensor]:
    """The weights that `SubLayer.weights_per_unit` counts."""
    for opening in sub.opens:
        yield from opening.parameters(recurse=False)
    yield sub.closes.weight


def _of_module(layer: ElasticLayer, sub: SubLayer) -> Iterator[torch.Tensor]:
    return layer.module.get_submodule(sub.axis.module).parameters()


def _kv(model: ElasticModel, context_tokens: int) -> CostTable:
    # The cache's own layers know their windows; a full layer has none.
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    tokens = [context_tokens if window is None else min(context_tokens, window - 1) for window in windows]
    return linear_table(
        model.search_space,
        metric="kv",
        unit="bytes",
        fixed=0,
        per_neuron=[0] * len(model.layers),
        per_kv_group=[
            2 * _head_dim(layer.attention) * kept * model.dtype.itemsize
            for layer, kept in zip(model.layers, tokens, strict=True)
        ],
        conditions={"formula": "kv", "dtype": dtype_name(model.dtype), "context_tokens": context_tokens},
    )


def _head_dim(attention: SubLayer) -> int:
    return attention.closing_size // (attention.width.full * attention.heads_per_unit)


def _flops(model: ElasticModel) -> CostTable:
    def of_unit(sub: SubLayer) -> int:
        return 2 * sum(projection.weight.numel() for projection in (*sub.opens, sub.closes)) // sub.width.full

    return linear_table(
        model.search_space,
        metric="flops",
        unit="FLOPs",
        fixed=2 * model.lm.get_output_embeddings().weight.numel(),
        per_neuron=[of_unit(layer.mlp) for layer in model.layers],
        per_kv_group=[of_unit(layer.attention) for layer in model.layers],
        conditions={"formula": "flops"},
    )
