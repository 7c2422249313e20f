"""Measure which part of a prefill and of a training step are matrix products, and how fast those are, for SmolLM2.

    python benchmarks/products.py

It prints, from interleaved rounds:

- the time of a prefill against that of its matrix products alone, run one after the other on the model's own weights;
- the same for a training step with adapters that learns from the original model: its products are those of the teacher,
  of the student, of the gradients of its inputs, and of the adapters;
- the operations that take the rest.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from torch.profiler import ProfilerActivity, profile

from flextron import ElasticModel, OptimizerOptions, load_blocks
from flextron.elastic.model import projections_of
from flextron.environment import describe_device
from flextron.training.distillation import make_distiller
from model import load_smollm2, write_results

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")


@dataclass(frozen=True)
class Settings:
    """Time products and what is around them."""

    tokens: int = 512
    """Tokens of the prefill and of the training step."""
    lora_rank: int = 24
    """Rank of the adapters that are trained."""
    rounds: int = 7
    """Number of interleaved rounds; medians are printed."""
    shown: int = 8
    """How many operations to list."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Run all measurements and print the results."""
    model = load_smollm2()
    tokens = load_blocks(model.tokenizer, "sample/train", tokens=settings.tokens, block_tokens=settings.tokens).tokens
    print(f"{settings.tokens} tokens on {describe_device(model.device)}, {torch.get_num_threads()} threads, fp32")
    results = {"prefill": _compare("prefill", *_prefill(model, tokens), settings)}
    results["training step"] = _compare("training step", *_training(model, tokens, settings.lora_rank), settings)
    write_results(settings.out, results)


Timed = tuple[Callable[[], object], Callable[[], object], float]
"""The whole, its products alone, and their floating-point operations."""


def _prefill(model: ElasticModel, tokens: torch.Tensor) -> Timed:
    weights = [projection.matrix() for projection in projections_of(model).values()]
    inputs = {size: torch.randn(tokens.shape[1], size) for size in {weight.shape[1] for weight in weights}}

    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    def whole() -> object:
        with torch.inference_mode():
            return model.lm(tokens, logits_to_keep=1)

    return whole, torch.inference_mode()(products), 2 * tokens.numel() * sum(weight.numel() for weight in weights)


def _training(model: ElasticModel, tokens: torch.Tensor, rank: int) -> Timed:
    options = OptimizerOptions(lora_rank=rank, text_weight=0.2, precision="fp32")
    weights = [projection.matrix().detach() for projection in projections_of(model).values()]
    distiller = make_distiller(model, options, torch.float32, seed=0)
    head = model.lm.get_output_embeddings().weight.detach()
    count = tokens.shape[1]
    shapes = {size for weight in (*weights, head) for size in weight.shape}
    values = {size: torch.randn(count, size) for size in {*shapes, rank}}
    factors = {size: torch.randn(rank, size) for size in shapes}

    def products() -> None:
        for weight in (*weights, head):
            rows, columns = weight.shape
            for _ in ("teacher", "student"):
                F.linear(values[columns], weight)
            values[rows] @ weight  # the gradient of its input
        for weight in weights:
            for size in weight.shape:  # A and B: output, gradient of the input, gradient of the factor
                F.linear(values[size], factors[size])
                values[rank] @ factors[size]
                values[rank].t() @ values[size]

    def whole() -> None:
        distiller(tokens).total.backward()
        for parameter in distiller.parameters():
            parameter.grad = None

    numbers = sum(weight.numel() for weight in (*weights, head))
    adapters = sum(rank * sum(weight.shape) for weight in weights)
    return whole, torch.inference_mode()(products), 6.0 * count * (numbers + adapters)


def _compare(
    name: str, whole: Callable[[], object], products: Callable[[], object], flops: float, settings: Settings
) -> dict[str, object]:
    whole()
    seconds: dict[str, list[float]] = {"whole": [], "products": []}
    for _ in range(settings.rounds):
        for kind, run in (("products", products), ("whole", whole)):
            start = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - start)
    of_products, of_whole = median(seconds["products"]), median(seconds["whole"])
    share = median(a / b for a, b in zip(seconds["products"], seconds["whole"], strict=True))
    print(
        f"{name}: {of_whole * 1000:.0f} ms; its products alone {of_products * 1000:.0f} ms ({share:.0%}), "
        f"at {flops / of_products / 1e9:.0f} GFLOP/s"
    )
    rest = _operations(whole)
    total = sum(rest.values())
    for operation, spent in sorted(rest.items(), key=lambda item: -item[1])[: settings.shown]:
        print(f"  {spent / total:6.1%}  {operation}")
    return {"seconds": seconds, "share": share, "flops": flops, "operations": rest}


def _operations(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one run by operation; all products count as one."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        spent["products" if event.key in PRODUCTS else event.key] += event.self_cpu_time_total / 1e6
    return dict(spent)


if __name__ == "__main__":
    main(tyro.cli(Settings))
