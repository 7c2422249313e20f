"""Cut a sub-network's weights out of the full model's, and state its sizes."""

from __future__ import annotations

import torch
from torch import nn

from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel
from flextron.errors import ExportError
from flextron.subnet import Subnet

Sizes = dict[str, int]
"""Config field -> value, for one layer."""


def layer_sizes(model: ElasticModel, subnet: Subnet) -> list[Sizes]:
    """Return the config fields of every layer at the widths of `subnet`."""
    sizes: list[Sizes] = [{} for _ in model.layers]
    for layer, axis, sub_layer in model.sub_layers():
        of_axis = axis_sizes(sub_layer, subnet[axis][layer])
        if axis == "neurons" and sub_layer.opens:  # beside mixtures, a unit is a block of neurons
            of_axis = {key: units * (sub_layer.closing_size // sub_layer.width.full) for key, units in of_axis.items()}
        sizes[layer] |= of_axis
    return sizes


def axis_sizes(sub_layer: SubLayer, units: int) -> Sizes:
    """Return the config fields of one sub-layer that keeps `units` units.

    Raises:
        ExportError: the architecture has no field for them.
    """
    if not sub_layer.axis.config_keys:
        if units not in (0, sub_layer.width.full):
            raise ExportError(f"no config field states the units of {sub_layer.axis.closes}. Keep all of them.")
        return {}
    counts, *shrinks = sub_layer.axis.config_keys
    return {counts: units, **dict.fromkeys(shrinks, units * sub_layer.heads_per_unit)}


def cut_state(model: ElasticModel, subnet: Subnet) -> dict[str, torch.Tensor]:
    """Return the full model's state dict, cut to `subnet`."""
    state: dict[str, torch.Tensor] = model.lm.state_dict()
    with model.use(subnet):
        for layer, _, sub_layer in model.sub_layers():
            _cut(state, f"{model.family.layers}.{layer}.", sub_layer)
    return state


def _cut(state: dict[str, torch.Tensor], prefix: str, sub_layer: SubLayer) -> None:
    axis = sub_layer.axis
    if not sub_layer.width.kept:
        for part in axis.parts:
            for key in [key for key in state if key.startswith(f"{prefix}{part}.")]:
                del state[key]
        return
    if axis.experts:
        for key in [key for key in state if key.startswith(f"{prefix}{axis.module}.") and "shared" not in key]:
            if state[key].ndim and state[key].shape[0] == sub_layer.width.full:
                state[key] = state[key][: sub_layer.width.kept]
        return
    if not axis.narrows:
        return
    for path, module in zip(axis.opens, sub_layer.opens, strict=True):
        for name, dim in ((f"{prefix}{path}.weight", _rows(module)), (f"{prefix}{path}.bias", 0)):
            if name in state:
                state[name] = _first(state[name], sub_layer, dim=dim, stacked=module.stacked)
    weight = f"{prefix}{axis.closes}.weight"
    state[weight] = _first(state[weight], sub_layer, dim=1 - _rows(sub_layer.closes))


def _first(weight: torch.Tensor, sub_layer: SubLayer, *, dim: int, stacked: int = 1) -> torch.Tensor:
    """Return the slice of the kept units, of each stacked block."""
    if sub_layer.width.is_full:
        return weight
    blocks = weight.chunk(stacked, dim)
    kept = [block.narrow(dim, 0, sub_layer.width.of(block.shape[dim])) for block in blocks]
    return kept[0] if stacked == 1 else torch.cat(kept, dim)


def _rows(projection: nn.Module) -> int:
    """Return the output dimension of a weight: 0, but 1 for GPT-2's Conv1D, which is [in, out]."""
    return 0 if isinstance(projection, nn.Linear) else 1


def parameters_asked(model: ElasticModel, subnet: Subnet) -> int:
    """Return the full model's parameters minus those of dropped units; a sub-layer of width 0 drops all it has."""
    dropped = model.layer_weights(model.search_space.full) - model.layer_weights(subnet)
    for layer, axis, sub_layer in model.sub_layers():
        if not subnet[axis][layer]:
            dropped += sum(p.numel() for p in sub_layer.parameters())
            dropped -= sub_layer.width.full * sub_layer.weights_per_unit
    return int(model.lm.num_parameters()) - dropped


def refuse_odd_heads(model: ElasticModel, subnet: Subnet) -> None:
    """Refuse layers with some of the heads if the architecture fixes the head size to hidden size / heads.

    Raises:
        ExportError: a layer keeps some but not all heads of such an architecture.
    """
    full = model.search_space.kv_groups[-1]
    for layer, heads in enumerate(subnet.kv_groups):
        if 0 < heads < full and not model.family.exports_fewer_heads:
            raise ExportError(
                f"layer {layer} keeps {heads} of {full} attention heads, but {model.config.model_type} cannot express "
                f"that: its head size is always hidden size / heads. Keep {full} or 0 heads in each layer; "
                "MLP widths are free."
            )
