"""Text from a sub-network, by transformers' own `generate`."""

from __future__ import annotations

import torch
from transformers import TextStreamer

from flextron.elastic import ElasticModel
from flextron.errors import FlextronError
from flextron.subnet import Subnet


def generate(
    model: ElasticModel,
    prompt: str,
    *,
    subnet: Subnet | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int | None = None,
    stream: bool = False,
) -> str:
    """What the model writes after `prompt`, without the prompt.

    Args:
        subnet: by default the one in use.
        chat: put the prompt into the model's chat template, as a user's message.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        seed: of torch's global generator, which the sampling uses; by default it goes on from where it is.
        stream: also print each piece as it comes.

    Raises:
        SubnetError: a sub-network that is not in the model's search space.
        FlextronError: an empty prompt, no tokenizer, or no chat template where one is asked for.
    """
    prompt_BT = _encode(model, prompt, chat=chat)
    tokenizer = model.tokenizer
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with model.use(subnet or model.subnet), torch.inference_mode():
        output_BT = model.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            **sampling,
        )
    return str(tokenizer.decode(output_BT[0, prompt_BT.shape[1] :], skip_special_tokens=True))  # type: ignore[union-attr]


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
