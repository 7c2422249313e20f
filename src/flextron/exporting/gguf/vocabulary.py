"""A byte-level BPE tokenizer in a GGUF file's metadata, as llama.cpp reads it."""

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
"""What a tokenizer splits text by before its merges -> llama.cpp's name for it."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase | None, size: int, end: int | None) -> None:
    """Write a tokenizer's tokens, merges, special tokens and chat template to a `GGUFWriter`.

    Args:
        size: rows of the model's embedding; those without a token are written as unused.
        end: the model's token that ends a text, where the tokenizer has none.

    Raises:
        ExportError: no tokenizer, or one that is not a byte-level BPE with a split that llama.cpp knows.
    """
    if tokenizer is None:
        raise ExportError("a GGUF file needs a tokenizer, and this checkpoint has none. Use --to hf.")
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
        raise ExportError("neither tokenizer nor config name the token that ends a text. Set tokenizer.eos_token.")
    starts = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends
    writer.add_eos_token_id(ends)
    writer.add_bos_token_id(starts)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [starts])
    writer.add_add_space_prefix(False)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _bpe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer.json says, of a byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"a {type(tokenizer).__name__} of kind {model.get('type')} is not a byte-level BPE, "
            "the only tokenizer that can be written to a GGUF file. Use --to hf."
        )
    return data


def _pre_tokenizer(data: dict[str, Any]) -> str:
    stage = data["pre_tokenizer"] or {}
    stages = stage.get("pretokenizers", [stage])
    parts = tuple(_part(stage) for stage in stages if stage.get("use_regex", True))
    if parts not in PRE_TOKENIZERS:
        raise ExportError(
            f"llama.cpp's name for a tokenizer that splits text by {' and '.join(map(repr, parts))} is not known here; "
            f"known are {', '.join(PRE_TOKENIZERS.values())}. Use --to hf."
        )
    return PRE_TOKENIZERS[parts]


def _part(stage: dict[str, Any]) -> str:
    kind = str(stage.get("type"))
    if kind == "Split":
        return str(stage["pattern"].get("Regex"))
    return kind if kind != "Digits" or stage["individual_digits"] else "Digits in groups"


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and type of each of `size` tokens."""
    texts, types = [f"[PAD{place}]" for place in range(size)], [_UNUSED] * size
    known = [(place, text, _NORMAL) for text, place in data["model"]["vocab"].items()]
    known += [
        (token["id"], token["content"], _CONTROL if token["special"] else _USER_DEFINED)
        for token in data["added_tokens"]
    ]
    for place, text, kind in known:
        if place >= size:
            raise ExportError(f"token {text!r} is number {place}, but the model's embedding has {size} rows.")
        texts[place], types[place] = text, kind
    return texts, types
