"""Elastic layers: an MLP and an attention, each of units of which the first can be kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flextron.elastic.families import Axis, Family
from flextron.elastic.projections import (
    Projection,
    Width,
    expert_tensors,
    make_elastic,
    make_norm_skippable,
    make_skippable,
)


@dataclass(frozen=True)
class SubLayer:
    """One elastic sub-layer: an MLP with its neurons, or an attention with its KV groups.

    If it has no opening projections, it does not narrow: all of it is one unit, which is kept or left out.
    """

    opens: tuple[Projection, ...]
    closes: Projection
    """Of a mixture, its experts, which are no projection."""
    axis: Axis
    width: Width
    heads_per_unit: int
    """Number of query heads in a KV group; 1 for neurons."""
    counters: tuple[tuple[nn.Module, str, int], ...]
    """Module attributes in which the family's own code counts heads or rows, and their full value; `keep` sets them."""
    parts: tuple[nn.Module, ...]
    """Modules that are left out at width 0: the sub-layer's own, or its projections if it has none."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters of the sub-layer."""
        for part in self.parts:
            yield from part.parameters()

    def unit_parameters(self) -> Iterator[torch.Tensor]:
        """Yield the parameters that belong to units: matrices and opening biases; all, if the sub-layer is one unit."""
        if self.axis.experts:
            yield from (held[name] for held, name in self.expert_tensors() if held[name].requires_grad)
            return
        if not self.axis.narrows:
            yield from self.parameters()
            return
        for opening in self.opens:
            yield from opening.parameters(recurse=False)
        yield self.closes.weight

    def expert_tensors(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield where a mixture holds each tensor whose first dimension counts its experts."""
        return expert_tensors(self.parts[0], self.width.full)

    @property
    def weights_per_unit(self) -> int:
        """Number of weights in one unit, opening biases included."""
        return sum(parameter.numel() for parameter in self.unit_parameters()) // self.width.full

    def keep(self, units: int) -> None:
        """Run the first `units` units only."""
        self.width.kept = units
        for module, attribute, full in self.counters:
            setattr(module, attribute, self.width.of(full))

    @property
    def closing_size(self) -> int:
        """Number of input columns of the closing projection at full width."""
        return self.closes.inputs


@dataclass(frozen=True)
class ElasticLayer:
    """One decoder layer and its elastic sub-layers, by axis."""

    module: nn.Module
    subs: Mapping[str, SubLayer]

    def __getitem__(self, axis: str) -> SubLayer:
        return self.subs[axis]

    @property
    def mlp(self) -> SubLayer:
        """The sub-layer with the neurons."""
        return self["neurons"]

    @property
    def attention(self) -> SubLayer:
        """The sub-layer with the KV groups."""
        return self["kv_groups"]


def make_layers_elastic(lm: PreTrainedModel, family: Family) -> list[ElasticLayer]:
    """Swap the projections of every layer in place, and return the elastic layers.

    Raises:
        ValueError: the family is not that of the model, or its layers are of unlike sizes.
    """
    layers = [_make_layer_elastic(layer, family, lm.config) for layer in _modules(lm, family)]
    _check_alike(layers)
    return layers


def _modules(lm: PreTrainedModel, family: Family) -> list[nn.Module]:
    try:
        layers = list(lm.get_submodule(family.layers).children())
    except AttributeError:
        layers = []
    if not layers:
        raise ValueError(f"{type(lm).__name__} has no layers at {family.layers!r}; the family spec is wrong.")
    return layers


def _make_layer_elastic(layer: nn.Module, family: Family, config: Any) -> ElasticLayer:
    axes = {name: axis_of(layer, axis) for name, axis in family.axes.items()}
    subs = {}
    for name, axis in axes.items():
        units, heads = _units(layer, axis, config, attends=name == "kv_groups")
        if family.axes[name].holds_experts and not axis.experts:
            experts = next(kind for kind in family.axes[name].kinds() if kind.experts)
            units = _blocks(units, getattr(config, experts.config_keys[0]))
        subs[name] = _make_sub_layer_elastic(layer, axis, Width(units), heads_per_unit=heads)
    return ElasticLayer(layer, subs)


def axis_of(layer: nn.Module, axis: Axis) -> Axis:
    """Return which of an axis's kinds this layer has.

    Raises:
        ValueError: it has none, or lacks another module of the one that it has.
    """
    for kind in axis.kinds():
        if has_module(layer, kind.closes):
            paths = (*kind.opens, *kind.parts, *((kind.norm,) if kind.norm else ()))
            lacking = [path for path in paths if not has_module(layer, path)]
            if lacking:
                raise ValueError(f"{type(layer).__name__} has no {lacking[0]!r}; the family spec is wrong.")
            return kind
    names = " or ".join(repr(kind.closes) for kind in axis.kinds())
    raise ValueError(f"{type(layer).__name__} has no {names}; the family spec is wrong.")


def has_module(layer: nn.Module, path: str) -> bool:
    """Return whether there is a module at this path."""
    try:
        return isinstance(layer.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _blocks(neurons: int, experts: int) -> int:
    """Number of units of an MLP beside mixtures: as many blocks of neurons as there are experts.

    Raises:
        ValueError: the neurons cannot be parted so.
    """
    if neurons % experts:
        raise ValueError(f"{neurons} neurons cannot be parted into {experts} blocks, one for each expert elsewhere.")
    return experts


def _units(layer: nn.Module, axis: Axis, config: Any, *, attends: bool) -> tuple[int, int]:
    """Return the number of units of a sub-layer, and of query heads per unit (1 for neurons)."""
    if not axis.narrows:
        return 1, 1
    if axis.experts:
        return next(p.shape[0] for p in layer.get_submodule(axis.closes).parameters() if p.ndim == 3), 1
    if not attends:
        return layer.get_submodule(axis.closes).get_parameter("weight").numel() // config.hidden_size, 1
    kv_groups = getattr(config, axis.config_keys[0])
    return kv_groups, config.num_attention_heads // kv_groups


def _make_sub_layer_elastic(layer: nn.Module, axis: Axis, width: Width, *, heads_per_unit: int) -> SubLayer:
    opens = [make_elastic(layer.get_submodule(path), width, opens=True, stacked=axis.stacked) for path in axis.opens]
    closing: Any = layer.get_submodule(axis.closes)
    closes = closing if axis.experts else make_elastic(closing, width, opens=False)
    if axis.module:
        make_skippable(layer.get_submodule(axis.module), width, outputs=axis.outputs, experts=axis.experts)
    if axis.norm:
        make_norm_skippable(layer.get_submodule(axis.norm), width)
    parts = tuple(layer.get_submodule(path) for path in axis.parts)
    return SubLayer(tuple(opens), closes, axis, width, heads_per_unit, tuple(_counters(layer, axis)), parts)


def _counters(layer: nn.Module, axis: Axis) -> Iterator[tuple[nn.Module, str, int]]:
    for path in axis.counts:
        parent, _, attribute = path.rpartition(".")
        module = layer.get_submodule(parent)
        if not isinstance(getattr(module, attribute, None), int):
            raise ValueError(  # noqa: TRY004 - the type is that of a spec's other errors
                f"{type(layer).__name__} has no whole number {path!r}; the family spec is wrong."
            )
        yield module, attribute, getattr(module, attribute)


def _check_alike(layers: list[ElasticLayer]) -> None:
    """Pass if every layer has as many units as the first."""
    for index, layer in enumerate(layers):
        for axis, sub in layer.subs.items():
            first = layers[0][axis].width.full
            if sub.width.full != first:
                raise ValueError(
                    f"layer {index} has {sub.width.full} {axis}, layer 0 has {first}: layers of unlike sizes cannot "
                    "be narrowed together."
                )
