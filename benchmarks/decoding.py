"""Time a token of SmolLM2 on a CPU: transformers' eager `generate`, flextron's decoder, llama.cpp; full and narrowed.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --dtype int8

Each engine runs in a process of its own, because the idle threads of one slow the other, and engines take turns.
llama.cpp runs exports of the same sub-networks in the same type. The greedy texts are compared too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro

from flextron import ElasticModel, Subnet
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_environment
from flextron.exporting.gguf.engine import LlamaCpp
from flextron.inference.streaming import stream_tokens
from model import write_results

PROMPT = "Once upon a time, in a land far away, there was a library with"
WIDTHS = {"full": (1536, 3), "81% of the layers' weights": (1152, 3), "50%": (704, 2)}
"""Neurons and KV groups of every layer."""
_GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}


@dataclass(frozen=True)
class Settings:
    """Time decoding."""

    new_tokens: int = 64
    """Number of tokens to generate; the first comes with the prompt and is not timed."""
    rounds: int = 3
    """Number of rounds, in which engines take turns; medians are printed."""
    threads: int = torch.get_num_threads()
    """Threads of each engine."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of the weights. Beside int8, llama.cpp runs Q8_0, and transformers float32."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Run:
    """What one engine is to do."""

    engine: str
    size: str
    file: Path
    """Its export, for llama.cpp."""
    settings: Settings


def main(settings: Settings) -> None:
    """Time all runs and print the results."""
    print(describe_environment())
    with tempfile.TemporaryDirectory() as folder:
        files = {size: Path(folder) / f"{number}.gguf" for number, size in enumerate(WIDTHS)}
        for size, file in files.items():
            print(f"exporting {size}", flush=True)
            export(file, size, _GGUF_TYPES[settings.dtype])
        runs = [Run("transformers", "full", files["full"], settings)]
        runs += [Run(engine, size, files[size], settings) for size in WIDTHS for engine in ("flextron", "llama.cpp")]
        found: dict[tuple[str, str], list[float]] = {(run.engine, run.size): [] for run in runs}
        texts: dict[tuple[str, str], list[int]] = {}
        for _ in range(settings.rounds):
            for run in runs:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    tokens, ms = process.submit(measure, run).result()
                print(f"{run.engine}, {run.size}: {ms:.1f} ms a token", flush=True)
                found[run.engine, run.size].append(ms)
                texts[run.engine, run.size] = tokens
    print(f"\n{settings.dtype}, {settings.threads} threads, medians of {settings.rounds} rounds, ms a token\n")
    print("| | " + " | ".join(WIDTHS) + " |\n|---|" + "---:|" * len(WIDTHS))
    for engine in ("transformers", "flextron", "llama.cpp"):
        cells = [found.get((engine, size)) for size in WIDTHS]
        print(f"| {engine} | " + " | ".join("" if ms is None else f"{median(ms):.1f}" for ms in cells) + " |")
    speeds = [median(a / b for a, b in zip(found["llama.cpp", s], found["flextron", s], strict=True)) for s in WIDTHS]
    print("| flextron's speed in llama.cpp's | " + " | ".join(f"{speed:.2f}" for speed in speeds) + " |")
    equal = texts["flextron", "full"] == texts["transformers", "full"]
    print(f"\nsame greedy text of {settings.new_tokens} tokens as transformers: {equal}")
    write_results(settings.out, {"ms": {" ".join(key): ms for key, ms in found.items()}, "equal": equal})


def export(file: Path, size: str, dtype: str) -> None:
    neurons, groups = WIDTHS[size]
    subnet = f"neurons={neurons},kv_groups={groups}"
    command = [sys.executable, "-m", "flextron.cli", "export", str(smollm2_path()), str(file), "--to", "gguf"]
    subprocess.run([*command, "--quantize", dtype, "--subnet", subnet], check=True, capture_output=True)


def measure(run: Run) -> tuple[list[int], float]:
    """Return the tokens, and the ms of each after the first; after one run to warm up."""
    count = run.settings.new_tokens
    if run.engine == "llama.cpp":
        with LlamaCpp(run.file, context=512, threads=run.settings.threads) as engine:
            prompt = engine.tokenize(PROMPT)
            engine.times(prompt, count)
            return [], engine.times(prompt, count).per_token_ms
    torch.set_num_threads(run.settings.threads)
    quiet_transformers()
    is_eager = run.engine == "transformers"
    dtype = "float32" if is_eager and run.settings.dtype == "int8" else run.settings.dtype
    model = ElasticModel.from_pretrained("smollm2", dtype=dtype)
    prompt_BT = model.tokenizer(PROMPT, return_tensors="pt").input_ids  # type: ignore[misc]
    neurons, groups = WIDTHS[run.size]
    subnet = model.search_space.uniform(neurons, groups)
    decode = _eager if is_eager else _ours
    decode(model, subnet, prompt_BT, count)
    return decode(model, subnet, prompt_BT, count)


def _eager(model: Any, subnet: Subnet, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[list[int], float]:
    """Take the whole time minus that of one token."""
    options = {"attention_mask": torch.ones_like(prompt_BT), "do_sample": False}
    with torch.inference_mode(), model.use(subnet):
        start = time.perf_counter()
        model.generate(prompt_BT, max_new_tokens=1, **options)
        one = time.perf_counter() - start
        start = time.perf_counter()
        output_BT = model.generate(prompt_BT, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)
        whole = time.perf_counter() - start
    return output_BT[0, prompt_BT.shape[1] :].tolist(), 1000 * (whole - one) / (new_tokens - 1)


def _ours(model: Any, subnet: Subnet, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[list[int], float]:
    stream = stream_tokens(model, subnet, prompt_BT, max_new_tokens=new_tokens)
    tokens = [next(stream)]
    start = time.perf_counter()
    tokens += stream
    return tokens, 1000 * (time.perf_counter() - start) / (new_tokens - 1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
