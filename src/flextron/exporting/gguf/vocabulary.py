"""Write a byte-level BPE tokenizer into a GGUF file's metadata, as llama.cpp reads it."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.errors import ExportError

_GPT2_SPLIT = "ByteLevel"
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {
    (_GPT2_SPLIT,): "gpt-2",
    ("Digits", _GPT2_SPLIT): "smollm",
    (_QWEN2_SPLIT,): "qwen2",
    (_LLAMA3_SPLIT,): "llama-bpe",
}
"""The stages that split text before BPE merges -> llama.cpp's name for them."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase | None, size: int, end: int | None) -> None:
    """Write a tokenizer's tokens, merges, special tokens and chat template to a `GGUFWriter`.

    Args:
        size: number of rows in the model's embedding; rows without a token are written as unused.
        end: id of the model's end-of-text token, used if the tokenizer has none.

    Raises:
        ExportError: there is no tokenizer, it is not a byte-level BPE whose split llama.cpp knows, or there is no
            end-of-text token.
    """
    if tokenizer is None:
        raise ExportError("a GGUF file needs a tokenizer, but this checkpoint has none. Use --to hf.")
    data = _bpe(tokenizer)
    texts, types = _tokens(data, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(data))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else end
    if ends is None:
        raise ExportError("neither tokenizer nor config names the end-of-text token. Set tokenizer.eos_token.")
    starts = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends
    writer.add_eos_token_id(ends)
    writer.add_bos_token_id(starts)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [starts])
    writer.add_add_space_prefix(False)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    _add_chat_templates(writer, tokenizer.chat_template)


def _add_chat_templates(writer: Any, templates: str | dict[str, str] | None) -> None:
    """Write one chat template, or several by name, of which "default" is the one that llama.cpp takes by itself."""
    if isinstance(templates, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    elif templates:
        writer.add_chat_template(templates)


def _bpe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the contents of tokenizer.json, after checking that it is a byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"a GGUF file needs a byte-level BPE tokenizer; this one is a {type(tokenizer).__name__} of the type "
            f"{model.get('type')}. Use --to hf."
        )
    return data


def _pre_tokenizer(data: dict[str, Any]) -> str:
    stage = data["pre_tokenizer"] or {}
    stages = stage.get("pretokenizers", [stage])
    parts = tuple(_part(stage) for stage in stages if stage.get("use_regex", True))
    if parts not in PRE_TOKENIZERS:
        raise ExportError(
            f"the tokenizer splits text by {' and '.join(map(repr, parts))}, which matches none of llama.cpp's "
            f"pre-tokenizers {', '.join(PRE_TOKENIZERS.values())}. Use --to hf."
        )
    return PRE_TOKENIZERS[parts]


def _part(stage: dict[str, Any]) -> str:
    kind = str(stage.get("type"))
    if kind == "Split":
        return str(stage["pattern"].get("Regex"))
    return kind if kind != "Digits" or stage["individual_digits"] else "Digits in groups"


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the texts and types of `size` tokens."""
    texts, types = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    known = [(index, text, _NORMAL) for text, index in data["model"]["vocab"].items()]
    known += [
        (token["id"], token["content"], _CONTROL if token["special"] else _USER_DEFINED)
        for token in data["added_tokens"]
    ]
    for index, text, kind in known:
        if index >= size:
            raise ExportError(
                f"token {text!r} has the id {index}, but the model's embedding has {size} rows. "
                "Use the model's own tokenizer."
            )
        texts[index], types[index] = text, kind
    return texts, types
