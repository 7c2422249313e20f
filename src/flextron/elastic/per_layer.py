"""Models whose layers differ in size, as the standard `per_layer_config` of config.json lists them.

transformers >= 5.15 reads that standard into its configs, but builds no models from it. The classes here differ from
the stock ones in two ways: layer i is built from `config.per_layer_config[i]`, and a sub-layer named in its `skip`
("attention", "mlp") has no weights and adds zero to the residual stream. `register()` adds them to the Auto classes.

Exports also copy this file beside a checkpoint as its remote code, so it imports torch and transformers only.
Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
)

PREFIX = "flextron_"
"""Model types here are this prefix plus the stock name."""


class Places(NamedTuple):
    """Names of the attributes that hold the layers of a base model and the sub-layers of a layer."""

    layers: str
    attention: str
    mlp: str


class Classes(NamedTuple):
    """The three classes of one model type."""

    config: Any
    model: Any
    causal_lm: Any


# Not `...Attention`: in a file with such a class name, transformers expects a switch for attention kernels.
class SkippedAttn(nn.Module):
    """Replace a skipped attention: return zeros for the residual stream, [B, T, D] -> ([B, T, D], None).

    transformers may ask any layer's KV cache for the number of past tokens, so this stores one number per token there.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return zeros like `hidden_states`, and no attention weights."""
        for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(passed, passed, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """Replace a skipped MLP: return zeros for the residual stream, [B, T, D] -> [B, T, D]."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros like `hidden_states`."""
        return torch.zeros_like(hidden_states)


class _PerLayerConfig:
    """Mixin for a stock config: check each layer alone, instead of all layers at once as the stock config does."""

    def validate_architecture(self: Any) -> None:
        for index, layer in enumerate(self.per_layer_config):
            unknown = sorted({*getattr(layer, "skip", ())} - {"attention", "mlp"})
            if unknown:
                raise ValueError(f"per_layer_config[{index}] skips {unknown}; known are 'attention' and 'mlp'.")
            groups = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
            if layer.num_attention_heads % groups:
                raise ValueError(
                    f"per_layer_config[{index}] has {layer.num_attention_heads} attention heads, "
                    f"not a multiple of its {groups} key/value heads."
                )


class _PerLayerModel:
    """Mixin for a stock base model: build each layer from its own config."""

    places: Places

    def __init__(self, config: Any) -> None:  # not `self: Any`: vLLM would take that type for the type of `config`
        super().__init__(_with_one_stock_layer(config))  # type: ignore[call-arg]
        model: Any = self
        _adopt(model, config)
        layer_class = type(getattr(model, self.places.layers)[0])
        layers = [_make_layer(layer_class, config, index, self.places) for index in range(config.num_hidden_layers)]
        setattr(model, self.places.layers, nn.ModuleList(layers))
        model.post_init()


class _PerLayerCausalLM:
    """Mixin for a stock causal language model: make its base model a `_PerLayerModel`."""

    base_model_class: Any

    def __init__(self: Any, config: Any) -> None:
        super().__init__(_with_one_stock_layer(config))  # type: ignore[call-arg]
        _adopt(self, config)
        setattr(self, self.base_model_prefix, self.base_model_class(config))
        self.post_init()


def _with_one_stock_layer(config: Any) -> Any:
    """A config from which stock code builds everything but the layers, plus one layer that shows their class."""
    stock = copy.deepcopy(config)
    stock.per_layer_config = None
    stock.num_hidden_layers = 1
    return stock


def _adopt(model: Any, config: Any) -> None:
    config._attn_implementation = model.config._attn_implementation  # the stock __init__ has resolved it
    model.config = config


def _make_layer(layer_class: type[nn.Module], config: Any, index: int, places: Places) -> nn.Module:
    layer_config = config.per_layer_config[index]
    layer = layer_class(layer_config, index)
    skip = getattr(layer_config, "skip", ())
    if "attention" in skip:
        setattr(layer, places.attention, SkippedAttn(index))
    if "mlp" in skip:
        setattr(layer, places.mlp, SkippedMLP())
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config = config  # shared, so that a later choice of attention kernel reaches every layer
    return layer


def _make_classes(model_type: str, places: Places) -> Classes:
    stock = CONFIG_MAPPING[model_type]
    config = _subclass(_PerLayerConfig, stock, model_type=PREFIX + model_type)
    config = strict(config)
    model = _subclass(_PerLayerModel, MODEL_MAPPING[stock], config_class=config, places=places)
    lm = MODEL_FOR_CAUSAL_LM_MAPPING[stock]
    return Classes(config, model, _subclass(_PerLayerCausalLM, lm, config_class=config, base_model_class=model))


def _subclass(mixin: type, stock: type, **attributes: Any) -> Any:
    about = {"__module__": __name__, "__doc__": f"{stock.__name__} with layers of their own sizes."}
    return type(f"Flextron{stock.__name__}", (mixin, stock), {**about, **attributes})


_LLAMA_LIKE = Places("layers", "self_attn", "mlp")

CLASSES: dict[str, Classes] = {
    model_type: _make_classes(model_type, places)
    for model_type, places in {
        "llama": _LLAMA_LIKE,
        "mistral": _LLAMA_LIKE,
        "qwen2": _LLAMA_LIKE,
        "qwen3": _LLAMA_LIKE,
        "smollm3": _LLAMA_LIKE,
        "gemma2": _LLAMA_LIKE,
        "gemma3_text": _LLAMA_LIKE,
        "granite": _LLAMA_LIKE,
        "phi": _LLAMA_LIKE,
        "gpt2": Places("h", "attn", "mlp"),
        "gpt_neox": Places("layers", "attention", "mlp"),
    }.items()
}
"""The classes for each stock model type. They are also attributes of this module: FlextronLlamaForCausalLM, ..."""

globals().update({cls.__name__: cls for classes in CLASSES.values() for cls in classes})


def register() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load these classes. Repeated calls change nothing."""
    for config, model, causal_lm in CLASSES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
