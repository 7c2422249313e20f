"""Time a token of SmolLM2 on a CPU: transformers' eager `generate`, flextron's decoder, llama.cpp; full and narrowed.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --dtype int8

Each engine runs in a process of its own, because the idle threads of one slow the other, and engines take turns.
llama.cpp runs exports of the same sub-networks in the same type. The greedy texts are compared too. Beside the times:
the bytes of the weights that a token reads, the share that this makes of what the memory gives, and resident memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro

from flextron import ElasticModel, Subnet
from flextron.costs.formulas import formula_table
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_environment
from flextron.exporting.gguf.engine import LlamaCpp
from flextron.inference.streaming import stream_tokens
from model import write_results

PROMPT = "Once upon a time, in a land far away, there was a library with"
WIDTHS = {"full": (1536, 3), "81% of the layers' weights": (1152, 3), "50%": (704, 2)}
"""Neurons and KV groups of every layer."""
ENGINES = ("transformers", "flextron", "llama.cpp")
_GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_1"}
_READ_BYTES = 2**30


@dataclass(frozen=True)
class Settings:
    """Time decoding."""

    new_tokens: int = 64
    """Number of tokens to generate; the first comes with the prompt and is not timed."""
    rounds: int = 3
    """Number of rounds, in which engines take turns; medians are printed."""
    threads: int = torch.get_num_threads()
    """Threads of each engine."""
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Type of the weights. Beside int8 and int4, llama.cpp runs Q8_0 and Q4_0, and transformers is left out."""
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


@dataclass(frozen=True)
class Found:
    """What one engine did."""

    tokens: list[int]
    ms: float
    """Of each token after the first."""
    weights_bytes: int
    """That a token reads."""
    resident_bytes: int
    """Of the process after decoding."""
    peak_bytes: int
    """The most that it had resident, loading included."""


def main(settings: Settings) -> None:
    """Time all runs and print the results."""
    print(describe_environment())
    found: dict[tuple[str, str], list[Found]] = {}
    speeds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {size: Path(folder) / f"{number}.gguf" for number, size in enumerate(WIDTHS)}
        for size, file in files.items():
            print(f"exporting {size}", flush=True)
            export(file, size, _GGUF_TYPES[settings.dtype])
        engines = ENGINES if settings.dtype in ("float32", "bfloat16") else ENGINES[1:]
        for _ in range(settings.rounds):
            speeds.append(_apart(memory_speed, settings.threads))
            print(f"the memory gives {speeds[-1]:.1f} GB/s", flush=True)
            for run in (Run(engine, size, files[size], settings) for size in WIDTHS for engine in engines):
                found.setdefault((run.engine, run.size), []).append(_apart(measure, run))
                print(f"{run.engine}, {run.size}: {found[run.engine, run.size][-1].ms:.1f} ms a token", flush=True)
    speed = median(speeds)
    print(
        f"\n{settings.dtype}, {settings.threads} threads, {settings.rounds} rounds; the memory gives {speed:.1f} GB/s\n"
    )
    print("| | " + " | ".join(WIDTHS) + " |\n|---|" + "---:|" * len(WIDTHS))
    for engine in engines:
        print(f"| {engine} | " + " | ".join(_cell(found[engine, size], speed) for size in WIDTHS) + " |")
    ratios = [
        median(theirs.ms / ours.ms for theirs, ours in zip(found["llama.cpp", s], found["flextron", s], strict=True))
        for s in WIDTHS
    ]
    print("| flextron's speed in llama.cpp's | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    print("\nCells: ms a token (least to most); MB of weights read, share of the memory's speed; MB resident, at peak.")
    for size in WIDTHS if "transformers" in engines else ():
        equal = found["flextron", size][-1].tokens == found["transformers", size][-1].tokens
        print(f"same greedy text of {settings.new_tokens} tokens as transformers, {size}: {equal}")
    runs = {" ".join(key): [asdict(one) for one in each] for key, each in found.items()}
    write_results(settings.out, {"runs": runs, "memory_gb_s": speeds})


def _apart(function: Any, argument: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, argument).result()


def _cell(found: list[Found], speed: float) -> str:
    ms, megabytes = [each.ms for each in found], found[0].weights_bytes / 1e6
    share = megabytes / median(ms) / speed
    resident, peak = (
        median(each) / 1e6 for each in zip(*((f.resident_bytes, f.peak_bytes) for f in found), strict=True)
    )
    return (
        f"{median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f}); {megabytes:.0f}, {share:.0%}; {resident:.0f}, {peak:.0f}"
    )


def memory_speed(threads: int) -> float:
    """Return how many GB a second the memory gives, at best of some sums of an array."""
    torch.set_num_threads(threads)
    numbers = torch.ones(_READ_BYTES // 4)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return _READ_BYTES / min(seconds) / 1e9


def export(file: Path, size: str, dtype: str) -> None:
    neurons, groups = WIDTHS[size]
    subnet = f"neurons={neurons},kv_groups={groups}"
    command = [sys.executable, "-m", "flextron.cli", "export", str(smollm2_path()), str(file), "--to", "gguf"]
    subprocess.run([*command, "--quantize", dtype, "--subnet", subnet], check=True, capture_output=True)


def measure(run: Run) -> Found:
    """Decode once to warm up, and once for the result."""
    count = run.settings.new_tokens
    if run.engine == "llama.cpp":
        with LlamaCpp(run.file, context=512, threads=run.settings.threads) as engine:
            prompt = engine.tokenize(PROMPT)
            engine.times(prompt, count)
            ms = engine.times(prompt, count).per_token_ms
            return Found([], ms, run.file.stat().st_size, *_memory())
    torch.set_num_threads(run.settings.threads)
    quiet_transformers()
    model = ElasticModel.from_pretrained("smollm2", dtype=run.settings.dtype)
    prompt_BT = model.tokenizer(PROMPT, return_tensors="pt").input_ids  # type: ignore[misc]
    neurons, groups = WIDTHS[run.size]
    subnet = model.search_space.uniform(neurons, groups)
    decode = _eager if run.engine == "transformers" else _ours
    decode(model, subnet, prompt_BT, count)
    tokens, ms = decode(model, subnet, prompt_BT, count)
    weights_bytes = int(formula_table(model, "weights").price(subnet))
    return Found(tokens, ms, weights_bytes, *_memory())


def _memory() -> tuple[int, int]:
    """Bytes of this process that are resident, and the most that were. It reads /proc, so it needs Linux."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf8").split()[1])
    return pages * resource.getpagesize(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
