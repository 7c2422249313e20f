"""Tokens of our own loop over `Decoder`, one at a time, as transformers' `generate` would choose them."""

from __future__ import annotations

from collections.abc import Collection, Generator

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flextron.elastic.model import ElasticModel
from flextron.inference.decoder import Decoder, supports
from flextron.subnet import Subnet

_DEFAULT_TOP_K = 50  # of transformers' generate, where the generation config names none
_FOLLOWED = frozenset({"do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache"})
_FOLLOWED |= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
_WITHOUT_EFFECT = {
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}


def can_stream(model: ElasticModel) -> bool:
    """Whether `stream_tokens` gives what transformers' `generate` gives.

    Besides `supports`: the generation config asks for nothing but stop tokens, top_k and top_p.
    """
    asked = model.lm.generation_config.to_dict()
    return supports(model) and all(
        value is None or value is False or key in _FOLLOWED or value == _WITHOUT_EFFECT.get(key)
        for key, value in asked.items()
    )


def stream_tokens(
    model: ElasticModel,
    subnet: Subnet,
    prompt_BT: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Generator[int, None, None]:
    """The tokens that go on from the prompt [1, T], each as soon as it is there; a stop token is the last.

    Args:
        temperature: 0 takes the likeliest token each time; above 0 samples, by the generation config's top_k and top_p.
        generator: of the sampling; by default torch's global one.

    Raises:
        ValueError: a model that `supports` refuses, more than one prompt, or no token asked for.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for 1 or more.")
    warpers = _warpers(model, temperature) if temperature else None
    decoder = Decoder(model, subnet, max_tokens=prompt_BT.shape[1] + max_new_tokens)
    logits_V = decoder.prefill(prompt_BT)
    for left in reversed(range(max_new_tokens)):
        if warpers is None:
            token = int(logits_V.argmax())
        else:
            scores_BV = warpers(prompt_BT, logits_V[None].float())
            token = int(torch.multinomial(scores_BV.softmax(-1), 1, generator=generator))
        yield token
        if not left or token in stop:
            return
        logits_V = decoder.step(token)


def _warpers(model: ElasticModel, temperature: float) -> LogitsProcessorList:
    """What transformers' `generate` does to the logits before it samples, in its order."""
    config = model.lm.generation_config
    top_k = _DEFAULT_TOP_K if config.top_k is None else config.top_k
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers
