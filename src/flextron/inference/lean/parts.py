"""Where the modules of a layer like Llama's are, by what they do.

Norms of a layer have other names in every family, and some stand elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flextron.elastic.layers import ElasticLayer, SubLayer

ACTIVATIONS = {
    **dict.fromkeys(("SiLUActivation", "SiLU"), 0),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), 1),
    **dict.fromkeys(("GELUActivation", "GELU"), 2),
    "ReLU": 3,
    "ReLUSquaredActivation": 4,
}
"""By class: silu, gelu by a tangent, gelu, relu, its square."""
_ROLES: dict[frozenset[str], tuple[str | None, ...]] = {
    frozenset(role for role in roles if role): roles
    for roles in (
        ("input_layernorm", "post_attention_layernorm", None, None),
        ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
        (None, None, "post_attention_layernorm", "post_feedforward_layernorm"),
        ("input_layernorm", "input_layernorm", None, None),  # side by side
    )
}
"""Norms of a layer before attention, before the MLP, after attention and after the MLP, by all their names."""


def roles_of(layer: nn.Module) -> tuple[str | None, ...] | None:
    """Names of a layer's norms by what they do; None if it has other parts, or they have other names."""
    names = {name for name, module in layer.named_children() if not isinstance(module, nn.Dropout)}
    return _ROLES.get(frozenset(names - {"self_attn", "mlp"})) if {"self_attn", "mlp"} <= names else None


def is_side_by_side(layer: ElasticLayer) -> bool:
    """Whether the MLP reads what the attention reads."""
    before_attention, before_mlp, *_ = roles_of(layer.module) or (None, "")
    return before_attention is not None and before_attention == before_mlp


def norms_of(layer: Any) -> list[Any]:
    """The norms of a layer: before attention, before MLP, of queries, of keys, after attention, after MLP; or None."""
    before_attention, before_mlp, after_attention, after_mlp = (
        role and getattr(layer, role) for role in roles_of(layer) or ()
    )
    of_heads = (
        getattr(layer.self_attn, f"{which}_norm", None) or getattr(layer.self_attn, f"{which}_layernorm", None)
        for which in "qk"
    )
    return [before_attention, before_mlp, *of_heads, after_attention, after_mlp]


def last_norm(lm: Any) -> Any:
    """The norm after the last layer."""
    return getattr(lm.model, "norm", None) or getattr(lm.model, "final_layernorm", None)


def rotates(layer: ElasticLayer) -> bool:
    """Whether queries and keys are rotated in this layer."""
    return bool(getattr(layer.module.self_attn, "use_rope", True))


def activation_of(layer: ElasticLayer) -> str:
    """Class of an MLP's activation, of those that the kernels know; empty if there is none."""
    kinds = (type(module).__name__ for module in layer.module.get_submodule("mlp").children())
    return next((kind for kind in kinds if kind in ACTIVATIONS), "")


def residual_factor(layer: ElasticLayer) -> float:
    """By what a layer multiplies what it adds to the residual stream."""
    return float(getattr(layer.module, "residual_multiplier", 1.0))


def projections_of(layer: ElasticLayer) -> Iterator[Any]:
    """The projections of a layer."""
    return (projection for sub in layer.subs.values() for _, projection in projections(sub))


def projections(sub: SubLayer) -> zip[tuple[str, Any]]:
    """The projections of a sub-layer, with their paths in the layer."""
    return zip((*sub.axis.opens, sub.axis.closes), (*sub.opens, sub.closes), strict=True)
