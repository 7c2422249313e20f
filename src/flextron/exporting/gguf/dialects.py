"""Express a sub-network for llama.cpp: its architecture, its metadata, and its tensors under GGUF names.

Equal widths use the model's own architecture. Other widths use `deci`, which has sizes per layer.
Shapes: H heads, D model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from flextron.elastic.gguf_source import ROPE_TENSOR
from flextron.elastic.model import ElasticModel
from flextron.errors import ExportError
from flextron.exporting.cutting import cut_state, refuse_odd_heads
from flextron.subnet import Subnet


@dataclass(frozen=True)
class Dialect:
    """An architecture of llama.cpp."""

    arch: str
    pairs_neighbours: bool
    """Whether it rotates neighbouring rows of Q and K; transformers rotates the two halves of a head."""
    fewer_heads: bool = True
    """Whether all heads together may be narrower than the hidden size."""
    scales_rope: bool = False
    """Whether it reads factors for the rotary frequencies."""


DECI = Dialect("deci", pairs_neighbours=True, scales_rope=True)
_LLAMA = replace(DECI, arch="llama")
_OWN = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Dialect("qwen2", pairs_neighbours=False, fewer_heads=False),
    "qwen3": Dialect("qwen3", pairs_neighbours=False),
    "gpt2": Dialect("gpt2", pairs_neighbours=False, fewer_heads=False),
}
_AS_DECI = ("llama", "mistral", "qwen2")
"""Model types whose layers `deci` can compute."""


def has_dialect(model_type: str) -> bool:
    """Return whether llama.cpp has an architecture for this model type."""
    return model_type in _OWN


def states_unequal_layers(model: ElasticModel) -> bool:
    """Return whether llama.cpp has an architecture for this family with different widths per layer."""
    return model.config.model_type in _AS_DECI


def dialect_for(model: ElasticModel, subnet: Subnet) -> Dialect:
    """Return the architecture that can express `subnet`.

    Raises:
        ExportError: there is none, or the model has a feature that llama.cpp does not compute.
    """
    kind = model.config.model_type
    if kind not in _OWN:
        raise ExportError(
            f"{kind} has no GGUF export; these have one: {', '.join(_OWN)}. Export equal widths with --to hf, "
            "and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    refuse_odd_heads(model, subnet)
    dialect = _dialect(model, subnet)
    for feature in _foreign_features(model, dialect):
        raise ExportError(f"llama.cpp's {dialect.arch} architecture does not compute {feature}. Use --to hf.")
    return dialect


def _dialect(model: ElasticModel, subnet: Subnet) -> Dialect:
    own = _OWN[model.config.model_type]
    equal = subnet.is_uniform and min(subnet.neurons[0], subnet.kv_groups[0]) > 0
    if equal and (own.fewer_heads or subnet.kv_groups[0] == model.search_space.kv_groups[-1]):
        return own
    if not states_unequal_layers(model):
        raise ExportError(
            f"llama.cpp's {own.arch} architecture needs equal widths above 0 in all layers; got {subnet}. "
            "Pass --equal-widths, which picks equal widths of at most this cost, or --to hf."
        )
    return DECI


def _foreign_features(model: ElasticModel, dialect: Dialect) -> list[str]:
    """Return the features of this model that its architecture in llama.cpp does not compute."""
    config, missing = model.config, []
    if config.model_type == "gpt2":
        if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            missing.append(f"activation_function={config.activation_function}")
        if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            missing.append("attention scores that are not scaled by the root of the head size")
        return missing
    if config.model_type == "qwen3" and config.attention_bias:
        missing.append("attention_bias")
    if config.hidden_act != "silu":
        missing.append(f"hidden_act={config.hidden_act}")
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1) != 1:
        missing.append(f"partial_rotary_factor={rope['partial_rotary_factor']}")
    if _rotary(model).attention_scaling != 1 or (rope_factors(model) is not None and not dialect.scales_rope):
        missing.append(f"rope_type={rope['rope_type']}")
    return missing


def _rotary(model: ElasticModel) -> Any:
    return model.lm.model.rotary_emb


def rope_factors(model: ElasticModel) -> torch.Tensor | None:
    """Return the divisors of the plain rotary frequencies, [head size / 2], or None if frequencies are plain."""
    plain = model.config.rope_parameters["rope_theta"] ** -torch.linspace(0, 1, head_size(model) // 2 + 1)[:-1]
    factors = plain / _rotary(model).inv_freq.cpu()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors


def head_size(model: ElasticModel) -> int:
    """Return the size of one attention head."""
    attention = model.layers[0].attention
    return attention.closing_size // (attention.width.full * attention.heads_per_unit)


@dataclass(frozen=True)
class LayerWritten:
    """Sizes of a layer in the file, where zeros may stand in for a sub-layer that the sub-network lacks."""

    neurons: int
    heads: int
    kv_heads: int
    zero_mlp: bool
    """Whether the MLP is all zeros."""
    zero_attention: bool
    """Whether the attention is all zeros."""

    @property
    def pads(self) -> bool:
        """Whether the layer has a sub-layer of zeros."""
        return self.zero_mlp or self.zero_attention


def layers_written(model: ElasticModel, subnet: Subnet, dialect: Dialect, block: int) -> list[LayerWritten]:
    """Return the layers in the file, with sub-layers of zeros where llama.cpp's `deci` needs one.

    `deci` skips the attention too if a layer has no MLP, cannot skip the last layer, and takes the head size from the
    first layer. Such layers get an MLP of `block` zero neurons, and the first layer gets one zero head.
    """
    per_group, last, written = model.layers[0].attention.heads_per_unit, subnet.layers - 1, []
    for layer, (neurons, groups) in enumerate(zip(subnet.neurons, subnet.kv_groups, strict=True)):
        zero_attention = dialect is DECI and layer == 0 and not groups
        zero_mlp = dialect is DECI and not neurons and (groups > 0 or layer in (0, last))
        heads = 1 if zero_attention else groups * per_group
        kv_heads = 1 if zero_attention else groups
        written.append(LayerWritten(block if zero_mlp else neurons, heads, kv_heads, zero_mlp, zero_attention))
    return written


def context_length(model: ElasticModel) -> int:
    """Return the longest context in tokens for which the file is exact; it has no sliding windows."""
    config = model.config
    windows = [config.max_position_embeddings]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        windows.append(getattr(config, "sliding_window", None) or windows[0])
    return int(min(windows))


def add_sizes(writer: Any, model: ElasticModel, dialect: Dialect, layers: list[LayerWritten]) -> None:
    """Write the sizes to a `GGUFWriter`: one value for all layers, or for `deci` one per layer."""
    config = model.config

    def sizes(axis: str) -> Any:
        per_layer = [getattr(layer, axis) for layer in layers]
        return per_layer if dialect is DECI else per_layer[0]

    writer.add_context_length(context_length(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(sizes("neurons"))
    writer.add_head_count(sizes("heads"))
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(sizes("kv_heads"))
    writer.add_key_length(head_size(model))
    writer.add_value_length(head_size(model))
    writer.add_rope_dimension_count(head_size(model))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def gguf_tensors(
    model: ElasticModel, subnet: Subnet, dialect: Dialect, layers: list[LayerWritten]
) -> dict[str, torch.Tensor]:
    """Return GGUF name -> weight of `subnet`, [out, in].

    Weights are views of the model's, except Q and K if their rows are reordered.

    Raises:
        ExportError: the architecture has no name for a weight.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == dialect.arch)
    names = gguf.get_tensor_name_map(arch, subnet.layers)
    state = cut_state(model, subnet)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = {}
    for key, weight in state.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"llama.cpp's {dialect.arch} architecture has no place for {key}. Use --to hf.")
        tensors[name] = _in_gguf_layout(model, key, weight, dialect)
    if dialect is DECI:
        _fit_to_deci(tensors, layers, head_size(model))
    if dialect.scales_rope and (factors := rope_factors(model)) is not None:
        tensors[ROPE_TENSOR] = factors
    return tensors


def _in_gguf_layout(model: ElasticModel, key: str, weight: torch.Tensor, dialect: Dialect) -> torch.Tensor:
    if weight.ndim == 2 and isinstance(model.lm.get_submodule(key.rpartition(".")[0]), Conv1D):
        return weight.t()
    if dialect.pairs_neighbours and (".q_proj." in key or ".k_proj." in key):
        halves = weight.reshape(-1, 2, head_size(model) // 2, *weight.shape[1:])  # [H, 2, head size / 2, ...]
        return halves.transpose(1, 2).reshape(weight.shape)
    return weight


def _fit_to_deci(tensors: dict[str, torch.Tensor], layers: list[LayerWritten], head_size: int) -> None:
    """Delete the norms of missing sub-layers, and add the zeros that `layers_written` asks for."""
    embedding = tensors["token_embd.weight"]

    def add_zeros(layer: int, rows: int, opens: tuple[str, ...], closes: str) -> None:
        zeros = embedding.new_zeros(rows, embedding.shape[1])
        for name in opens:
            tensors[f"blk.{layer}.{name}.weight"] = zeros
        tensors[f"blk.{layer}.{closes}.weight"] = zeros.t()

    for index, layer in enumerate(layers):
        if layer.zero_attention:
            add_zeros(index, head_size, ("attn_q", "attn_k", "attn_v"), "attn_output")
        elif not layer.heads:
            del tensors[f"blk.{index}.attn_norm.weight"]
        if layer.zero_mlp:
            add_zeros(index, layer.neurons, ("ffn_gate", "ffn_up"), "ffn_down")
        elif not layer.neurons:
            del tensors[f"blk.{index}.ffn_norm.weight"]
