"""Answers in OpenAI's shape: whole ones and the chunks of streams. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flextron.serving.api.asking import Ask
from flextron.serving.api.writing import Written
from flextron.serving.engine import Level

_FINGERPRINT = "flextron"


class TokenText(Protocol):
    """Gives the text of a token alone."""

    def __getitem__(self, token: int) -> str:
        """Return it."""


@dataclass
class Answer:
    """Writes the answer to one request, piece by piece or whole."""

    ask: Ask
    name: str
    levels: Sequence[Level]
    token_text: TokenText
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each text that have been sent, as log-probabilities of completions say them."""

    @property
    def _is_chat(self) -> bool:
        return self.ask.kind == "chat"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.ask.model,
            "system_fingerprint": _FINGERPRINT,
        }

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None = None) -> bytes:
        """Return an event of a stream."""
        whole = self._head("chat.completion.chunk" if self._is_chat else "text_completion") | {"choices": choices}
        return event(whole if usage is None else whole | {"usage": usage})

    def opening(self, texts: int) -> bytes:
        """Return the first event of a stream: who speaks. A completion has none."""
        if not self._is_chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self.chunk([self._choice(index, {"delta": delta}) for index in range(texts)])

    def piece(self, index: int, written: Sequence[Written]) -> dict[str, Any] | None:
        """Return the choice of a chunk that holds what was written; None where there is nothing to send."""
        text = "".join(each.text for each in written)
        if not text and self.ask.sampling.top_logprobs is None and not self.ask.show_levels:
            return None
        choice = self._choice(index, {"delta": {"content": text}} if self._is_chat else {"text": text})
        return choice | self._extras(index, written)

    def ending(self, index: int, reason: str) -> dict[str, Any]:
        """Return the choice of the chunk that ends a text."""
        return self._choice(index, {"delta": {}} if self._is_chat else {"text": ""}) | {"finish_reason": reason}

    def _choice(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": None}

    def _extras(self, index: int, written: Sequence[Written]) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.ask.sampling.top_logprobs is not None:
            extras["logprobs"] = self._chat_logprobs(written) if self._is_chat else self._logprobs(index, written)
        if self.ask.show_levels:
            names = [None if each.token is None else self.levels[each.token.level].name for each in written]
            extras["flextron"] = {"texts": [each.text for each in written], "levels": names}
        return extras

    def whole(self, texts: Sequence[tuple[Sequence[Written], str]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer that is not streamed; each text with its finish reason."""
        choices = []
        for index, (written, reason) in enumerate(texts):
            text = "".join(each.text for each in written)
            said = {"role": "assistant", "content": text, "refusal": None}
            choice = self._choice(index, {"message": said} if self._is_chat else {"text": text})
            choices.append(choice | {"finish_reason": reason} | self._extras(index, written))
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage}

    def _chat_logprobs(self, written: Sequence[Written]) -> dict[str, Any]:
        content = []
        for token in (each.token for each in written if each.token is not None):
            top = [self._alternative(*each) for each in token.top[: self.ask.sampling.top_logprobs]]
            content.append(self._alternative(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _alternative(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text[token]
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _logprobs(self, index: int, written: Sequence[Written]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in written:
            if each.token is not None:
                top = each.token.top[: self.ask.sampling.top_logprobs]
                found["tokens"].append(self.token_text[each.token.id])
                found["token_logprobs"].append(_finite(each.token.logprob))
                found["top_logprobs"].append({self.token_text[token]: _finite(logprob) for token, logprob in top})
                found["text_offset"].append(self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + len(each.text)
        return found


def _finite(logprob: float | None) -> float | None:
    """Return a number that JSON has; OpenAI's own lowest one stands for minus infinity."""
    return logprob if logprob is None else max(logprob, -9999.0)


def event(value: Mapping[str, Any]) -> bytes:
    """Return a value as an event of a stream."""
    return f"data: {to_json(value)}\n\n".encode()


def to_json(value: Any) -> str:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def headers_of(usage: Mapping[str, Any]) -> dict[str, str]:
    """Return what `usage.flextron` says, as headers."""
    report: Mapping[str, Any] = usage["flextron"]
    found = {
        "x-flextron-asked": report["asked"],
        "x-flextron-level": report["level"],
        "x-flextron-levels": ",".join(f"{name}={tokens}" for name, tokens in report["levels"].items()),
    }
    for name in ("ttft_ms", "tpot_ms", "queue_ms"):
        if report[name] is not None:
            found[f"x-flextron-{name.replace('_', '-')}"] = f"{report[name]:.3f}"
    for name, met in report["met"].items():
        if met is not None:
            found[f"x-flextron-met-{name}"] = str(met).lower()
    return found
