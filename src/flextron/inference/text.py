"""Tokens into text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_CUT_OFF = "\ufffd"
"""What a character looks like of which some bytes are missing."""


def text_pieces(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, which follow the tokens `before`, as they come; special tokens have none.

    Together the pieces are what `before` and `tokens` decode to, less what `before` alone does: a leading space stays,
    which a tokenizer may drop at the start of a text. A character that is cut off waits for its other bytes.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    context = list(before)
    known, new = decode(context), []
    for token in tokens:
        new.append(token)
        text = decode(context + new)
        if len(text) > len(known) and not text.endswith(_CUT_OFF):
            yield text[len(known) :]
            context, known, new = new, decode(new), []  # a few tokens are context enough
    if rest := decode(context + new)[len(known) :]:
        yield rest
