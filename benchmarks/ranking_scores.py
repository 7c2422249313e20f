"""Compare the ranking scores: loss of SmolLM2 at equal widths, for every score on several texts.

    python benchmarks/ranking_scores.py --rank-on TRAIN.jsonl.xz --texts VALIDATION.jsonl.xz WIKITEXT2.jsonl.xz

The defaults rank and measure on the samples that come with flextron.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from flextron import evaluate, load_blocks, rank
from flextron.ranking.importance import SCORES
from model import load_smollm2, write_results


@dataclass(frozen=True)
class Settings:
    """Compare the importance scores."""

    rank_on: str = "sample/train"
    """Text to rank on."""
    rank_tokens: int = 16384
    """Number of tokens to rank on."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Texts to measure on."""
    tokens: int = 8192
    """Number of tokens of each text to measure on."""
    widths: tuple[int, ...] = (1344, 1152, 768)
    """Numbers of neurons in every MLP."""
    kv_groups: tuple[int, ...] = (2,)
    """Numbers of KV groups in every attention, with full MLPs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Rank a fresh copy of the model by each score, and print one row per score."""
    original = load_smollm2(getattr(torch, settings.dtype))
    ranking_blocks = load_blocks(original.tokenizer, settings.rank_on, tokens=settings.rank_tokens)
    texts = [load_blocks(original.tokenizer, text, tokens=settings.tokens) for text in settings.texts]
    space = original.search_space
    subnets = [*(space.uniform(width) for width in settings.widths)]
    subnets += [space.uniform(kv_groups=groups) for groups in settings.kv_groups]
    columns = [f"{n} neurons" for n in settings.widths] + [f"{g} KV groups" for g in settings.kv_groups]
    print(f"| score | {' | '.join(f'{Path(text.text).name}: {column}' for text in texts for column in columns)} |")
    print("|---|" + "---:|" * (len(texts) * len(columns)))
    rows = {}
    for score in SCORES:
        model = copy.deepcopy(original)
        rank(model, ranking_blocks, score=score)
        losses = [result.nats_per_token for text in texts for result in evaluate(model, subnets, text)]
        print(f"| {score} | {' | '.join(f'{loss:.3f}' for loss in losses)} |", flush=True)
        rows[score] = losses
    write_results(settings.out, {"columns": columns, "texts": list(settings.texts), "nats_per_token": rows})


if __name__ == "__main__":
    torch.manual_seed(0)
    main(tyro.cli(Settings))
