"""Text from a sub-network: by `inference.decoder` on a CPU where it can, else by transformers' own `generate`.

With a draft, by `inference.speculative` in the same two ways. Each way is an iterator of tokens, of which
`inference.text` makes text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flextron.choosing.routing import route
from flextron.data.blocks import document_start, require_tokenizer
from flextron.elastic.model import ElasticModel
from flextron.errors import FlextronError
from flextron.inference.background import generated_tokens
from flextron.inference.speculative import Draft, assisted_tokens, draft_model, stream_speculative
from flextron.inference.streaming import can_stream, stream_tokens
from flextron.inference.text import text_pieces
from flextron.routers.token.batch import TokenRouting
from flextron.subnet import Subnet


def stream(
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
    fast: bool = True,
    speculative: Draft | Subnet | None = None,
) -> Generator[str, None, None]:
    """Text that goes on from `prompt`, in pieces as they come; together they are what `generate` returns.

        for piece in flextron.stream(model, "The capital of France is", budget="0.6x"):
            print(piece, end="", flush=True)

    The model works only while the next piece is awaited. Close the iterator, or leave the loop, to stop early. Until
    then, weights must stay as they are, and with a routing no one else may use the model.

    Args:
        subnet: by default the one in use.
        budget: instead of a sub-network, such as "12ms" a token or "0.6x"; `flextron.route` chooses the best one.
        routing: instead of both, every token gets a sub-network of its own (`flextron.route_tokens`).
        max_new_tokens: tokens to write at most; a stop token of the model ends the text earlier.
        chat: put the prompt into the model's chat template, as a user's message.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        seed: of torch's global generator, which the sampling uses; by default it goes on from where it is.
        fast: False takes transformers' own `generate` even where our faster loop gives the same text.
        speculative: a smaller sub-network that writes ahead; the text stays that of `subnet`, up to rounding. A `Draft`
            says how far ahead, and counts what was accepted.

    Raises:
        SubnetError: a sub-network that is not in the model's search space.
        FlextronError: an empty prompt, no tokenizer, no chat template where one is asked for, or a budget that
            `flextron.route` cannot meet.
        ValueError: more than one of sub-network, budget and routing; no token asked for; or a draft that is not smaller
            than the sub-network, or one beside a routing or a temperature.
    """
    _check(subnet, budget, routing, speculative, max_new_tokens=max_new_tokens, temperature=temperature)
    if budget is not None:
        subnet = route(model, budget).subnet
    subnet = subnet or model.subnet
    model.search_space.check(subnet)
    draft = Draft(speculative) if isinstance(speculative, Subnet) else speculative
    if draft is not None:
        draft.check(model, subnet)
    prompt_BT = _encode(model, prompt, chat=chat)
    model.check_tokens(prompt_BT)
    _check_length(model, prompt_BT.shape[1], max_new_tokens)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    tokens = _new_tokens(model, subnet, prompt_BT, routing=routing, draft=draft, fast=fast, **options)
    return _text(model, prompt_BT, tokens, seed)


_stream = stream  # `generate` has a parameter of this name


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
        stream: also print each piece as it comes; `flextron.stream` gives the pieces to a program.

    The other arguments, and what is raised, are those of `flextron.stream`.
    """
    written = []
    for piece in _stream(
        model,
        prompt,
        subnet=subnet,
        budget=budget,
        routing=routing,
        max_new_tokens=max_new_tokens,
        chat=chat,
        temperature=temperature,
        seed=seed,
        fast=fast,
        speculative=speculative,
    ):
        written.append(piece)
        if stream:
            print(piece, end="", flush=True)
    if stream:
        print()
    return "".join(written)


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


def _check(
    subnet: Subnet | None,
    budget: str | None,
    routing: TokenRouting | None,
    draft: Draft | Subnet | None,
    *,
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Pass if sub-network, budget, routing and draft go together.

    Raises:
        ValueError: they do not, or no token is asked for.
    """
    if sum(wish is not None for wish in (subnet, budget, routing)) > 1:
        raise ValueError("name a sub-network, a budget or a routing of tokens, only one of them.")
    if draft is not None and (routing is not None or temperature):
        raise ValueError(
            "a draft writes ahead for greedy text of one sub-network: no routing of tokens, temperature 0."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for 1 or more.")


def _encode(model: ElasticModel, prompt: str, *, chat: bool) -> torch.Tensor:
    """Token ids of the prompt, [1, T]. It begins as documents do, and has no end token, as it goes on."""
    tokenizer = require_tokenizer(model.tokenizer)
    if not prompt.strip():
        raise FlextronError("the prompt is empty; give some text to go on from.")
    if chat:
        if not tokenizer.chat_template:
            raise FlextronError("this tokenizer has no chat template; leave out chat.")
        prompt = _in_chat_template(tokenizer, prompt)
    try:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    except (TypeError, UnicodeEncodeError):  # half of a surrogate pair
        raise FlextronError("the prompt is not UTF-8; give text in that encoding.") from None
    if not ids:
        raise FlextronError(f"the tokenizer has no token for the prompt {prompt!r}; give another text to go on from.")
    return torch.tensor([[*([] if chat else document_start(tokenizer)), *ids]], device=model.device)


def _check_length(model: ElasticModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Pass if prompt and answer fit the model's positions.

    Raises:
        ValueError: they do not.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most and prompt_tokens > most:
        raise ValueError(f"the prompt has {prompt_tokens} tokens; this model reads at most {most}. Shorten the prompt.")
    left = None if model.positions is None else model.positions - prompt_tokens
    model.check_length(prompt_tokens + max_new_tokens, f"Ask for at most {left} new tokens (--max-new-tokens {left}).")
    if most and max_new_tokens > most:
        raise ValueError(
            f"{max_new_tokens} new tokens are more than the {most} that this model reads. Ask for fewer "
            f"(--max-new-tokens {most - prompt_tokens})."
        )


def _in_chat_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the prompt as a user's message in the tokenizer's chat template.

    Raises:
        FlextronError: the template is broken, or refuses a user's message alone.
    """
    try:
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise FlextronError(f"this tokenizer's chat template takes no such message: {error}. Leave out chat.") from None


def _text(
    model: ElasticModel, prompt_BT: torch.Tensor, tokens: Generator[int, None, None], seed: int | None
) -> Generator[str, None, None]:
    """The pieces of text that tokens after the prompt [1, T] are; the seed is set when the first one is asked for."""
    if seed is not None:
        torch.manual_seed(seed)
    with closing(tokens):
        yield from text_pieces(require_tokenizer(model.tokenizer), prompt_BT[0].tolist(), tokens)


def _new_tokens(
    model: ElasticModel,
    subnet: Subnet,
    prompt_BT: torch.Tensor,
    *,
    routing: TokenRouting | None,
    draft: Draft | None,
    fast: bool,
    temperature: float,
    max_new_tokens: int,
) -> Generator[int, None, None]:
    """The tokens after the prompt [1, T] as they come: here it is decided what writes them."""
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if routing is None and fast and can_stream(model):
        limits["stop"] = _stop_tokens(model)
        if draft is None:
            return stream_tokens(model, subnet, prompt_BT, temperature=temperature, **limits)
        return stream_speculative(model, subnet, draft, prompt_BT, **limits)
    if draft is not None:
        return assisted_tokens(model, subnet, draft, prompt_BT, **limits)
    write = draft_model(model, subnet).generate if routing is None else _routed(model, routing)
    limits |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return generated_tokens(write, prompt_BT, in_one=(model.lm.generation_config.num_beams or 1) > 1, **limits)


def _stop_tokens(model: ElasticModel) -> Collection[int]:
    stop = model.lm.generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else stop


def _routed(model: ElasticModel, routing: TokenRouting) -> Callable[..., Any]:
    """`generate` of transformers, every token routed."""

    def write(*args: Any, **kwargs: Any) -> Any:
        with routing.use():
            return model.generate(*args, **kwargs)

    return write
