"""Speculative decoding: a nested sub-network writes ahead, the model checks several tokens in one pass.

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding" (ICML 2023, arXiv 2211.17192),
for greedy text, where a drafted token stays if it is the model's own likeliest. Ours: the draft is a sub-network of the
model, so that both share one set of weights; each has a KV cache of its own.

Shapes: B batch (1), T time, S tokens of one pass, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from flextron.elastic.model import ElasticModel
from flextron.inference.background import generated_tokens
from flextron.inference.decoder import Decoder
from flextron.subnet import Subnet


@dataclass
class Draft:
    """A sub-network that writes ahead of a larger one, and what came of it; `flextron.generate` counts here."""

    subnet: Subnet
    tokens: int = 4
    """Tokens to write ahead at most, before the larger one checks them."""
    passes: int = 0
    """Of the larger one over drafted tokens; each gives one token more than it accepts."""
    drafted: int = 0
    """Tokens written ahead."""
    accepted: int = 0
    """Of these, tokens that became text."""
    written: int = 0
    """Tokens of text."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a draft of {self.tokens} tokens; write 1 or more ahead.")

    @property
    def acceptance(self) -> float:
        """Part of the drafted tokens that became text; 0 before there are any."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of text for each pass of the larger one over drafted tokens."""
        return 1 + self.accepted / max(1, self.passes)

    def __str__(self) -> str:
        return (
            f"accepted {self.accepted} of {self.drafted} drafted tokens ({self.acceptance:.0%}), "
            f"{self.tokens_per_pass:.2f} tokens a pass"
        )

    def check(self, model: ElasticModel, subnet: Subnet) -> None:
        """Pass if `model` has the draft's sub-network, and it is smaller than `subnet`, which it writes ahead of.

        Raises:
            SubnetError: not in the search space of the model.
            ValueError: not smaller.
        """
        model.search_space.check(self.subnet)
        if model.layer_weights(self.subnet) >= model.layer_weights(subnet):
            raise ValueError(
                f"the draft keeps {model.share(self.subnet):.1%} of the layers' weights, and the sub-network that it "
                f"writes ahead of {model.share(subnet):.1%}; name a smaller draft."
            )


def draft_model(model: ElasticModel, subnet: Subnet) -> PreTrainedModel:
    """`subnet` as a transformers model of its own, such as for assisted generation; its weights are those of `model`.

        model.generate(input_ids, assistant_model=draft_model(model, subnet), do_sample=False)

    Its modules are the model's own, narrowed while its forward pass runs: call it in the thread that runs the model.

    Raises:
        SubnetError: not in the search space of this model.
    """
    model.search_space.check(subnet)
    draft: Any = copy.copy(model.lm)  # another object with the same modules
    draft.generation_config = copy.deepcopy(model.lm.generation_config)

    @wraps(model.lm.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with model.use(subnet):
            return model.lm.forward(*args, **kwargs)

    draft.forward = forward
    return draft


def assisted_tokens(
    model: ElasticModel, subnet: Subnet, draft: Draft, prompt_BT: torch.Tensor, **options: Any
) -> Generator[int, None, None]:
    """Greedy tokens after the prompt [1, T] by transformers' assisted generation, for every family.

    `options` go to its `generate`, such as `max_new_tokens`.

    Raises:
        ValueError: a draft that is not smaller than `subnet`, or more than one prompt.
    """
    _check(model, subnet, draft, prompt_BT)
    before, written = draft.passes, 0

    def count_pass(tokens_BT: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # asked after every pass
        draft.passes += 1
        return tokens_BT.new_zeros(1, dtype=torch.bool)

    coming = generated_tokens(
        draft_model(model, subnet).generate,
        prompt_BT,
        assistant_model=_assistant(model, draft),
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([count_pass]),
        **options,
    )
    try:
        with closing(coming):
            for token in coming:
                written += 1
                yield token
    finally:
        draft.accepted += written - (draft.passes - before)
        draft.written += written


def _assistant(model: ElasticModel, draft: Draft) -> PreTrainedModel:
    """The draft as transformers' assistant, which counts what it writes."""
    assistant: Any = draft_model(model, draft.subnet)
    assistant.generation_config.update(
        num_assistant_tokens=draft.tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    writes = assistant.generate

    def counting(*, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = writes(input_ids=input_ids, **kwargs)
        draft.drafted += output.sequences.shape[1] - input_ids.shape[1]
        return output

    assistant.generate = counting
    return assistant


def stream_speculative(
    model: ElasticModel,
    subnet: Subnet,
    draft: Draft,
    prompt_BT: torch.Tensor,
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> Generator[int, None, None]:
    """Greedy tokens after the prompt [1, T], each as soon as it is known, by `Decoder` on both sides.

    A stop token is the last.

    Raises:
        ValueError: a draft that is not smaller than `subnet`, a model that `decoding.supports` refuses, more than one
            prompt, or no token asked for.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for 1 or more.")
    _check(model, subnet, draft, prompt_BT)
    text: list[int] = prompt_BT[0].tolist()
    end = len(text) + max_new_tokens
    target, ahead = (Decoder(model, part, max_tokens=end) for part in (subnet, draft.subnet))
    new = [int(target.prefill(prompt_BT).argmax())]
    ahead.prefill(prompt_BT)
    while True:
        for token in new:
            text.append(token)
            draft.written += 1
            yield token
            if token in stop or len(text) == end:
                return
        drafted = _write_ahead(ahead, text, min(draft.tokens, end - len(text) - 1), stop)
        likeliest = target.steps(text[target.position :] + drafted).argmax(-1).tolist()
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafted, likeliest, strict=False)))
        draft.passes += 1
        draft.drafted += len(drafted)
        draft.accepted += same
        new = likeliest[: same + 1]
        for decoder in (target, ahead):
            decoder.rewind(min(decoder.position, len(text) + same))


def _write_ahead(ahead: Decoder, text: list[int], tokens: int, stop: Collection[int]) -> list[int]:
    """The draft's likeliest tokens after `text`, at most `tokens`."""
    drafted: list[int] = []
    unseen = text[ahead.position :]
    while len(drafted) < tokens and not (drafted and drafted[-1] in stop):
        drafted.append(int(ahead.steps(unseen)[-1].argmax()))
        unseen = drafted[-1:]
    return drafted


def _check(model: ElasticModel, subnet: Subnet, draft: Draft, prompt_BT: torch.Tensor) -> None:
    draft.check(model, subnet)
    if len(prompt_BT) != 1:
        raise ValueError(f"got {len(prompt_BT)} prompts; speculative decoding goes on from one at a time.")
