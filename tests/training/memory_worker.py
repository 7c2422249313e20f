"""Memory of one of two processes while it loads a model and trains a step (see test_memory.py)."""

import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from training_worker import command

from flextron import cli
from flextron.elastic.skeleton import skeleton
from flextron.training import run as training
from flextron.training import sharding
from flextron.training.estimate import estimate_training

OPTIONS = {"block_tokens": 64, "tokens": 64 * 4, "visits": (1, 0, 0, 0), "visits_per_step": 1, "smallest": "50%"}
OPTIONS |= {"evaluate_tokens": 0, "evaluations": 1, "save_minutes": 999}
KINDS = {"all weights": {}, "adapters": {"lora_rank": 4}, "adapters in bf16": {"lora_rank": 4, "precision": "bf16"}}


def held() -> int:
    """Bytes of memory that are this process's own; without files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextmanager
def watched(into: dict, name: str, start: int):
    """Note the most that is held inside the block, above `start`."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        into[name] = max(peak, held()) - start


def main(folder: Path, kind: str, whole: str) -> None:
    """Load, and in shards also train; write what was held, and what the dry run expects."""
    rank = int(os.environ["RANK"])
    if whole == "whole":
        assert not sharding.is_pack(str(folder))
        sharding.is_pack = lambda path: True  # of which each process loads the whole
    out = folder / f"{kind} {whole}"
    config = cli.parse(command(folder / "model", folder / "text.jsonl", out, **OPTIONS, **KINDS[kind]))
    found: dict = {}
    torch.set_num_threads(1)
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()  # what torch holds anyway
    import peft  # noqa: F401

    accelerator = training.make_accelerator(config)
    skeleton(config.model)  # what modules and their import take
    sharding.total(torch.ones(1))
    start = held()
    with watched(found, "loading", start):
        run = training.TrainingRun(config, accelerator)
    if whole != "whole":
        run._resume()
        run.train_step()  # from here on the optimizer holds its states
        with watched(found, "step", start):
            run.train_step()
        estimate = estimate_training(config, processes=2)
        found |= {"expected": estimate.total_bytes, "parts": estimate.memory}
    (folder / f"{kind} {whole} {rank}.json").write_text(json.dumps(found))
    run.folder.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
