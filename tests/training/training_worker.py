"""A tiny training run, ways to end it early, and the work of two processes on it (see test_sharding.py)."""

import json
import os
import random
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

import tiny
from flextron import cli
from flextron.elastic.model import projections_of
from flextron.elastic.permutation import permute
from flextron.elastic.shrinking import small_copy
from flextron.errors import FlextronError
from flextron.exporting.pack import make_pack, save_pack
from flextron.model import ElasticModel
from flextron.ranking.importance import rank
from flextron.ranking.sensitivity import measure_sensitivity
from flextron.training import run as training

STEPS = 6
TIMES = ("seconds", "tokens_per_second")
"""Fields that differ between two equal runs."""


def make_checkpoint(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A tiny ranked model with sensitivities and a tokenizer."""
    model = ElasticModel(tiny.plain_model(model_type, vocab_size=300, **changes), tiny.tokenizer())
    permute(model, tiny.ranking_for(model))
    sensitivity = measure_sensitivity(model, tiny.blocks(2, vocab=300))
    model.lm.to(dtype)
    model.lm.config.dtype = dtype
    model.lm.generation_config.eos_token_id = [1, 2]  # which the config does not say
    model.save_pretrained(folder)
    sensitivity.save(folder)
    return folder


def make_mixture(folder: Path) -> Path:
    """A tiny ranked mixture of experts. Its files hold the experts one by one, the model holds them together."""
    model = ElasticModel(small_copy(AutoConfig.for_model("mixtral"), vocab_size=300), tiny.tokenizer())
    rank(model, tiny.blocks(4, vocab=300))
    model.save_pretrained(folder)
    measure_sensitivity(model, tiny.blocks(2, vocab=300)).save(folder)
    return folder


@torch.no_grad()
def make_packed(folder: Path, base: Path, trained: Path) -> Path:
    """A pack of a checkpoint made from `trained` by changes of rank 2."""
    model, draw = ElasticModel.from_pretrained(trained), torch.Generator().manual_seed(1)
    for projection in projections_of(model).values():
        rows, columns = projection.matrix().shape
        change = torch.randn(rows, 2, generator=draw) @ torch.randn(2, columns, generator=draw)
        projection.matrix().add_(0.02 * change)
    blocks = tiny.blocks(8, 32, vocab=300)
    pack = make_pack(model, ElasticModel.from_pretrained(base), blocks, base_name=str(base))
    save_pack(pack, folder, model, "# A pack")
    return folder


def make_text(file: Path) -> Path:
    """Documents of 2 to 60 words: some blocks hold several, some a part of one."""
    draw, words = random.Random(0), tiny.TEXT.split()  # noqa: S311
    texts = (" ".join(draw.choices(words, k=draw.randint(2, 60))) for _ in range(300))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def command(model: Path, text: Path, out: Path, **options) -> list[str]:
    """Return a command line of `flextron train` for STEPS steps; `options` replace or add options, None removes one."""
    words = {
        "data": text,
        "tokens": STEPS * 256,
        "block_tokens": 32,
        "cache": text.parent / "cache",
        "visits": (1, 1, 0, 2),
        "visits_per_step": 4,
        "blocks_per_visit": 2,
        "learning_rate": 3e-4,
        "text_weight": 0,
        "precision": "fp32",
        "device": "cpu",
        "evaluate_on": ("full", "50%"),
        "evaluate_text": text,
        "evaluate_tokens": 128,
        "evaluations": 2,
        **options,
    }
    line = ["train", str(model), str(out)]
    for name, value in words.items():
        if value is not None:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            line += [f"--{name.replace('_', '-')}", *map(str, values)]
    return line


def run(model: Path, text: Path, out: Path, **options) -> Path:
    """Train in this process with the options of `command`."""
    return training.train(cli.parse(command(model, text, out, **options)))


def records(out: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def steps_of(out: Path) -> list[dict]:
    return [record for record in records(out) if "visits" in record]


@contextmanager
def before_step(step: int, act):
    """Call `act` before the training step `step`, counted from 1."""
    real = training.TrainingRun.train_step

    def acting(run):
        if run.step + 1 == step:
            act()
        return real(run)

    training.TrainingRun.train_step = acting
    try:
        yield
    finally:
        training.TrainingRun.train_step = real


@contextmanager
def stopped_in(step: int, number: int = signal.SIGINT, *, by_this_process: bool = True):
    """Send the signal to this process, or to none, during a training step; the run must stop after that step."""
    try:
        with before_step(step, lambda: signal.raise_signal(number) if by_this_process else None):
            yield
    except KeyboardInterrupt:
        return
    raise AssertionError("the run did not stop")


class Killed(BaseException):
    """Stands for the end of the process; nothing catches it."""


def kill() -> None:
    raise Killed


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def main(folder: Path) -> None:
    """Run several jobs in each of two processes, some in turn with the test's own process."""
    rank = int(os.environ["RANK"])
    text = folder / "text.jsonl"

    def go(name: str, model: Path = folder / "model", **options) -> None:
        run(model, text, folder / name, **options)

    go("two", **OPTIONS)
    go("trained head", **OPTIONS, train_embeddings=True, text_weight=0.5, gradient_checkpointing=True)
    go("tied", folder / "tied model", **OPTIONS, train_embeddings=True)
    go("bf16", folder / "bf16 model", **{**OPTIONS, "precision": "bf16"})
    go("adapters", **OPTIONS, lora_rank=2)
    go("bf16 adapters", folder / "bf16 model", **{**OPTIONS, "precision": "bf16"}, lora_rank=2)
    go("renamed", folder / "renamed model", **OPTIONS)
    go("mixture", folder / "mixture model", **{**OPTIONS, "smallest": "50%"})
    go("pack", folder / "pack model", **OPTIONS, train_pack=True)
    go("taught", **OPTIONS, lora_rank=2, teacher=folder / "tied model")
    go("replicated", **OPTIONS, replicate=True, train_embeddings=True, text_weight=0.5)
    with stopped_in(3):
        go("replicated adapters", **OPTIONS, lora_rank=2, replicate=True)
    go("replicated adapters", **OPTIONS, lora_rank=2, replicate=True)
    with stopped_in(4, by_this_process=rank == 0):  # a signal may reach other processes a step later
        go("one two", **OPTIONS)
    with stopped_in(2):
        go("two one two", **OPTIONS)
    wrong: dict[str, dict] = {"uneven": {"blocks_per_visit": 3}, "no text": {"data": folder / "nowhere"}}
    wrong |= {"damaged": {"model": folder / "damaged model"}}
    for name, options in wrong.items():
        try:
            go(name, **{**OPTIONS, **options})
        except (ValueError, FlextronError) as error:
            (folder / f"{name}-{rank}.error").write_text(str(error))
    (folder / f"waiting-{rank}").touch()
    wait_for((folder / "go on").exists)
    go("two one two", **OPTIONS)
    print("ready to be stopped", flush=True)
    go("stopped", **{**OPTIONS, "tokens": 10**7})


OPTIONS = {"smallest": "neurons=0,kv_groups=1"}
"""Visits skip sub-layers too."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    main(Path(sys.argv[1]))
