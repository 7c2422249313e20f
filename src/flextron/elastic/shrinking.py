"""A small random copy of any decoder: the same code and kinds of layers, a few thousand weights, made in milliseconds.

Discovery tries its guesses on such a copy, because a wrong guess shows there as clearly as on the real weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

HIDDEN = 64
HEADS = 4
LEAST_LAYERS = 3
VOCABULARY = 128
MOST_WEIGHTS = 5_000_000
"""A copy that stays larger than this has sizes that the table below does not know."""
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "index_head_dim", "attention_head_dim"), HIDDEN // HEADS),
    **dict.fromkeys(
        (
            "intermediate_size",
            "n_inner",
            "ffn_dim",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "block_ff_dim",
        ),
        96,
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(
        (
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        ),
        40,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "max_seq_len", "context_length"), 128
    ),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    "hidden_size_per_layer_input": 8,
    "dim_model_base": 16,
    "query_pre_attn_scalar": 16,
    "block_size": 8,
    "block_multiple_of": 32,
    "laurel_rank": 8,
}
"""The size that a config field gets in the copy, whatever it was; fields that a config lacks stay away."""
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "residual_multiplier")
_DERIVED = ("n_inner",)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_KEPT_ROPE = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")


def small_copy(config: Any, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in float32 of the architecture of `config`, with few and small layers of every kind that it has.

    Every parameter is random, norms and biases too, so that two computations that differ show it.

    Args:
        changes: config fields to set after shrinking.

    Raises:
        Exception: of many types, where the architecture cannot be this small.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = small_config(config, **changes)
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(small).num_parameters()
        if weights > MOST_WEIGHTS:
            raise ValueError(f"the smallest model of this architecture has {weights:,} weights")
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation="eager")
        _randomize(lm)
    return lm.eval()


def small_config(config: Any, **changes: Any) -> Any:
    """The config of `small_copy`."""
    fields = config.to_dict()
    fields.pop("model_type", None)
    small = {key: _small(key, value) for key, value in fields.items()}
    small |= _groups(fields) | _layers(fields) | _tokens(fields) | changes
    return type(config).from_dict(copy.deepcopy(small))


def _small(key: str, value: Any) -> Any:
    if key in _SIZES and type(value) is int and value > 0:
        return min(value, _SIZES[key])
    if key in _SCALES and value == 1:  # so that code which forgets them shows it
        return 0.5
    if key in _DERIVED and value is None:  # from the hidden size, as it is in no config that names it
        return _SIZES[key]
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return _plain_rope(value)
    return value


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings without scaling, whose tables have lengths of their own."""
    if any(isinstance(value, Mapping) for value in rope.values()):  # one for each kind of layer
        return {kind: _plain_rope(value) if isinstance(value, Mapping) else value for kind, value in rope.items()}
    return {"rope_type": "default", **{key: rope[key] for key in _KEPT_ROPE if key in rope}}


def _groups(fields: Mapping[str, Any]) -> dict[str, int]:
    """As many key/value heads as query heads, half as many, or one, as in the original."""
    heads = next((fields[key] for key in ("num_attention_heads", "n_head") if fields.get(key)), None)
    found = {key: fields[key] for key in _GROUPS if isinstance(fields.get(key), int)}
    return {key: HEADS if value == heads else min(value, HEADS // 2) for key, value in found.items()}


def _layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest layers, from LEAST_LAYERS up, with every kind that the per-layer lists name."""
    count = next((fields[key] for key in _LAYERS if isinstance(fields.get(key), int)), None)
    if count is None:
        return {}
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == count > 1}
    chosen: dict[str, int] = {}
    for index in range(count):
        chosen.setdefault(repr([value[index] for value in lists.values()]), index)
    picked = sorted(chosen.values())
    picked = sorted([*picked, *[index for index in range(count) if index not in picked][: LEAST_LAYERS - len(picked)]])
    per_layer = fields.get("per_layer_config") or {}
    of_layer = {places: per_layer[key] for places, index in enumerate(picked) for key in per_layer if int(key) == index}
    return {
        **({"per_layer_config": of_layer} if per_layer else {}),
        **{key: len(picked) for key in _LAYERS if isinstance(fields.get(key), int)},
        **{key: [value[index] for index in picked] for key, value in lists.items()},
    }


def _tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens inside the small vocabulary."""
    return {key: _inside(value) for key, value in fields.items() if key.endswith("_token_id")}


def _inside(token: Any) -> Any:
    if isinstance(token, list):
        return [_inside(each) for each in token]
    return min(token, VOCABULARY - 1) if isinstance(token, int) else token


def _randomize(lm: PreTrainedModel) -> None:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                parameter.copy_(noise * (0.5 if "emb" in name or "wte" in name else parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(0.3 * noise)


@contextmanager
def quiet() -> Iterator[None]:
    """No notices and bars of transformers inside the block; they would be about the small copy."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
