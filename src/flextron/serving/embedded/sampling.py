"""The next token of one text, from its logits, as the request wants it.

In the order that vLLM and transformers have: bias and penalties, constraint, temperature, top-k, top-p, then the draw.
Log-probabilities are those of the model, before all of these.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from flextron.serving.engine import Constraint, Sampling


@dataclass(frozen=True)
class Drawn:
    """A token and what was asked to be told about it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one text. Its state outlives a preemption."""

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...], constraint: Constraint | None = None) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._counts: Counter[int] = Counter()
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        s = sampling
        self._penalised = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1)
        self.is_plain = not (self._penalised or s.temperature or s.logit_bias or constraint) and s.top_logprobs is None
        """Whether the likeliest token is all that is asked for."""

    @torch.inference_mode()
    def draw(self, logits_V: torch.Tensor) -> Drawn:
        """Draw a token from logits [V] in float32, which may be overwritten, and note it."""
        wanted = self._sampling.top_logprobs
        logprobs_V = None if wanted is None else logits_V.log_softmax(-1)
        token = self._choose(self._adjusted(logits_V.cpu()))
        self.note(token)
        if logprobs_V is None or wanted is None:
            return Drawn(token)
        values, ids = logprobs_V.topk(min(wanted, len(logprobs_V)))
        return Drawn(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def note(self, token: int) -> None:
        """Note a token that was drawn."""
        self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)

    def _adjusted(self, logits_V: torch.Tensor) -> torch.Tensor:
        s = self._sampling
        for token, bias in s.logit_bias.items():
            logits_V[token] += bias
        if self._penalised:
            self._penalise(logits_V)
        if self._constraint is not None:
            allowed_V = self._constraint.allowed()[: len(logits_V)]
            logits_V[: len(allowed_V)].masked_fill_(~allowed_V, -torch.inf)
            logits_V[len(allowed_V) :] = -torch.inf
        return logits_V

    def _penalise(self, logits_V: torch.Tensor) -> None:
        s = self._sampling
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._counts.keys()))
            values = logits_V[seen]
            logits_V[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if self._counts:
            written, times = (torch.tensor(list(numbers)) for numbers in (self._counts.keys(), self._counts.values()))
            logits_V[written] -= s.presence_penalty + s.frequency_penalty * times

    def _choose(self, logits_V: torch.Tensor) -> int:
        s = self._sampling
        if not s.temperature:
            return int(logits_V.argmax())
        logits_V = logits_V / s.temperature
        if 0 < s.top_k < len(logits_V):
            logits_V = logits_V.masked_fill(logits_V < logits_V.topk(s.top_k).values[-1], -torch.inf)
        if s.top_p < 1:
            ordered_V, order_V = logits_V.sort(descending=True)
            probabilities_V = ordered_V.softmax(-1)
            beyond_V = probabilities_V.cumsum(-1) - probabilities_V >= s.top_p  # the likeliest one always stays
            logits_V[order_V[beyond_V]] = -torch.inf
        return int(torch.multinomial(logits_V.softmax(-1), 1, generator=self._generator))
