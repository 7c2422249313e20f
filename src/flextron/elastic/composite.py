"""The text model inside a multimodal checkpoint, which loads as a decoder of its own; the other towers are left out."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

_LIKE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models that compute what a decoder of another type does, as long as there are no images."""
_KEYS = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
    r"^model\.text_model\.": "model.",
}
"""What multimodal checkpoints call the weights of their text model, and what the decoder calls them."""
_TEXT = re.compile(r"(^|\.)language_model\.|^model\.(text_model|layers|embed_tokens|norm)\.|^lm_head\.")


def text_options(config: Any) -> dict[str, Any]:
    """Options of `from_pretrained` that load the text model of a multimodal config; empty for any other config."""
    if "text_config" not in config.sub_configs:
        return {}
    text = config.get_text_config(decoder=True)
    if text.model_type in _LIKE:
        text = _as(text, _LIKE[text.model_type])
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or text is config:
        return {}
    text.tie_word_embeddings = bool(
        getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)
    )
    return {"config": text, "key_mapping": _KEYS}


def is_of_text(key: str) -> bool:
    """Whether a weight of a multimodal checkpoint is one of its text model."""
    return _TEXT.search(key) is not None


def _as(text: Any, model_type: str) -> Any:
    """The config of the decoder that computes the same. Without images, all three of its rotary positions are one."""
    kind = CONFIG_MAPPING[model_type]
    fields = {key: value for key, value in text.to_dict().items() if hasattr(kind(), key) and key != "model_type"}
    rope = dict(fields.get("rope_parameters") or {})
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    if kept.get("rope_type") in ("mrope", None):
        kept["rope_type"] = "default"
    return kind.from_dict({**fields, "rope_parameters": kept})
