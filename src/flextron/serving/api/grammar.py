"""Answers that follow a JSON schema, by llguidance: which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flextron.serving.api.refusal import ApiError


class Grammars:
    """Makes the constraints of requests; all share one view of the tokenizer, made when the first one is asked for."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int], vocabulary: int | None = None
    ) -> None:
        self._tokenizer, self._stop = tokenizer, sorted(stop_tokens)
        self._vocabulary = vocabulary or len(tokenizer)

    @cached_property
    def _view(self) -> Any:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ApiError(
                'this server has no llguidance; install "flextron[serve]", or leave out response_format.',
                param="response_format",
                code="unsupported_parameter",
            ) from None
        try:
            size = max(self._vocabulary, len(self._tokenizer))
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._stop or None)
        except ValueError as error:
            raise ApiError(
                f"this model's tokenizer takes no response_format: {error}.",
                param="response_format",
                code="unsupported_parameter",
            ) from None

    def of_schema(self, schema: Mapping[str, Any]) -> SchemaConstraint:
        """Return what lets only such an answer through. It takes a second the first time.

        Raises:
            ApiError: 400, the schema is none, or uses what llguidance does not know.
        """
        view = self._view
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(view, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
            message = matcher.get_error()
        except ValueError as error:
            message = str(error)
        if message:
            raise ApiError(
                f"response_format.json_schema.schema cannot be followed: {message}.",
                param="response_format",
                code="invalid_schema",
            )
        return SchemaConstraint(matcher, self._vocabulary)


class SchemaConstraint:
    """A `flextron.serving.engine.Constraint` that lets the tokens of JSON pass that follows a schema."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [V]; when the answer is whole, stop tokens only.

        Raises:
            RuntimeError: the grammar has failed, for example because it became too complex.
        """
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise RuntimeError(f"the answer can no longer follow its schema: {self._matcher.get_error()}")
        return mask[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Note the token that came."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
