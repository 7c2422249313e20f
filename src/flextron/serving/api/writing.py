"""`Writer`: tokens of one answer into pieces of text that can be sent, with stop strings found and never shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flextron.inference.text import Pieces
from flextron.serving.engine import Token

_LEAST_CONTEXT = 16
"""Tokens of the prompt before an answer that decide how its first tokens are written."""


@dataclass(frozen=True)
class Written:
    """A token with the text that came with it. The texts of all tokens make the answer."""

    token: Token | None
    """None where text is left over at the end, such as a character that stays cut off."""
    text: str


class Writer:
    """Writes one answer. Text that could be the beginning of a stop string waits until it is clear."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._pieces = Pieces(tokenizer, _context(tokenizer, prompt))
        self._stop = tuple(stop)
        self._held: list[Written] = []
        self.stopped = False
        """Whether a stop string came; what follows it has no text."""

    def push(self, token: Token) -> list[Written]:
        """Take a token and return what can be sent now."""
        if self.stopped:
            return []
        return self._take(Written(token, self._pieces.push(token.id)))

    def end(self) -> list[Written]:
        """Return what has waited, when no token follows."""
        if self.stopped:
            return []
        rest = self._pieces.rest()
        sent = self._take(Written(None, rest)) if rest else []
        held, self._held = self._held, []
        return sent if self.stopped else [*sent, *held]

    def _take(self, written: Written) -> list[Written]:
        if not self._stop:
            return [written]
        self._held.append(written)
        text = "".join(each.text for each in self._held)
        found = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            return self._cut(found)
        return self._release(len(text) - self._begun(text))

    def _begun(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )

    def _release(self, characters: int) -> list[Written]:
        """Return the first tokens whose text ends within so many characters."""
        end, count = 0, 0
        for count, written in enumerate(self._held):  # noqa: B007 - as far as it gets
            end += len(written.text)
            if end > characters:
                break
        else:
            count = len(self._held)
        sent, self._held = self._held[:count], self._held[count:]
        return sent

    def _cut(self, characters: int) -> list[Written]:
        """Return the tokens of the first characters, the last of them shortened, and drop the others."""
        sent = []
        for written in self._held:
            if characters <= 0:
                break
            sent.append(Written(written.token, written.text[:characters]))
            characters -= len(written.text)
        self._held = []
        return sent


def _context(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> Sequence[int]:
    """Return the last tokens of a prompt, as many as have any text."""
    size = _LEAST_CONTEXT
    while size < len(prompt) and not tokenizer.decode(prompt[-size:], skip_special_tokens=True):
        size *= 2
    return prompt[-size:]


class TokenTexts:
    """The text of single tokens, as log-probabilities report them; each is found once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Return the text with its leading space, which some tokenizers drop at the start of a text."""
        if token not in self._known:
            once, twice = (str(self._tokenizer.decode([token] * times)) for times in (1, 2))
            self._known[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._known[token]
