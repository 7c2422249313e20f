"""Time sub-networks in llama.cpp, and compare the speed-up with the ideal.

python benchmarks/engines.py out/trained

For each budget, it exports the router's per-layer widths, and equal widths of at most the same size, to GGUF. Each
round times all files in random order, each right after the full model. An output token reads every weight once, so its
ideal speed-up is the ratio of the files' bytes; the ideal of a prompt is the ratio of FLOPs. It prints medians of
times, and of ratios to the full model timed just before.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import Positional

from flextron import ElasticModel, Subnet, export_gguf, route
from flextron.choosing.baselines import equal_widths_within
from flextron.costs.formulas import formula_table
from flextron.costs.pricing import Ceiling
from flextron.elastic.checkpoint import quiet_transformers
from flextron.exporting.exporters import GgufExporter
from flextron.exporting.gguf.comparing import real_text
from flextron.exporting.gguf.engine import EngineTimes, LlamaCpp
from model import write_results


@dataclass(frozen=True)
class Settings:
    """Time exports in llama.cpp."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of an elastic checkpoint with its latency tables."""
    budgets: tuple[str, ...] = ("0.8x", "0.6x", "0.5x")
    """Budgets of the sub-networks."""
    quantize: tuple[str, ...] = ("f16", "q8_0")
    """Weight types to export."""
    threads: int = 2
    """Number of threads of llama.cpp."""
    prompt_tokens: int = 512
    """Number of tokens in the prompt."""
    new_tokens: int = 64
    """Number of tokens to generate."""
    rounds: int = 5
    """Number of interleaved rounds, after one to warm up."""
    any_device: bool = False
    """Whether to use latency tables of another device or version."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Row:
    """One exported file."""

    name: str
    quantize: str
    subnet: Subnet
    architecture: str
    megabytes: float
    flops: float
    """FLOPs per prompt token, without attention scores and output projection."""


def main(settings: Settings) -> None:
    """Export and time all files, and print the results."""
    quiet_transformers()
    torch.set_num_threads(settings.threads)
    model = ElasticModel.from_pretrained(settings.model)
    tokens = real_text(model.tokenizer, settings.prompt_tokens)[1]  # type: ignore[arg-type]
    results = []
    for quantize in settings.quantize:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as engines:
            rows, loaded = [], []
            for number, (name, subnet) in enumerate(_subnets(model, quantize, settings).items()):
                file = Path(folder) / f"{number}.gguf"
                report = export_gguf(model, subnet, file, quantize=quantize, verify=False)
                flops = formula_table(model, "flops").price(subnet) - formula_table(model, "flops").fixed
                row = Row(name, quantize, subnet, report.architecture, report.weight_bytes / 1e6, flops)
                rows.append(row)
                context = settings.prompt_tokens + settings.new_tokens + 8
                loaded.append(engines.enter_context(LlamaCpp(file, context=context, threads=settings.threads)))
            results += _report(rows, _time(loaded, tokens, settings), settings)
    write_results(settings.out, {"settings": {**asdict(settings), "out": None}, "rows": results})


def _subnets(model: ElasticModel, quantize: str, settings: Settings) -> dict[str, Subnet]:
    found = {"full": model.search_space.full}
    table = formula_table(model, "parameters")
    for budget in settings.budgets:
        per_layer = route(model, budget, any_device=settings.any_device).subnet
        ceiling = Ceiling(table, table.price(per_layer), budget)
        found[f"{budget} per layer"] = per_layer
        found[f"{budget} equal"] = equal_widths_within(
            [ceiling], lambda subnet: GgufExporter(quantize).can_state(model, subnet)
        )
    return found


Pairs = list[tuple[EngineTimes, EngineTimes]]
"""For one file, in each round: the full model's times and, right after, its own."""


def _time(engines: list[LlamaCpp], tokens: list[int], settings: Settings) -> list[Pairs]:
    """Return the times of each engine in each round; the first engine has the full model."""
    pairs: list[Pairs] = [[] for _ in engines]
    draw = random.Random(0)  # noqa: S311
    for round_ in range(settings.rounds + 1):
        for index in draw.sample(range(len(engines)), len(engines)):
            full, own = (engines[each].times(tokens, settings.new_tokens) for each in (0, index))
            if round_:  # the first round warms up
                pairs[index].append((full, own))
    return pairs


def _report(rows: list[Row], times: list[Pairs], settings: Settings) -> list[dict[str, Any]]:
    """Print a table, and return its rows as JSON values."""
    print(f"\n{rows[0].quantize}, {settings.threads} threads, {settings.prompt_tokens} + {settings.new_tokens} tokens")
    print(
        f"{'sub-network':<16}{'MB':>8}{'prompt tok/s':>14}{'ideal':>7}{'got':>6}{'ms/token':>10}{'ideal':>7}{'got':>6}"
    )
    results: list[dict[str, Any]] = []
    for row, pairs in zip(rows, times, strict=True):
        prompt_ms = median(own.prompt_ms for _, own in pairs)
        token_ms = median(own.per_token_ms for _, own in pairs)
        result = {
            **asdict(row),
            "rounds": [asdict(own) for _, own in pairs],
            "full_before": [asdict(full) for full, _ in pairs],
            "prompt_ms": prompt_ms,
            "token_ms": token_ms,
            "prompt_speedup": median(full.prompt_ms / own.prompt_ms for full, own in pairs),
            "prompt_ideal": rows[0].flops / row.flops,
            "token_speedup": median(full.per_token_ms / own.per_token_ms for full, own in pairs),
            "token_ideal": rows[0].megabytes / row.megabytes,
        }
        results.append(result)
        print(
            f"{row.name:<16}{row.megabytes:>8.1f}{1000 * settings.prompt_tokens / prompt_ms:>14.0f}"
            f"{result['prompt_ideal']:>7.2f}{result['prompt_speedup'] / result['prompt_ideal']:>6.0%}"
            f"{token_ms:>10.2f}{result['token_ideal']:>7.2f}{result['token_speedup'] / result['token_ideal']:>6.0%}"
        )
    return results


if __name__ == "__main__":
    main(tyro.cli(Settings))
