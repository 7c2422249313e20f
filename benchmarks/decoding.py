"""Time flextron's decoding loop for SmolLM2 against `generate` of transformers, at full width and narrowed.

python benchmarks/decoding.py

Each round runs in turn: transformers at full width, flextron at full width, and flextron at sub-networks with half of
the layers' weights. It also compares the greedy texts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro

from flextron import ElasticModel, Subnet
from flextron.inference.streaming import stream_tokens
from model import load_smollm2, write_results

PROMPT = "Once upon a time, in a land far away, there was a library with"


@dataclass(frozen=True)
class Settings:
    """Time decoding."""

    new_tokens: int = 64
    """Number of tokens to generate; the first comes with the prompt and is not timed."""
    rounds: int = 5
    """Number of interleaved rounds; medians are printed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Time all runs and print the results."""
    model = load_smollm2(getattr(torch, settings.dtype))
    prompt_BT = model.tokenizer(PROMPT, return_tensors="pt").input_ids  # type: ignore[misc]
    layers = model.search_space.layers
    subnets = {
        "full": model.search_space.full,
        "half, widths alternating": Subnet((1088, 448) * (layers // 2), (1, 2) * (layers // 2)),
        "half, 704 neurons, 2 groups": model.search_space.uniform(704, 2),
    }
    times: dict[str, list[float]] = {"transformers, full": [], **{name: [] for name in subnets}}
    equal = True
    for round_ in range(settings.rounds + 1):
        eager, eager_ms = _eager(model, prompt_BT, settings.new_tokens)
        found = {name: _ours(model, subnet, prompt_BT, settings.new_tokens) for name, subnet in subnets.items()}
        equal &= found["full"][0] == eager
        if round_:  # the first round warms up
            times["transformers, full"].append(eager_ms)
            for name, (_, ms) in found.items():
                times[name].append(ms)
    print(f"{settings.dtype}, {torch.get_num_threads()} threads, medians of {settings.rounds} interleaved rounds")
    for name, values in times.items():
        ratio = median(a / b for a, b in zip(values, times["full"], strict=True))
        share = f", {model.share(subnets[name]):.1%} of the layers' weights" if name in subnets else ""
        print(f"  {name:<30}{median(values):7.1f} ms per token, {ratio:.2f} of flextron at full width{share}")
    print(f"  same greedy text of {settings.new_tokens} tokens as transformers: {equal}")
    write_results(settings.out, {"ms_per_token": times, "equal": equal})


def _eager(model: ElasticModel, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[list[int], float]:
    """Return the tokens, and ms per token after the first: the whole time minus that of one token."""
    options = {"attention_mask": torch.ones_like(prompt_BT), "do_sample": False}
    with torch.inference_mode():
        start = time.perf_counter()
        model.generate(prompt_BT, max_new_tokens=1, **options)
        one = time.perf_counter() - start
        start = time.perf_counter()
        output_BT = model.generate(prompt_BT, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)
        whole = time.perf_counter() - start
    return output_BT[0, prompt_BT.shape[1] :].tolist(), 1000 * (whole - one) / (new_tokens - 1)


def _ours(model: ElasticModel, subnet: Subnet, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[list[int], float]:
    """Return the tokens, and ms per token after the first."""
    stream = stream_tokens(model, subnet, prompt_BT, max_new_tokens=new_tokens)
    tokens = [next(stream)]
    start = time.perf_counter()
    tokens += stream
    return tokens, 1000 * (time.perf_counter() - start) / (new_tokens - 1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
