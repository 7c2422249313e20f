"""Measure the time that narrowing saves and that elasticity costs, for SmolLM2, in interleaved runs.

    python benchmarks/speed.py

For a prefill of 4 x 512 tokens in fp32 and bf16, it prints:

- the time of the elastic model at full width against the original;
- the time of the layers with half of their weights against all of them (the model without the output projection).

It also prints the growth of peak memory over many sub-networks, the time to choose one, and the time of ranking against
a plain forward pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM

from flextron import ElasticModel, Subnet, load_blocks, rank
from flextron.demo.quickstart import smollm2_path
from model import load_smollm2, write_results


@dataclass(frozen=True)
class Settings:
    """Time the elastic model."""

    rounds: int = 7
    """Number of interleaved rounds; medians are printed."""
    rank_tokens: int = 16384
    """Number of tokens in the timed ranking."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Run all measurements and print the results."""
    path = smollm2_path()
    original = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model = load_smollm2()
    results: dict[str, Any] = {"ranking": _ranking_cost(model, settings)}
    layers = model.search_space.layers
    uneven = Subnet((1088, 448) * (layers // 2), (1, 2) * (layers // 2))  # half of the layers' weights
    equal = model.search_space.uniform(704, 2)
    results["choosing_ms"] = _choosing_ms(model, uneven)
    print(f"choosing a sub-network: {results['choosing_ms']:.3f} ms")
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype)] = _prefill(model.lm.to(dtype), original.to(dtype), model, [uneven, equal], settings.rounds)
    results["memory"] = _memory_growth_mb(model)
    write_results(settings.out, results)


@torch.inference_mode()
def _ranking_cost(model: ElasticModel, settings: Settings) -> dict[str, float]:
    blocks = load_blocks(model.tokenizer, "sample/train", tokens=settings.rank_tokens)
    forward = _seconds(lambda: [model(batch, use_cache=False) for batch in blocks.batches(2048)])
    ranking = _seconds(lambda: rank(model, blocks))
    forward = (forward + _seconds(lambda: [model(batch, use_cache=False) for batch in blocks.batches(2048)])) / 2
    print(f"ranking on {settings.rank_tokens} tokens: {ranking:.1f} s, {ranking / forward:.2f} times a forward pass")
    return {"ranking_s": ranking, "forward_s": forward}


def _choosing_ms(model: ElasticModel, subnet: Subnet) -> float:
    def choose() -> None:
        with model.use(subnet):
            pass

    return median(_seconds(choose) for _ in range(100)) * 1000


@torch.inference_mode()
def _prefill(lm: Any, original: Any, model: ElasticModel, halves: list[Subnet], rounds: int) -> dict[str, Any]:
    tokens_BT = torch.randint(0, 49152, (4, 512), generator=torch.Generator().manual_seed(0))

    def layers(subnet: Subnet) -> Callable[[], None]:
        def run() -> None:
            with model.use(subnet):
                lm.model(tokens_BT, use_cache=False)

        return run

    runs: dict[str, Callable[[], Any]] = {
        "original": lambda: original(tokens_BT, use_cache=False),
        "elastic, full": lambda: lm(tokens_BT, use_cache=False),
        "layers, full": layers(model.search_space.full),
        "layers, uneven half": layers(halves[0]),
        "layers, 704 neurons, 2 groups": layers(halves[1]),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            seconds = _seconds(run)
            if round_:
                times[name].append(seconds)
    ms = {name: 1000 * median(seconds) for name, seconds in times.items()}
    print(f"\n{lm.dtype}, prefill 4 x 512, medians of {rounds} interleaved rounds")
    print("\n".join(f"  {name:<32}{value:8.0f} ms" for name, value in ms.items()))
    ratios = {
        "elastic / original": _ratio(times, "elastic, full", "original"),
        f"uneven {model.share(halves[0]):.1%} / full": _ratio(times, "layers, uneven half", "layers, full"),
        f"equal {model.share(halves[1]):.1%} / full": _ratio(times, "layers, 704 neurons, 2 groups", "layers, full"),
    }
    print("\n".join(f"  {name:<32}{value:8.3f}" for name, value in ratios.items()))
    return {"ms": ms, "ratios": ratios}


def _ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Return the median of the ratios of all rounds."""
    return median(x / y for x, y in zip(times[a], times[b], strict=True))


@torch.inference_mode()
def _memory_growth_mb(model: ElasticModel) -> float:
    """Return the growth of peak memory in MB over 20 random sub-networks, after the full model has run."""
    tokens_BT = torch.zeros(4, 512, dtype=torch.long)
    space, draw = model.search_space, random.Random(0)  # noqa: S311
    model.lm.model(tokens_BT, use_cache=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    model.lm.model(tokens_BT, use_cache=False)
    before = _peak_mb()
    for _ in range(20):
        neurons = tuple(draw.choice(space.neurons) for _ in range(space.layers))
        kv_groups = tuple(draw.choice(space.kv_groups) for _ in range(space.layers))
        with model.use(Subnet(neurons, kv_groups)):
            model.lm.model(tokens_BT, use_cache=False)
    growth = _peak_mb() - before
    print(f"\npeak memory grew by {growth:.1f} MB over 20 random sub-networks")
    return growth


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Settings))
