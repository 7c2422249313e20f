"""Text from a sub-network: by `decoding` on a CPU where it can, else by transformers' own `generate`.

With a draft, by `speculative` in the same two ways.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flextron.choosing.routing import route
from flextron.elastic.model import ElasticModel
from flextron.errors import FlextronError
from flextron.inference.decoder import Decoder, supports
from flextron.inference.speculative import Draft, assisted_tokens, stream_speculative
from flextron.routers.token.batch import TokenRouting
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


def generate(
    model: ElasticModel,
    prompt: str,
    *,
    subnet: Subnet | None = None,
    budget: str | None = None,
    routing: TokenRouting | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int | None = None,
    stream: bool = False,
    fast: bool = True,
    speculative: Draft | Subnet | None = None,
) -> str:
    """What the model writes after `prompt`, without the prompt.

    Args:
        subnet: by default the one in use.
        budget: instead of a sub-network, such as "12ms" a token or "0.6x"; `flextron.route` chooses the best one.
        routing: instead of both, every token gets a sub-network of its own (`flextron.route_tokens`).
        chat: put the prompt into the model's chat template, as a user's message.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        seed: of torch's global generator, which the sampling uses; by default it goes on from where it is.
        stream: also print each piece as it comes.
        fast: False takes transformers' own `generate` even where our faster loop gives the same text.
        speculative: a smaller sub-network that writes ahead; the text stays that of `subnet`, up to rounding. A `Draft`
            says how far ahead, and counts what was accepted.

    Raises:
        SubnetError: a sub-network that is not in the model's search space.
        FlextronError: an empty prompt, no tokenizer, no chat template where one is asked for, or a budget that
            `flextron.route` cannot meet.
        ValueError: more than one of sub-network, budget and routing; or a draft that is not smaller than the
            sub-network, or one beside a routing or a temperature.
    """
    if sum(wish is not None for wish in (subnet, budget, routing)) > 1:
        raise ValueError("name a sub-network, a budget or a routing of tokens, only one of them.")
    if speculative is not None and (routing is not None or temperature):
        raise ValueError(
            "a draft writes ahead for greedy text of one sub-network: no routing of tokens, temperature 0."
        )
    if budget is not None:
        subnet = route(model, budget).subnet
    subnet = subnet or model.subnet
    prompt_BT = _encode(model, prompt, chat=chat)
    tokenizer = model.tokenizer
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stream": stream}
    draft = Draft(speculative) if isinstance(speculative, Subnet) else speculative
    with torch.inference_mode():
        if routing is not None:
            with routing.use():
                written = _new_tokens_of_transformers(model, prompt_BT, temperature=temperature, **options)
        elif fast and can_stream(model):
            written = _new_tokens(model, subnet, prompt_BT, draft=draft, temperature=temperature, **options)
        elif draft is not None:
            streamer = _streamer(model, skip_prompt=True) if stream else None
            written = assisted_tokens(model, subnet, draft, prompt_BT, max_new_tokens=max_new_tokens, streamer=streamer)
        else:
            with model.use(subnet):
                written = _new_tokens_of_transformers(model, prompt_BT, temperature=temperature, **options)
    return str(tokenizer.decode(written, skip_special_tokens=True))  # type: ignore[union-attr]


def compare_speculative(model: ElasticModel, prompt: str, draft: Draft, **options: Any) -> tuple[float, bool]:
    """Speed-up of writing ahead over plain greedy decoding, whole texts with their prompt, and whether they are equal.

    Each runs once; `options` go to `generate`.
    """
    times, texts = [], []
    for speculative in (None, replace(draft)):
        start = time.perf_counter()
        texts.append(generate(model, prompt, speculative=speculative, **options))
        times.append(time.perf_counter() - start)
    return times[0] / times[1], texts[0] == texts[1]


def _encode(model: ElasticModel, prompt: str, *, chat: bool) -> torch.Tensor:
    """Token ids of the prompt, [1, T]."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise FlextronError("this checkpoint has no tokenizer; put its tokenizer files into the same folder.")
    if not prompt.strip():
        raise FlextronError("the prompt is empty; give some text to go on from.")
    if chat:
        if not tokenizer.chat_template:
            raise FlextronError("this tokenizer has no chat template; leave out chat.")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    tokens_BT: torch.Tensor = encoded["input_ids"].to(model.device)
    return tokens_BT


def _streamer(model: ElasticModel, *, skip_prompt: bool = False) -> TextStreamer:
    return TextStreamer(model.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)


def _new_tokens(
    model: ElasticModel,
    subnet: Subnet,
    prompt_BT: torch.Tensor,
    *,
    stream: bool,
    draft: Draft | None,
    temperature: float,
    max_new_tokens: int,
) -> list[int]:
    stop = model.lm.generation_config.eos_token_id
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    options["stop"] = [] if stop is None else [stop] if isinstance(stop, int) else stop
    if draft is None:
        coming = stream_tokens(model, subnet, prompt_BT, temperature=temperature, **options)
    else:
        coming = stream_speculative(model, subnet, draft, prompt_BT, **options)
    streamer = _streamer(model) if stream else None
    tokens = []
    for token in coming:
        tokens.append(token)
        if streamer:
            streamer.put(torch.tensor([token]))
    if streamer:
        streamer.end()
    return tokens


def _new_tokens_of_transformers(
    model: ElasticModel, prompt_BT: torch.Tensor, *, stream: bool, temperature: float, **options: Any
) -> list[int]:
    streamer = _streamer(model, skip_prompt=True) if stream else None
    options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output_BT = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), streamer=streamer, **options)
    tokens: list[int] = output_BT[0, prompt_BT.shape[1] :].tolist()
    return tokens


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
) -> Iterator[int]:
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
