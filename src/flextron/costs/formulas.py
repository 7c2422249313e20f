"""Exact cost tables by formula: parameters, bytes of weights and of the KV cache, and FLOPs of a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache

from flextron.costs.table import CostTable, linear_table
from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel, projections_of
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
    quantised = {id(p.weight): p.quantized for p in projections_of(model).values() if p.quantized is not None}

    def size(parameters: Iterable[torch.Tensor]) -> int:
        if metric == "parameters":
            return sum(parameter.numel() for parameter in parameters)
        return sum(quantised.get(id(parameter), parameter).nbytes for parameter in parameters)

    def row(sub: SubLayer, widths: tuple[int, ...]) -> tuple[float, ...]:
        units = size(sub.unit_parameters())
        rest = size(sub.parameters()) - units
        return tuple(units // sub.width.full * width + rest if width else 0 for width in widths)

    space = model.search_space
    elastic = sum(size(sub.parameters()) for _, _, sub in model.sub_layers())
    whole = size([*model.lm.parameters(), *(_scales(model) if metric == "weights" else ())])
    return CostTable(
        space,
        metric,
        "bytes" if metric == "weights" else metric,
        whole - elastic,
        tuple(row(layer.mlp, space.neurons) for layer in model.layers),
        tuple(row(layer.attention, space.kv_groups) for layer in model.layers),
        {"formula": metric, **({"dtype": model.weights_type} if metric == "weights" else {})},
    )


def _scales(model: ElasticModel) -> Iterable[torch.Tensor]:
    """What embeddings and output projection in 8 bits are multiplied by, tied ones once."""
    around = (model.lm.get_output_embeddings(), model.lm.get_input_embeddings())
    found = (getattr(module, "scale", None) for module in around)
    return {id(scale): scale for scale in found if isinstance(scale, torch.Tensor)}.values()


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
            numbers * kept * model.dtype.itemsize
            for numbers, kept in zip(_numbers_per_unit(model), tokens, strict=True)
        ],
        conditions={"formula": "kv", "dtype": dtype_name(model.dtype), "context_tokens": context_tokens},
    )


def _numbers_per_unit(model: ElasticModel) -> list[int]:
    """Numbers that a unit of each layer's attention caches per token: a key and a value for each KV group."""
    if all(layer.attention.axis.narrows for layer in model.layers):
        return [
            2 * sub.closing_size // (sub.width.full * sub.heads_per_unit)
            for sub in (layer.attention for layer in model.layers)
        ]
    with torch.inference_mode(), model.use(model.search_space.full):
        filled = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    return [
        sum(getattr(layer, name).numel() for name in ("keys", "values") if _holds(layer, name))
        for layer in filled.layers
    ]


def _holds(layer: Any, name: str) -> bool:
    """Whether a layer of a cache keeps keys or values of every token; linear attentions and state spaces do not."""
    return isinstance(getattr(layer, name, None), torch.Tensor)


def _flops(model: ElasticModel) -> CostTable:
    def of_unit(sub: SubLayer) -> int:
        return 2 * sum(p.numel() for p in sub.unit_parameters() if p.ndim > 1) // sub.width.full

    def row(sub: SubLayer, widths: tuple[int, ...]) -> tuple[float, ...]:
        if not sub.axis.experts:
            return tuple(of_unit(sub) * width for width in widths)
        rest = sum(p.numel() for p in sub.parameters() if p.ndim > 1) - sub.width.full * sub.weights_per_unit
        routed = model.least_units  # a token meets as many experts, however many are kept
        return tuple(2 * rest + of_unit(sub) * routed if width else 0 for width in widths)

    space = model.search_space
    return CostTable(
        space,
        "flops",
        "FLOPs",
        2 * model.lm.get_output_embeddings().weight.numel(),
        tuple(row(layer.mlp, space.neurons) for layer in model.layers),
        tuple(row(layer.attention, space.kv_groups) for layer in model.layers),
        {"formula": "flops"},
    )
