"""Measure the cost and the gain of elastic training, for SmolLM2.

    python benchmarks/training.py quality MODEL OUT --data corpus.jsonl.xz --tokens 41000 --texts validation.jsonl.xz
    python benchmarks/training.py throughput MODEL --data corpus.jsonl.xz

MODEL is an elastic checkpoint with sensitivities (`flextron rank`).

- `quality` trains, and prints losses before and after on each text: of the full model, of MLPs with 1152 and 768
  neurons, and of the greedy sub-network with half of the layers' weights.
- `throughput` times steps at every cost, interleaved with plain full fine-tuning by transformers and the same AdamW.
  It compares the time ratios with the ratios of compute (`flextron.training.estimate.training_flops`).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from accelerate import Accelerator

from flextron import (
    ElasticModel,
    OptimizerOptions,
    TextOptions,
    TrainConfig,
    VisitOptions,
    WatchOptions,
    evaluate,
    load_blocks,
    train,
)
from flextron.choosing.choice import choose
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_device
from flextron.subnet import Subnet
from flextron.training.estimate import training_flops
from flextron.training.run import TrainingRun
from flextron.training.sampling import Visit
from model import write_results

WATCHED = ("full", "neurons=1152", "neurons=768", "50%")
COSTS = ("full", "90%", "75%", "60%", "50%")


@dataclass(frozen=True)
class Quality:
    """Train, and measure sub-networks on held-out texts before and after."""

    model: tyro.conf.Positional[str]
    """Elastic checkpoint with sensitivities."""
    out: tyro.conf.Positional[Path]
    """Folder of the run; a finished run is only measured."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Held-out texts."""
    evaluate_tokens: int = 8192
    """Number of tokens of each text."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = dataclasses.field(default_factory=TextOptions)
    visit: tyro.conf.OmitArgPrefixes[VisitOptions] = dataclasses.field(default_factory=VisitOptions)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = dataclasses.field(default_factory=OptimizerOptions)
    before: bool = True
    """Whether to measure before training too."""
    seed: int = 0
    """Seed of the run."""
    device: str = "auto"
    """Device to run on; auto uses a GPU if there is one."""
    save: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Throughput:
    """Time steps at every cost against plain full fine-tuning, and their peak memory."""

    model: tyro.conf.Positional[str]
    """Elastic checkpoint with sensitivities."""
    rounds: int = 5
    """Number of interleaved rounds; medians are printed."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = dataclasses.field(default_factory=TextOptions)
    visit: tyro.conf.OmitArgPrefixes[VisitOptions] = dataclasses.field(default_factory=VisitOptions)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = dataclasses.field(default_factory=OptimizerOptions)
    memory: bool = True
    """Whether to measure peak memory too, in separate processes."""
    device: str = "auto"
    """Device to run on; auto uses a GPU if there is one."""
    save: Path | None = None
    """JSON file to write."""


def quality(settings: Quality) -> None:
    """Train and print the table."""
    before = _losses(settings, settings.model) if settings.before else {}
    config = TrainConfig(
        settings.model,
        settings.out,
        text=settings.text,
        visit=settings.visit,
        optimizer=settings.optimizer,
        watch=WatchOptions(evaluate_tokens=0, save_minutes=30),
        seed=settings.seed,
        device=settings.device,
    )
    train(config)
    steps = [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    tokens, seconds = steps[-1]["tokens"], sum(step["seconds"] for step in steps)
    after = _losses(settings, str(settings.out))
    print(f"\n{settings.out.name}: {tokens} tokens, {tokens / seconds:.0f} tokens/s")
    for text in settings.texts:
        print(f"{Path(text).name}, nats per token on {settings.evaluate_tokens} tokens: before -> after (change)")
        for name in WATCHED:
            new = after[text][name]
            old = before[text][name] if before else float("nan")
            print(f"  {name:<14}{old:8.3f} -> {new:.3f} ({new - old:+.3f})")
    results = {"before": before, "after": after, "tokens": tokens, "seconds": seconds}
    write_results(settings.save, {**results, "config": json.loads(json.dumps(dataclasses.asdict(config), default=str))})


def _losses(settings: Quality, folder: str) -> dict[str, dict[str, float]]:
    model = ElasticModel.from_pretrained(folder, device=settings.device)
    subnets = [choose(model, name, settings.model) for name in WATCHED]
    losses = {}
    for text in settings.texts:
        blocks = load_blocks(model.tokenizer, text, tokens=settings.evaluate_tokens)
        results = evaluate(model, subnets, blocks, show=True)
        losses[text] = {name: result.nats_per_token for name, result in zip(WATCHED, results, strict=True)}
    return losses


class _Fixed:
    """A sampler that visits only one sub-network."""

    def __init__(self, subnet: Subnet) -> None:
        self.subnet = subnet

    def next(self) -> Visit:
        return Visit("preset", self.subnet)


def throughput(settings: Throughput) -> None:
    """Time all steps in turn, and print time ratios next to ratios of compute."""
    peaks = _memory(settings) if settings.memory else {}
    run = _training_run(settings)
    mixed = run.sampler
    subnets = {name: choose(run.model, name, settings.model) for name in COSTS}
    plain = _plain_step(run)
    mixes: list[tuple[float, float]] = []

    def step_at(subnet: Subnet) -> Callable[[], None]:
        def step() -> None:
            run.sampler = _Fixed(subnet)  # type: ignore[assignment]
            run.train_step()

        return step

    def mixed_step() -> None:
        run.sampler = mixed
        record = run.train_step()
        visits = [Subnet(visit["neurons"], visit["kv_groups"]) for visit in record["visits"]]
        flops = sum(training_flops(run.model, subnet, teacher=True) for subnet in visits) / len(visits)
        mixes.append((record["seconds"], flops / full))

    full = training_flops(run.model, run.model.search_space.full, teacher=False)
    jobs = {"plain fine-tuning": plain, **{name: step_at(subnet) for name, subnet in subnets.items()}}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(settings.rounds + 1):
        for name, job in jobs.items():
            seconds = _seconds(job, run)
            if round_:
                times[name].append(seconds)
        if round_:
            mixed_step()
    tokens = run.tokens_per_step
    print(f"\n{describe_device(run.accelerator.device)}, {run.dtype}, steps of {tokens} tokens, "
          f"medians of {settings.rounds} interleaved rounds")  # fmt: skip
    print(f"{'step':<22}{'tokens/s':>10}{'time / plain':>14}{'compute / plain':>17}{'measured/predicted':>20}")
    rows: dict[str, Any] = {}
    for name, seconds in times.items():
        ratio = median(a / b for a, b in zip(seconds, times["plain fine-tuning"], strict=True))
        share = 1.0 if name not in subnets else training_flops(run.model, subnets[name], teacher=True) / full
        rows[name] = {"tokens_per_second": tokens / median(seconds), "ratio": ratio, "compute": share}
        print(f"{name:<22}{tokens / median(seconds):>10.0f}{ratio:>14.2f}{share:>17.2f}{ratio / share:>20.2f}")
    measured, predicted = (
        sum(seconds for seconds, _ in mixes),
        sum(share * plain_seconds for (_, share), plain_seconds in zip(mixes, times["plain fine-tuning"], strict=True)),
    )
    print(f"sampled steps reach {predicted / measured:.0%} of the speed that their compute predicts")
    mixed_speed = run.tokens_per_step * len(mixes) / measured
    results = {
        "rows": rows,
        "whole_run": predicted / measured,
        "mixed_tokens_per_second": mixed_speed,
        "device": describe_device(run.accelerator.device),
    }
    if run.accelerator.device.type == "cuda":
        results["mfu"] = _mfu(rows, full)
    if peaks:
        results["peak_memory_mb"] = peaks
    write_results(settings.save, results)


def _training_run(settings: Throughput) -> TrainingRun:
    out = Path(__file__).parent.parent / "out/benchmark-throughput"
    config = TrainConfig(
        settings.model,
        out,
        text=dataclasses.replace(settings.text, tokens=10**12),  # keeps the learning rate constant
        visit=settings.visit,
        optimizer=settings.optimizer,
        watch=WatchOptions(evaluate_tokens=0),
        device=settings.device,
        resume="never",
    )
    return TrainingRun(config, Accelerator(cpu=settings.device == "cpu"))


def _plain_step(run: TrainingRun) -> Callable[[], None]:
    """Return a step of plain full fine-tuning: transformers' loss, with frozen weights, AdamW and dtype of `run`."""

    def step() -> None:
        visits, blocks = run.config.visit.visits_per_step, run.config.visit.blocks_per_visit
        tokens = run.corpus.next_blocks(visits * blocks).to(run.accelerator.device)  # type: ignore[union-attr]
        with run.model.use(run.model.search_space.full):
            for tokens_BT in tokens.split(blocks):
                with run.autocast():
                    loss = run.model(tokens_BT, labels=tokens_BT, use_cache=False).loss
                (loss / visits).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters, run.config.optimizer.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()

    return step


def _mfu(rows: dict[str, Any], full: int) -> dict[str, float]:
    """Return the fraction of the peak in bf16: 989 TFLOP/s dense on an H100 SXM (NVIDIA's data sheet)."""
    mfu = {name: row["tokens_per_second"] * row["compute"] * full / 989e12 for name, row in rows.items()}
    print("model FLOPs utilisation: " + ", ".join(f"{name} {value:.1%}" for name, value in mfu.items()))
    return mfu


def _memory(settings: Throughput) -> dict[str, float]:
    """Return the peak memory in MB of three elastic and three plain steps, each in its own process."""
    peaks = {}
    for kind in ("plain", "elastic"):
        code = f"import training; training.peak({kind!r}, {json.dumps(_arguments(settings))})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE
        )
        peaks[kind] = float(done.stdout.split()[-1])
    print(f"peak memory: elastic {peaks['elastic']:.0f} MB, plain fine-tuning {peaks['plain']:.0f} MB")
    return peaks


def _arguments(settings: Throughput) -> list[str]:
    model = settings.model if not Path(settings.model).exists() else str(Path(settings.model).resolve())
    data = [str(Path(source).resolve()) if Path(source).exists() else source for source in settings.text.data]
    options = {**dataclasses.asdict(settings.visit), **dataclasses.asdict(settings.optimizer)}
    options |= {"block_tokens": settings.text.block_tokens, "device": settings.device, "data": data}
    arguments = [model]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, ()):
            arguments += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return arguments


def peak(kind: str, arguments: list[str]) -> None:
    """Run three steps and print the peak memory in MB; plain fine-tuning has no teacher in memory."""
    settings = tyro.cli(Throughput, args=arguments)
    if kind == "plain":
        optimizer = dataclasses.replace(settings.optimizer, text_weight=1.0)
        settings = dataclasses.replace(settings, optimizer=optimizer)
    run = _training_run(settings)
    step = _plain_step(run) if kind == "plain" else run.train_step
    for _ in range(3):
        step()
    if run.accelerator.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    status = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    print(next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")))


def _seconds(job: Callable[[], Any], run: TrainingRun) -> float:
    start = time.perf_counter()
    job()
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(settings: Quality | Throughput) -> None:
    """Run the chosen benchmark."""
    quiet_transformers()
    if isinstance(settings, Quality):
        quality(settings)
    else:
        throughput(settings)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"quality": Quality, "throughput": Throughput}))
