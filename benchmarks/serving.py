"""The serving engine beside llama.cpp's server and transformers' continuous batching.

    python benchmarks/serving.py steps MODEL         # tokens/s at batch 1 to 16, and products of few rows
    python benchmarks/serving.py idle MODEL          # what the server adds to the first token and to each further one
    python benchmarks/serving.py burst MODEL OUT     # goodput over a burst, every server in turn, interleaved

MODEL is an elastic checkpoint or a pack, such as src/flextron/packs/smollm2. All run in float32, with as many threads.
Run it on an idle machine. `burst` starts each server anew for each replay.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from flextron import ElasticModel
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_environment
from flextron.serving.bench import Summary, Target, burst_trace, losses_of_levels, replay, sample_prompts
from flextron.serving.embedded.mixed import few_rows_linear
from flextron.serving.embedded.running import make_engine
from flextron.serving.engine import End, Event, Request, Sampling
from flextron.serving.levels import make_levels

SERVERS = ("fixed full", "fixed 0.6x", "adaptive", "llama.cpp full", "llama.cpp 0.6x")
PROMPT, NEW = 48, 64


@dataclass(frozen=True)
class Steps:
    """Time products of few rows, and whole batches of texts: flextron, transformers' continuous batching, llama.cpp."""

    model: tyro.conf.Positional[str]
    """Elastic checkpoint or pack."""
    rounds: int = 3
    """Number of interleaved rounds; medians are printed."""
    batches: tuple[int, ...] = (1, 4, 8, 16)
    """Numbers of texts at once."""


@dataclass(frozen=True)
class Idle:
    """Time one request at a time: the model's own prefill, the engine alone, and the server over HTTP, in turn."""

    model: tyro.conf.Positional[str]
    """Elastic checkpoint or pack."""
    rounds: int = 7
    """Number of interleaved rounds; medians are printed."""
    prompts: tuple[int, ...] = (48, 256)
    """Lengths of prompts, in tokens."""


@dataclass(frozen=True)
class Burst:
    """Replay one burst against every server in turn, with the same objectives."""

    model: tyro.conf.Positional[str]
    """Elastic checkpoint or pack."""
    out: tyro.conf.Positional[Path]
    """Folder for burst.jsonl, which grows."""
    rounds: int = 2
    """Number of interleaved rounds."""
    rates: tuple[float, float, float] = (0.4, 3.0, 0.4)
    """Requests a second: calm, burst, calm."""
    seconds: tuple[float, float, float] = (15.0, 20.0, 25.0)
    """Length of each part."""
    ttft_ms: float = 2500.0
    """Objective for the time to the first token."""
    tpot_ms: float = 160.0
    """Objective for the time of each further token."""
    floor: str = "0.5x"
    """Narrowest level that adaptive requests may get."""
    servers: tuple[str, ...] = SERVERS
    """Which servers."""


def main(settings: Steps | Idle | Burst) -> None:
    """Run one verb."""
    print(describe_environment(), flush=True)
    if isinstance(settings, Steps):
        run_steps(settings)
    elif isinstance(settings, Idle):
        run_idle(settings)
    else:
        run_burst(settings)


def run_steps(options: Steps) -> None:
    """Whole texts of 48 + 64 tokens, all at once; engines take turns, each in a process of its own."""
    products()
    prompts = [[1000 + 7 * i + j for j in range(PROMPT)] for i in range(max(options.batches))]
    found: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        files = {name: export(options.model, Path(folder) / f"{name}.gguf", name) for name in ("full", "60%")}
        engines: dict[str, Callable[..., float]] = {
            "flextron, full": partial(of_flextron, options.model, 1),
            "flextron, 0.6x": partial(of_flextron, options.model, 0),
            "transformers' continuous batching, full": partial(of_transformers, options.model),
            **{f"llama.cpp's server, {name}": partial(of_llamacpp, file) for name, file in files.items()},
        }
        spawn = get_context("spawn")
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in engines}
        for _ in range(options.rounds):
            for batch in options.batches:
                for name, run in engines.items():
                    speed = processes[name].submit(run, prompts[:batch]).result()
                    print(f"{name}, {batch} texts: {speed:.1f} tokens/s", flush=True)
                    found.setdefault((name, batch), []).append(speed)
    print(f"\ntokens/s of all texts together, prompts of {PROMPT} tokens included; median of {options.rounds}\n")
    print("| | " + " | ".join(f"{batch} texts" for batch in options.batches) + " |")
    print("|---|" + "---:|" * len(options.batches))
    for name in engines:
        print(f"| {name} | " + " | ".join(f"{median(found[name, batch]):.1f}" for batch in options.batches) + " |")


@cache
def load(model: str) -> ElasticModel:
    """The model, once in a process."""
    quiet_transformers()
    return ElasticModel.from_pretrained(model, dtype="float32")


def of_flextron(path: str, level: int, prompts: list[list[int]]) -> float:
    model = load(path)
    engine, done = make_engine(model, make_levels(model, shares=(1.0, 0.6))), threading.Semaphore(0)
    engine.start()
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        request = Request(str(i), tuple(prompt), NEW, level, level, Sampling(temperature=0))
        engine.submit(request, lambda event: done.release() if isinstance(event, End) else None)
    for _ in prompts:
        done.acquire()
    seconds = time.perf_counter() - start
    engine.stop()
    return len(prompts) * NEW / seconds


def of_transformers(path: str, prompts: list[list[int]]) -> float:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load(path)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=512, use_cuda_graph=False)
    start = time.perf_counter()
    answers = model.lm.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    seconds = time.perf_counter() - start
    written = sum(len(answer.generated_tokens) for answer in answers.values())
    assert written == len(prompts) * NEW, written
    return written / seconds


def of_llamacpp(file: Path, prompts: list[list[int]]) -> float:
    with llama_server(file, len(prompts)) as address:
        start = time.perf_counter()
        threads = [threading.Thread(target=complete, args=(address, prompt)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(prompts) * NEW / (time.perf_counter() - start)


def complete(address: str, prompt: list[int]) -> None:
    body = {"prompt": prompt, "n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
        assert json.load(answer)["tokens_predicted"] == NEW


@contextmanager
def llama_server(file: Path, parallel: int) -> Iterator[str]:
    """llama.cpp's own server, in this process, with float32 weights and its default cache."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx, params.n_gpu_layers = str(file), parallel, 512 * parallel, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity, params.warmup, params.fit_params, params.cache_ram_mib = -1, True, False, 0
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def export(model: str, file: Path, subnet: str) -> Path:
    command = [sys.executable, "-m", "flextron.cli", "export", model, str(file), "--to", "gguf", "--quantize", "f32"]
    subprocess.run([*command, "--subnet", subnet], check=True, capture_output=True)
    return file


def products() -> None:
    """All products of a SmolLM2-sized model with few rows: torch's linear and ours."""
    shapes = [(1536, 576)] * 60 + [(576, 1536)] * 30 + [(576, 576)] * 60 + [(192, 576)] * 60 + [(49152, 576)]
    weights = [torch.randn(shape) for shape in shapes]
    print("\nall products of SmolLM2, ms, best of 8\n\n| rows | torch's linear | ours |\n|---:|---:|---:|")
    with torch.inference_mode():
        for rows in (1, 2, 4, 8, 16, 32, 64):
            inputs = {size: torch.randn(rows, size) for size in (576, 1536)}
            best = []
            for product in (torch.nn.functional.linear, few_rows_linear):
                times = []
                for _ in range(8):
                    start = time.perf_counter()
                    for weight in weights:
                        product(inputs[weight.shape[1]], weight, None)
                    times.append(1000 * (time.perf_counter() - start))
                best.append(min(times))
            print(f"| {rows} | {best[0]:.0f} | {best[1]:.0f} |")


def run_idle(options: Idle) -> None:
    """One request at a time, at full width; prompts are random, so that no prefix is shared."""
    spawn, draw = get_context("spawn"), torch.Generator().manual_seed(0)
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with flextron_server(options.model) as address, ExitStack() as stack:
        alone, beside = (stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in range(2))
        runs: dict[str, Callable[[list[int]], tuple[float, float]]] = {
            "model's own prefill": lambda prompt: alone.submit(own_prefill, options.model, prompt).result(),
            "engine": lambda prompt: beside.submit(through_engine, options.model, prompt).result(),
            "server": partial(through_server, address),
        }
        for number in range(options.rounds + 1):
            for size in options.prompts:
                for name, run in runs.items():
                    times = run(torch.randint(1000, 40000, (size,), generator=draw).tolist())
                    if number:  # the first round warms up
                        found.setdefault((size, name), []).append(times)
    print(f"\nms, medians of {options.rounds} rounds; {NEW} new tokens, full width\n")
    print("| prompt | model's own prefill | engine, first token | server, first token | / prefill ", end="")
    print("| engine, further token | server, further token | server adds |\n" + "|---:" * 8 + "|")
    for size in options.prompts:
        (prefill, _), (first, further), (served, more) = (
            map(median, zip(*found[size, name], strict=True)) for name in runs
        )
        print(f"| {size} | {prefill:.1f} | {first:.1f} | {served:.1f} | {served / prefill:.2f} ", end="")
        print(f"| {further:.2f} | {more:.2f} | {more - further:.2f} |")


@torch.inference_mode()
def own_prefill(path: str, prompt: list[int]) -> tuple[float, float]:
    """Milliseconds of transformers' forward pass over a prompt, with the logits of its last token."""
    model, tokens = load(path), torch.tensor([prompt])
    start = time.perf_counter()
    model(tokens, use_cache=True, logits_to_keep=1)
    return 1000 * (time.perf_counter() - start), 0.0


@cache
def engine_of(path: str) -> Any:
    model = load(path)
    engine = make_engine(model, make_levels(model, shares=(1.0, 0.6)))
    engine.start()
    return engine


def through_engine(path: str, prompt: list[int]) -> tuple[float, float]:
    """Milliseconds to the first token, and of each further one, without a server."""
    engine, done, at = engine_of(path), threading.Event(), []
    full = len(engine.levels) - 1

    def note(event: Event) -> None:
        if isinstance(event, End):
            done.set()
        else:
            at.append(event.at)

    start = time.perf_counter()
    engine.submit(Request(f"{start}", tuple(prompt), NEW, full, full, Sampling(temperature=0)), note)
    done.wait()
    return 1000 * (at[0] - start), 1000 * (at[-1] - at[0]) / (NEW - 1)


def through_server(address: str, prompt: list[int]) -> tuple[float, float]:
    """The same over HTTP, as a client sees it."""
    body = {"model": "model", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True, "ignore_eos": True}
    headers, at = {"Content-Type": "application/json"}, []
    start = time.perf_counter()
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
        for line in answer:
            if line.startswith(b"data: {"):
                at.append(time.perf_counter())
    return 1000 * (at[0] - start), 1000 * (at[-1] - at[0]) / (NEW - 1)


def run_burst(options: Burst) -> None:
    """One trace, the same objectives, each server in turn, `rounds` times."""
    arrivals = burst_trace(sample_prompts(PROMPT), rates=options.rates, seconds=options.seconds)
    print(
        f"{len(arrivals)} requests, {PROMPT} words, 16 to 48 new tokens; {options.rates} requests/s for "
        f"{options.seconds} s; objectives {options.ttft_ms:g} ms to the first token, {options.tpot_ms:g} ms a token"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for number in range(options.rounds):
        for name in options.servers:
            with served(name, options) as target:
                losses = losses_of_levels(target)
                start = time.perf_counter()
                outcomes = replay(target, arrivals)
                summary = Summary.of(outcomes, target, time.perf_counter() - start, losses)
            print(f"\nround {number + 1}, {name}\n" + "\n".join(summary.lines()), flush=True)
            with (options.out / "burst.jsonl").open("a", encoding="utf8") as lines:
                lines.write(json.dumps({"server": name, "round": number, **vars(summary)}) + "\n")


@contextmanager
def served(name: str, options: Burst) -> Iterator[Target]:
    objectives = {"ttft_ms": options.ttft_ms, "tpot_ms": options.tpot_ms}
    if name.startswith("llama.cpp"):
        subnet = "full" if name.endswith("full") else "60%"
        with (
            tempfile.TemporaryDirectory() as folder,
            llama_server(export(options.model, Path(folder) / "model.gguf", subnet), 16) as address,
        ):
            yield Target(address, "llama", **objectives)
        return
    adaptive = name.startswith("adaptive")
    budget = None if adaptive else name.removeprefix("fixed ")
    with flextron_server(options.model, "--floor", options.floor) as address:
        yield Target(address, "model", budget, send_objectives=adaptive, **objectives)


@contextmanager
def flextron_server(model: str, *more: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flextron.cli", "serve", model, "--port", str(port), "--served-name", "model"]
    process = subprocess.Popen([*command, "--dtype", "float32", *more], env=os.environ, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server ended with {process.returncode}")


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"steps": Steps, "idle": Idle, "burst": Burst}))
