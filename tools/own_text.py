"""Write text of a model's own, to train its sub-networks on: half chats that it begins itself, half documents.

    python tools/own_text.py smollm2 own.jsonl --data corpus/train-*.jsonl.xz --tokens 58000

A chat begins with the first tokens of a user's turn, and the model writes that turn and the answer (Magpie, Xu et al.,
arXiv 2406.08464). A document begins with the first tokens of one of --data. The file gets a line after every text, so
nothing is lost if the run is stopped. docs/decisions/0014-packs.md says what such text gained.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import PreTrainedTokenizerBase

from flextron import ElasticModel
from flextron.data.blocks import require_tokenizer
from flextron.data.sources import open_source
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import faster_dtype

CHAT = "<|im_start|>user\n"


@dataclass(frozen=True)
class Settings:
    """Write text of a model's own."""

    model: tyro.conf.Positional[str]
    """Folder, hub id or GGUF file of a model with ChatML turns; or smollm2."""
    out: tyro.conf.Positional[Path]
    """File of JSON lines to append to."""
    data: tuple[str, ...] = ("sample/train",)
    """Texts whose documents give first words."""
    tokens: int = 58_000
    """Number of tokens to write, at least."""
    batch: int = 128
    """Texts that are written together."""
    longest: int = 220
    """Longest text, in tokens."""
    first: int = 9
    """Tokens of a document that are given."""
    temperature: float = 0.8
    """Temperature of sampling from all tokens."""
    seed: int = 1


def main(settings: Settings) -> None:
    """Write batches of chats and of documents in turn."""
    quiet_transformers()
    torch.manual_seed(settings.seed)
    model = ElasticModel.from_pretrained(settings.model, dtype=faster_dtype("cpu"))
    tokenizer = require_tokenizer(model.tokenizer)
    chat = tokenizer(CHAT, add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = beginnings(tokenizer, settings)
    done, start = 0, time.monotonic()
    with settings.out.open("a", encoding="utf8") as file:
        while done < settings.tokens:
            for rows in ([chat] * settings.batch, [[end, *next(documents)] for _ in range(settings.batch)]):
                for text in written(model, torch.tensor(rows), end, settings):
                    done += len(text)
                    file.write(json.dumps({"text": tokenizer.decode(text)}) + "\n")
                file.flush()
            print(f"{done} tokens, {done / (time.monotonic() - start):.0f} a second", file=sys.stderr, flush=True)


def written(model: ElasticModel, tokens_BT: torch.Tensor, end: int, settings: Settings) -> Iterator[list[int]]:
    """Yield each text, without what separates documents."""
    output_BT = model.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=True,
        temperature=settings.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=settings.longest,
        eos_token_id=end,
        pad_token_id=end,
    )
    for row in output_BT.tolist():
        text = row[1:] if row[0] == end else row
        yield text[: text.index(end)] if end in text else text


def beginnings(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[list[int]]:
    """Yield the first tokens of documents in a random order, again and again."""
    pieces = (piece for path in settings.data for piece in open_source(path)[0]())
    texts = [piece.text.lstrip()[:400] for piece in pieces if piece.first]
    draw = random.Random(settings.seed)  # noqa: S311 - a fixed draw, no secret
    while True:
        for text in draw.sample(texts, len(texts)):
            tokens = tokenizer(text, add_special_tokens=False).input_ids[: settings.first]
            if len(tokens) == settings.first:
                yield tokens


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
