"""`Decoder`: fast decoding on a CPU, token by token, in a loop of our own.

The prompt goes through transformers' own forward pass; each new token through a `LeanStep`, whose limit is the speed at
which memory gives the weights. `Decoder.steps` computes several tokens in one pass over the weights.

Shapes: T time, S tokens of one pass, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flextron.elastic.model import ElasticModel
from flextron.inference.lean.room import Places
from flextron.inference.lean.step import MOST_TOKENS, LeanStep
from flextron.subnet import Subnet


def supports(model: ElasticModel) -> bool:
    """Return whether `Decoder` computes what this model computes.

    True on a CPU, in float32 or bfloat16 and without adapters, for models with the modules of Llama, such as Mistral,
    Qwen2, Qwen3, SmolLM3 and Granite: `LeanStep.of` tries them.
    """
    return LeanStep.of(model) is not None


class Decoder:
    """Decodes one text with one sub-network on a CPU. It holds views of the model's weights."""

    @torch.inference_mode()
    def __init__(self, model: ElasticModel, subnet: Subnet, *, max_tokens: int) -> None:
        """Prepare `subnet` for a text of at most `max_tokens`, including the prompt.

        Raises:
            ValueError: `supports` refuses the model.
            SubnetError: `subnet` is not in the model's search space.
        """
        model.search_space.check(subnet)
        step = LeanStep.of(model)
        if step is None:
            raise ValueError(
                f"fast decoding does not support this {type(model.lm).__name__}. Use the model's own generate."
            )
        self.model, self.subnet, self.max_tokens = model, subnet, max_tokens
        self.position = 0
        """Number of tokens seen, which is the position of the next one."""
        self._step = step
        self._caches = [step.new_cache(max_tokens if groups else 0, groups) for groups in subnet.kv_groups]
        self._neurons_L1, self._groups_L1 = (
            np.array(widths, np.int64)[:, None] for widths in (subnet.neurons, subnet.kv_groups)
        )

    @torch.inference_mode()
    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Start a new text with the prompt [1, T] and return the logits [V] of the next token.

        The prompt runs through transformers' own forward pass.

        Raises:
            ValueError: more than one row, or more tokens than `max_tokens`.
        """
        rows, time = tokens_BT.shape
        if rows != 1:
            raise ValueError(f"got {rows} prompts; a Decoder takes one. Use the model's own generate.")
        self._check_room(time)
        with self.model.use(self.subnet):
            output = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        for written, cache in zip(output.past_key_values.layers, self._caches, strict=True):
            if len(cache):
                last = slice(time - written.keys.shape[2], time)  # all, or those of a sliding window
                for part, states in enumerate((written.keys, written.values)):
                    cache[last, part] = states[0].transpose(0, 1)
        self.position = time
        logits_V: torch.Tensor = output.logits[0, -1]
        return logits_V

    def step(self, token: int) -> torch.Tensor:
        """Return the logits [V] of the token after `token`.

        Raises:
            ValueError: the text already has `max_tokens`.
        """
        return self.steps([token])[0]

    def steps(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of several tokens, [S, V], in one pass over the weights for each 16 of them.

        Raises:
            ValueError: no tokens, or more than fit into `max_tokens`.
        """
        if not tokens:
            raise ValueError("got no tokens; give one or more.")
        self._check_room(self.position + len(tokens))
        return torch.cat([self._pass(tokens[i : i + MOST_TOKENS]) for i in range(0, len(tokens), MOST_TOKENS)])

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens.

        Raises:
            ValueError: `tokens` is negative, or more than were seen.
        """
        if not 0 <= tokens <= self.position:
            raise ValueError(f"cannot go back to {tokens} tokens; {self.position} were seen.")
        self.position = tokens

    @torch.inference_mode()
    def pretend(self, tokens: int) -> None:
        """Continue as after `tokens` tokens, with zero keys and values, to time a step without a real text.

        Raises:
            ValueError: `tokens` is not below `max_tokens`.
        """
        self._check_room(tokens + 1)
        if self.position < tokens:
            for cache in self._caches:
                cache.zero_()  # memory never written to is a single page of zeros, so it reads faster than a real cache
        self.position = tokens

    def _pass(self, tokens: Sequence[int]) -> torch.Tensor:
        count, slots = len(tokens), range(self.position, self.position + len(tokens))
        places = Places(slots, slots, [[0]] * count, self.max_tokens)
        widths = (self._neurons_L1.repeat(count, 1), self._groups_L1.repeat(count, 1))
        logits_SV = self._step.logits(tokens, places, self._caches, *widths, self.subnet.kv_groups, range(count))
        self.position += count
        return logits_SV

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise ValueError(
                f"{tokens} tokens do not fit into a Decoder made for {self.max_tokens}. Make one with more max_tokens."
            )
