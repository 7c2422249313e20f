"""Compare greedy and equal MLP widths without training: loss of SmolLM2 over the share of the layers' weights kept.

Run it with and without `--refit-tokens 0` and `--sensitivities measured` to see what these change (decisions 3 and 13).

python benchmarks/allocation.py --rank-on TRAIN.jsonl.xz --texts VALIDATION.jsonl.xz WIKITEXT2.jsonl.xz
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from flextron import estimate_sensitivity, evaluate, load_blocks, measure_sensitivity, rank, refit
from flextron.choosing.baselines import equal_widths
from flextron.data.blocks import blocks_after
from flextron.ranking.sensitivity import sensitivity_blocks
from model import load_smollm2, write_results


@dataclass(frozen=True)
class Settings:
    """Measure greedy and equal sub-networks of one ranked model."""

    rank_on: str = "sample/train"
    """Text to rank on; sensitivities are measured on the documents that follow."""
    rank_tokens: int = 16384
    """Number of tokens to rank on."""
    sensitivity_tokens: int = 2048
    """Number of tokens to measure sensitivities on."""
    sensitivities: Literal["estimated", "measured"] = "estimated"
    """How to learn them."""
    refit_tokens: int = 16384
    """Number of tokens to refit the closing projections on, after the documents that are ranked on; 0 does not."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Texts to measure on."""
    tokens: int = 8192
    """Number of tokens of each text to measure on."""
    shares: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    """Shares of the layers' weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Rank, measure sensitivities, and print one row per share."""
    model = load_smollm2(getattr(torch, settings.dtype))
    ranked_on = load_blocks(model.tokenizer, settings.rank_on, tokens=settings.rank_tokens)
    rank(model, ranked_on)
    if settings.refit_tokens:
        refit(
            model,
            blocks_after(model.tokenizer, settings.rank_on, ranked_on.documents, tokens=settings.refit_tokens),
            show=True,
        )
    blocks = sensitivity_blocks(
        model.tokenizer, settings.rank_on, tokens=settings.sensitivity_tokens, after=ranked_on.documents
    )
    start = time.perf_counter()
    learn = estimate_sensitivity if settings.sensitivities == "estimated" else measure_sensitivity
    sensitivity = learn(model, blocks, show=True)
    seconds = time.perf_counter() - start
    print(f"{settings.sensitivities} sensitivities on {settings.sensitivity_tokens} tokens: {seconds:.0f} s")
    subnets = [sensitivity.allocate(share) for share in settings.shares]
    subnets += [equal_widths(model.search_space, sensitivity, share) for share in settings.shares]
    subnets.append(model.search_space.uniform(neurons=model.search_space.neurons[-1] // 2))
    results = {}
    for text in settings.texts:
        evaluations = evaluate(model, subnets, load_blocks(model.tokenizer, text, tokens=settings.tokens), show=True)
        print(f"\n{text}\n\n| kept | greedy | equal MLP widths |\n|---:|---:|---:|")
        half = len(settings.shares)
        for share, greedy, equal in zip(settings.shares, evaluations[:half], evaluations[half:-1], strict=True):
            print(f"| {share:.0%} | {greedy.nats_per_token:.3f} | {equal.nats_per_token:.3f} |")
        print(f"| half of all neurons | | {evaluations[-1].nats_per_token:.3f} |")
        results[text] = [asdict(evaluation) for evaluation in evaluations]
    write_results(settings.out, {"evaluations": results})


if __name__ == "__main__":
    main(tyro.cli(Settings))
