"""From a checked request to requests of the engine: prompts as tokens, budgets as levels, schemas as constraints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flextron.data.blocks import document_start
from flextron.serving.api.asking import Ask, Prompt
from flextron.serving.api.grammar import Grammars
from flextron.serving.api.options import Options
from flextron.serving.api.refusal import ApiError
from flextron.serving.api.wishes import Grant, grant
from flextron.serving.engine import Engine, Phase, Request, Sampling

COMPLETION_TOKENS = 16
"""Tokens of a completion that names no number, as in OpenAI's API."""


class Preparing:
    """Turns each checked request into requests of the engine. It may take a while: call it outside the event loop."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        self._start = document_start(tokenizer)
        self._grammars = Grammars(tokenizer, options.stop_tokens, options.vocabulary)

    def prepare(self, ask: Ask, name: str) -> list[tuple[Request, Grant]]:
        """Return one request for each choice, those of the first prompt first.

        Raises:
            ApiError: 400, a prompt or a budget that does not fit, or a schema that cannot be followed.
        """
        prompts = [self._chat(ask)] if ask.kind == "chat" else [self._tokens(prompt) for prompt in ask.prompts]
        found: list[tuple[Request, Grant]] = []
        for prompt in prompts:
            for place in range(ask.n):
                granted = grant(ask.asked, self._options.policy, self._engine.levels, len(prompt))
                found.append((self._request(ask, f"{name}-{len(found)}", prompt, granted, place), granted))
        return found

    def _request(self, ask: Ask, name: str, prompt: tuple[int, ...], granted: Grant, place: int) -> Request:
        stop = frozenset() if ask.ignore_eos else self._options.stop_tokens
        return Request(
            name,
            prompt,
            self._room(ask, len(prompt)),
            granted.level,
            granted.floor,
            _own_seed(ask.sampling, place),
            stop | frozenset(ask.stop_token_ids),
            granted.ttft_ms,
            granted.tpot_ms,
            granted.strict,
            None if ask.schema is None else self._grammars.of_schema(ask.schema),
            self._phase(granted),
        )

    def _phase(self, granted: Grant) -> Phase | None:
        if granted.answer is None:
            return None
        after = self._tokenizer(granted.after, add_special_tokens=False)["input_ids"]
        return Phase(tuple(after), granted.answer, granted.answer_floor)

    def _room(self, ask: Ask, prompt: int) -> int:
        """Return how many tokens an answer may have."""
        most = self._engine.max_length - 1
        most = min(most, self._options.limits.prompt_tokens or most)
        if prompt > most:
            raise _too_long(f"the prompt has {prompt} tokens; this server reads at most {most}. Shorten it.")
        left = self._engine.max_length - prompt
        if ask.max_tokens is None:
            return min(left, self._options.limits.new_tokens if ask.kind == "chat" else COMPLETION_TOKENS)
        if ask.max_tokens > left:
            raise _too_long(
                f"the prompt's {prompt} tokens and max_tokens={ask.max_tokens} are more than the "
                f"{self._engine.max_length} that this server holds. Ask for at most {left} new tokens."
            )
        return ask.max_tokens

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        return self._encoded(prompt, self._start)

    def _chat(self, ask: Ask) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(ask.messages), tokenize=False, add_generation_prompt=True, **ask.template
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise ApiError(
                f"the model's chat template takes no such messages: {error}.",
                param="messages",
                code="chat_template_refused",
            ) from None
        return self._encoded(str(text), [])

    def _encoded(self, text: str, start: Sequence[int]) -> tuple[int, ...]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ApiError("the prompt is empty; give some text to go on from.", param="prompt", code="empty_prompt")
        return (*start, *ids)


def _own_seed(sampling: Sampling, place: int) -> Sampling:
    """Give each of n texts a seed of its own, which the request's seed determines."""
    if sampling.seed is None or not place:
        return sampling
    return replace(sampling, seed=(sampling.seed + place) % 2**63)


def _too_long(message: str) -> ApiError:
    return ApiError(message, param="messages", code="context_length_exceeded")


def new_name(kind: str) -> str:
    """Return an identifier for an answer."""
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid4().hex}"
