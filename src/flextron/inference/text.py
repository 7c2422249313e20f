"""Tokens into text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_CUT_OFF = "\ufffd"
"""What a character looks like of which some bytes are missing."""
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, so that the last four tokens hold all of one that is cut off."""
_MOST_PENDING = 16
"""Tokens without text that are decoded again with each further one."""


class Pieces:
    """The text of tokens that come one by one; special tokens have none. The time of a token depends on no length.

    Together the pieces are what `before` and the tokens decode to, less what `before` alone does: a leading space
    stays, which a tokenizer may drop at the start of a text. A character that is cut off waits for its other bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(before)
        self._known = len(self._decode(self._context))
        """Characters of the text of context and new tokens that have been given."""
        self._new: list[int] = []

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def push(self, token: int) -> str:
        """Take a token and return the text that is new, often its own."""
        self._new.append(token)
        text = self._decode(self._context + self._new)
        if len(text) > self._known and not text.endswith(_CUT_OFF):
            piece = text[self._known :]
            self._context, self._new = self._new, []  # a few tokens are context enough
            self._known = len(self._decode(self._context))
            return piece
        return self._shorten(text) if len(self._new) >= _MOST_PENDING else ""

    def _shorten(self, text: str) -> str:
        """Give what is certain of a long run of broken characters, and forget tokens that have no text."""
        if len(text) <= self._known:
            self._new = []
            return ""
        broken = min(len(text) - self._known, len(text) - len(text.rstrip(_CUT_OFF)), _LONGEST_CHARACTER - 1)
        piece = text[self._known : len(text) - broken]
        self._context, self._new = self._new[-_LONGEST_CHARACTER:], []
        self._known = max(0, len(self._decode(self._context)) - broken)
        return piece

    def rest(self) -> str:
        """Return what is left when no token follows: a character that stays cut off."""
        return self._decode(self._context + self._new)[self._known :]


def text_pieces(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, which follow the tokens `before`, as they come, in the pieces of `Pieces`."""
    pieces = Pieces(tokenizer, before)
    for token in tokens:
        if piece := pieces.push(token):
            yield piece
    if rest := pieces.rest():
        yield rest
