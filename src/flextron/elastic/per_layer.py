"""Models whose layers differ in size, as the standard `per_layer_config` of config.json lists them.

transformers >= 5.15 reads that standard into its configs, but builds no models from it. The classes here differ from
the stock ones in two ways: layer i is built from `config.per_layer_config[i]`, and a sub-layer named in its `skip`
("attention", "mlp") has no weights and adds zero to the residual stream. There are three classes for every decoder of
transformers, made when they are first asked for. `register()` lets the Auto classes find them.

Exports also copy this file beside a checkpoint as its remote code, so it imports torch and transformers only.
Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

PREFIX = "flextron_"
"""Model types here are this prefix plus the stock name."""
_LAYERS = ("layers", "h", "decoder.layers", "encoder.layers")
"""Where base models hold their layers."""
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
"""What layers call their attention, which returns (output, weights)."""
_MIXERS = ("linear_attn", "conv", "mamba", "temporal_block")
"""What layers of hybrids have in place of an attention; it returns the output alone."""
_MLPS = (("mlp",), ("feed_forward",), ("ffn",), ("mlp_block",), ("shared_mlp",), ("fc1", "fc2"))
"""What layers call their MLP, or the two projections that stand for it."""


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
        for store in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            store.update(passed, passed, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """Replace a skipped MLP, or a mixer of a hybrid: return zeros for the residual stream, [B, T, D] -> [B, T, D]."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
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

    def __init__(self, config: Any) -> None:  # not `self: Any`: vLLM would take that type for the type of `config`
        super().__init__(_with_one_stock_layer(config))  # type: ignore[call-arg]
        model: Any = self
        _adopt(model, config)
        path = next(path for path in _LAYERS if _has(model, path))
        layer_class = type(model.get_submodule(path)[0])
        layers = [_make_layer(layer_class, config, index) for index in range(config.num_hidden_layers)]
        model.set_submodule(path, nn.ModuleList(layers))
        model.post_init()


def _has(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


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
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # OPT's decoder has the config too
            module.config = config


def _make_layer(layer_class: type[nn.Module], config: Any, index: int) -> nn.Module:
    layer_config = config.per_layer_config[index]
    layer = layer_class(layer_config, index)
    skip = getattr(layer_config, "skip", ())
    if "attention" in skip:
        name = next(name for name in (*_ATTENTIONS, *_MIXERS) if _has(layer, name))
        setattr(layer, name, SkippedAttn(index) if name in _ATTENTIONS else SkippedMLP())
    if "mlp" in skip:
        for name in next(names for names in _MLPS if _has(layer, names[0])):
            setattr(layer, name, SkippedMLP())
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config = config  # shared, so that a later choice of attention kernel reaches every layer
    return layer


@cache
def classes_of(model_type: str) -> Classes:
    """The classes for a stock model type, such as FlextronLlamaForCausalLM; also attributes of this module.

    Raises:
        KeyError: transformers has no decoder of this type.
    """
    stock = CONFIG_MAPPING[model_type]
    config = strict(_subclass(_PerLayerConfig, stock, model_type=PREFIX + model_type))
    model = _subclass(_PerLayerModel, MODEL_MAPPING[stock], config_class=config)
    lm = MODEL_FOR_CAUSAL_LM_MAPPING[stock]
    return Classes(config, model, _subclass(_PerLayerCausalLM, lm, config_class=config, base_model_class=model))


def _subclass(mixin: type, stock: type, **attributes: Any) -> Any:
    about = {"__module__": __name__, "__doc__": f"{stock.__name__} with layers of their own sizes."}
    return type(f"Flextron{stock.__name__}", (mixin, stock), {**about, **attributes})


def causal_lm_names() -> dict[str, str]:
    """The name of the causal language model for each stock model type; none of them is made for that."""
    return {model_type: f"Flextron{name}" for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def __getattr__(name: str) -> Any:
    stock = name.removeprefix("Flextron")
    types = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if stock in _names(kind)] if stock != name else []
    if not types:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Some types use another one's classes.
    owners = [kind for kind in types if stock.startswith(str(_names(kind)[0]).removesuffix("Config"))]
    kind = (owners or types)[0]
    return classes_of(CONFIG_MAPPING[kind].model_type)[_names(kind).index(stock)]


def _names(model_type: str) -> list[str | None]:
    """The names of the stock classes that `Classes` lists."""
    mappings = (CONFIG_MAPPING_NAMES, MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return [mapping.get(model_type) for mapping in mappings]


class _OnDemand(dict[str, Any]):
    """The config classes that were registered with transformers, and those here, made when they are first asked for."""

    def __contains__(self, model_type: object) -> bool:
        if not super().__contains__(model_type) and str(model_type).startswith(PREFIX):
            stock = str(model_type).removeprefix(PREFIX)
            if stock in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                config, model, causal_lm = classes_of(stock)
                self[str(model_type)] = config
                AutoModel.register(config, model, exist_ok=True)
                AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
        return super().__contains__(model_type)


def register() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load these classes. Repeated calls change nothing."""
    if not isinstance(CONFIG_MAPPING._extra_content, _OnDemand):
        CONFIG_MAPPING._extra_content = _OnDemand(CONFIG_MAPPING._extra_content)
