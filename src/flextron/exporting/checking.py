"""Shared parts of export checks: a real text, and a model without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedTokenizerBase

from flextron.data.blocks import pieces

_CHARACTERS_PER_TOKEN = 16
"""Above the average of any tokenizer, so that the text has enough tokens."""


def real_text(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[str, list[int]]:
    """Return the beginning of the sample's text, and its first `count` tokens."""
    text = ""
    for piece in pieces("sample/validation"):
        text += piece.text
        if len(text) >= _CHARACTERS_PER_TOKEN * count:
            break
    text = text[: _CHARACTERS_PER_TOKEN * count]
    return text, tokenizer(text, add_special_tokens=False).input_ids[:count]


@contextmanager
def evaluating(lm: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block."""
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)
