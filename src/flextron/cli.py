"""The command line: one sub-command per verb, which imports the verb when it runs. No torch behind `--help`."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
import yaml

from flextron import __version__
from flextron.config import (
    COMMANDS,
    EnvConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    MeasureLatencyConfig,
    QuickstartConfig,
    RankConfig,
    RouteConfig,
    TrainConfig,
    TrainRouterConfig,
)
from flextron.errors import CheckpointError, FlextronError

if TYPE_CHECKING:
    from flextron.costs import CostTable
    from flextron.elastic import ElasticModel
    from flextron.routers.token_routing import TokenRouting
    from flextron.routing import Routed
    from flextron.speculative import Draft
    from flextron.subnet import Subnet

DESCRIPTION = "One checkpoint, every latency: nested sub-networks of any Hugging Face LLM. Also: flextron --version."
# What may change between an interrupted `rank` and the run that takes it up.
_NOT_OF_THE_RANKING = ("out", "overwrite", "sensitivity_tokens", "device")
RECIPE_HELP = """

--recipe FILE stands for the options listed in a YAML file, one a line, such as `tokens: 4096`; options given win."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        _RUN[type(config)](config)
    except (FlextronError, ValueError) as error:
        if os.environ.get("FLEXTRON_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept.", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Any:
    """The config of the command that `arguments` names, recipes put in.

    Raises:
        FlextronError: a recipe that cannot be read.
        SystemExit: 0 after help or version, 2 for arguments that do not fit (the message is printed).
    """
    command, *rest = arguments or ["--help"]
    if command == "--version":
        print(f"flextron {__version__}")
        raise SystemExit(0)
    if command not in COMMANDS:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="flextron", description=DESCRIPTION, args=[command, *rest]
        )
    kind = COMMANDS[command]
    description = cleandoc(kind.__doc__ or "") + (RECIPE_HELP if kind is not EnvConfig else "")
    return tyro.cli(kind, prog=f"flextron {command}", args=_with_recipes(rest), description=description)


def _with_recipes(arguments: list[str]) -> list[str]:
    """`arguments` with `--recipe FILE` replaced by the options that the file lists, ahead of all options given."""
    if "--recipe" not in arguments:
        return arguments
    at = arguments.index("--recipe")
    if at + 1 == len(arguments):
        raise FlextronError("--recipe needs a YAML file.")
    given = [*arguments[:at], *arguments[at + 2 :]]
    first_option = next((place for place, word in enumerate(given) if word.startswith("--")), len(given))
    return [*given[:first_option], *_recipe_arguments(arguments[at + 1]), *given[first_option:]]


def _recipe_arguments(file: str) -> list[str]:
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FlextronError(f"cannot read the recipe {file}: {error}") from None
    if not isinstance(recipe, dict):
        raise FlextronError(f"the recipe {file} must list options, one a line, such as `tokens: 4096`.")
    arguments = []
    for key, value in recipe.items():
        name = str(key).replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(item) for item in values)]
    return arguments


def _load(config: Any) -> ElasticModel:
    from flextron.checkpoint import quiet_transformers
    from flextron.elastic import ElasticModel

    quiet_transformers()
    print(f"loading {config.model}", file=sys.stderr)
    return ElasticModel.from_pretrained(config.model, dtype=config.dtype, device=config.device)


def _folder(model: str) -> Path:
    """MODEL as a folder that takes what is measured; found before anything is loaded."""
    folder = Path(model)
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: {model}. Latency tables and routers are kept beside an elastic checkpoint; "
            "make one with `flextron rank MODEL OUT`."
        )
    return folder


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _chosen(model: ElasticModel, config: GenerateConfig | ExportConfig) -> Subnet:
    """The sub-network that --subnet or --budget asks for."""
    from flextron.choice import choose

    if config.budget is None:
        return choose(model, config.subnet, config.model)
    return _within(model, config.budget, config)


def _tokens_within(model: ElasticModel, budget: str, config: GenerateConfig | EvaluateConfig) -> TokenRouting:
    """How tokens are routed within a budget."""
    from flextron.routing import route_tokens

    hard = isinstance(config, GenerateConfig) and config.hard
    return route_tokens(model, budget, config.model, hard=hard, any_device=config.any_device, warn=_note)


def _show_usage(model: ElasticModel, routing: TokenRouting, text: str, budget: str, file: Path) -> None:
    """Say what the tokens of a text use, and write a picture of it."""
    from flextron.explaining import save_usage, usage_of
    from flextron.token_usage import usage_text

    usage = usage_of(model, routing, text, budget)
    save_usage(usage, file)
    print(f"\n{usage_text(usage)}\nwrote {file}", file=sys.stderr)


def _within(model: ElasticModel, budget: str, config: GenerateConfig | ExportConfig | EvaluateConfig) -> Subnet:
    """The best sub-network within a budget; notes go to standard error."""
    routed = _routed(model, budget, config)
    for note in routed.notes:
        _note(note)
    return routed.subnet


def _routed(model: ElasticModel, budget: str, config: GenerateConfig | ExportConfig | EvaluateConfig) -> Routed:
    from flextron.routing import route
    from flextron.tables import LLAMA_CPP

    engine = LLAMA_CPP if isinstance(config, ExportConfig) and config.to == "gguf" else None
    return route(model, budget, config.model, any_device=config.any_device, engine=engine, warn=_note)


def _rank(config: RankConfig) -> None:
    from flextron.data import load_blocks
    from flextron.sensitivity import measure_sensitivity, sensitivity_blocks

    model = _ranked(config)
    if config.sensitivity_tokens:
        ranked_on = load_blocks(model.tokenizer, config.text, tokens=config.tokens)
        blocks = sensitivity_blocks(
            model.tokenizer, config.text, tokens=config.sensitivity_tokens, after=ranked_on.documents
        )
        measure_sensitivity(model, blocks, show=True).save(config.out)
    print(f"wrote {config.out}: {model.search_space.full}, ranked by {config.score} on {config.text}.")


def _ranked(config: RankConfig) -> ElasticModel:
    """The ranked model, saved; an interrupted run's is taken up, so that only the sensitivities are left to do."""
    from flextron.atomic import check_new, write_text
    from flextron.data import load_blocks
    from flextron.ranking import rank
    from flextron.sensitivity import Sensitivity
    from flextron.subnet import SearchSpace

    asks = {key: value for key, value in asdict(config).items() if key not in _NOT_OF_THE_RANKING}
    wanted = json.dumps({"version": 1, **asks}) + "\n"
    asked = config.out / "rank.json"
    unfinished = asked.is_file() and not Sensitivity.is_in(config.out)
    if unfinished and asked.read_text(encoding="utf8") == wanted and not config.overwrite:
        print(f"{config.out} is ranked already; only its sensitivities are measured.", file=sys.stderr)
        return _load(replace(config, model=str(config.out)))
    check_new(config.out, overwrite=config.overwrite)
    model = _load(config)
    if config.neuron_step is not None:
        space = model.search_space
        sizes = {"layers": space.layers, "neurons": space.neurons[-1], "kv_groups": space.kv_groups[-1]}
        model.search_space = SearchSpace.of_model(**sizes, neuron_step=config.neuron_step)
    rank(model, load_blocks(model.tokenizer, config.text, tokens=config.tokens), score=config.score, show=True)
    model.save_pretrained(config.out, overwrite=config.overwrite)
    write_text(asked, wanted)
    return model


def _train(config: TrainConfig) -> None:
    from flextron.checkpoint import quiet_transformers

    quiet_transformers()
    if config.dry_run:
        from flextron.estimate import estimate_training

        estimate = estimate_training(config, processes=int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            print(estimate)
        return
    from flextron.training import train

    train(config)


def _measure_latency(config: MeasureLatencyConfig) -> None:
    from flextron.tables import describe, save_table

    folder = _folder(config.model)
    if config.from_csv is not None:
        tables = iter([_table_of_csv(config, config.from_csv)])
    else:
        model = _load(config)
        tables = (_measured(model, phase, config) for phase in config.phase)
    for table in tables:
        file = save_table(folder, table)
        print(f"{describe(table)}\nwrote {file}", flush=True)


def _measured(model: ElasticModel, phase: str, config: MeasureLatencyConfig) -> CostTable:
    from flextron.latency import measure_latency

    how = partial(
        measure_latency, model, phase=phase, batch=config.batch, tokens=config.tokens, rounds=config.rounds, show=True
    )
    if not config.in_llamacpp:
        return how()
    from flextron.exporting.timing import in_llamacpp

    with in_llamacpp(model, phase=phase, tokens=config.tokens, quantize=config.quantize) as runner:
        return how(runner=runner)


def _table_of_csv(config: MeasureLatencyConfig, file: Path) -> CostTable:
    from flextron.checkpoint import load_metadata
    from flextron.latency import PHASES, TOKENS
    from flextron.tables import table_from_csv

    (phase,) = config.phase
    space = load_metadata(config.model, {})[0] or _load(config).search_space
    given = {"engine": config.engine, "device": config.device_name, "batch": config.batch}
    given |= {TOKENS[PHASES[phase]]: config.tokens, "dtype": None if config.dtype == "auto" else config.dtype}
    conditions = {key: value for key, value in given.items() if value is not None}
    return table_from_csv(file, space, phase=phase, conditions=conditions)


def _train_router(config: TrainRouterConfig) -> None:
    from flextron.routers.making import describe_router, make_router
    from flextron.routers.pairs import FOLDER

    started = time.monotonic()
    folder = _folder(config.model)
    if config.per_token:
        _train_token_router(config, folder)
        return
    router = make_router(
        _load(config),
        folder,
        phase=config.phase,
        evaluations=config.evaluations,
        tokens=config.tokens,
        text=config.text,
        lowest=config.lowest,
        seed=config.seed,
        any_device=config.any_device,
        show=True,
    )
    print(describe_router(router))
    print(f"\nwrote {folder / FOLDER / router.about.metric} in {time.monotonic() - started:.0f} s.")
    budget = math.ceil(100 * max(0.6, router.net.lowest)) / 100
    print(f"try: flextron route {folder} --budget {router.about.metric}={budget:g}x")


def _train_token_router(config: TrainRouterConfig, folder: Path) -> None:
    from flextron.latency import PHASES
    from flextron.routers.pairs import FOLDER
    from flextron.routers.router import metrics_with_router
    from flextron.routers.token_making import describe_token_router, make_token_router

    metric = PHASES[config.phase]
    if metric not in metrics_with_router(folder):
        print(f"{folder} has no router for {metric}, which a token router starts from; training it first")
        _train_router(replace(config, per_token=False))
    started = time.monotonic()
    router, about = make_token_router(
        _load(config),
        folder,
        phase=config.phase,
        tokens=config.token_tokens,
        text=config.token_text or config.text,
        seed=config.seed,
        any_device=config.any_device,
        show=True,
    )
    print(describe_token_router(router, about))
    print(f"\nwrote {folder / FOLDER / f'{metric}-per-token'} in {time.monotonic() - started:.0f} s.")
    print(f"try: flextron evaluate {folder} --budget {metric}=0.6x --per-token --picture tokens.html")


def _route(config: RouteConfig) -> None:
    from flextron.atomic import write_text
    from flextron.drawing import save_figure, widths_figure
    from flextron.explaining import as_json, as_text, explain
    from flextron.routing import route

    folder = _folder(config.model)
    model = _load(config)
    warnings: list[str] = []
    routed = route(model, config.budget, folder, any_device=config.any_device, warn=warnings.append)
    explained = explain(model, routed, folder, measure=config.measure, warnings=warnings)
    print(as_json(config.budget, explained) if config.json else as_text(routed, explained, folder))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(config.out, routed.subnet.to_json() + "\n")
    if config.picture is not None:
        title = f"{folder.resolve().name} within {config.budget}"
        save_figure(widths_figure({config.budget: routed.subnet}, model.search_space, title), config.picture)
    for file in (config.out, config.picture):
        if file is not None:
            print(f"wrote {file}", file=sys.stderr)


def _evaluate(config: EvaluateConfig) -> None:
    from flextron.choice import choose
    from flextron.data import load_blocks
    from flextron.evaluation import evaluate

    model = _load(config)
    if config.tasks:
        from flextron.tasks.command import evaluate_on_tasks

        print(evaluate_on_tasks(model, config, warn=_note))
        return
    subnets = [choose(model, wish, config.model) for wish in config.subnet]
    subnets += [_within(model, budget, config) for budget in config.budget]
    names = [*config.subnet, *config.budget]
    routings = [_tokens_within(model, budget, config) for budget in config.budget if config.per_token]
    names += [f"{budget} per token" for budget in config.budget if config.per_token]
    blocks = load_blocks(model.tokenizer, config.text, tokens=config.tokens, block_tokens=config.block_tokens)
    results = evaluate(model, [*subnets, *routings], blocks, show=True)
    costs = [None] * len(subnets) + [routing.average_cost for routing in routings]
    if config.json:
        rows = [
            {"name": name, "cost": cost, **asdict(result)}
            for name, cost, result in zip(names, costs, results, strict=True)
        ]
        numbers = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # no NaN
        print(json.dumps(numbers, indent=1, allow_nan=False))
        return
    print(f"{results[0].tokens} tokens of {config.text}; ± is the standard error over blocks of {config.block_tokens}")
    print(f"{'sub-network':<28}{'share':>7}{'nats/token':>18}{'bits/byte':>11}   above {names[0]}")
    for name, result in zip(names, results, strict=True):
        loss = f"{result.nats_per_token:.4f} ±{result.standard_error:.4f}"
        above = f"{result.difference:+.4f} ±{result.difference_standard_error:.4f}"
        print(f"{name:<28}{result.share:>7.1%}{loss:>18}{result.bits_per_byte:>11.4f}   {above}")
    for name, cost in zip(names, costs, strict=True):
        if cost is not None:
            print(f"{name}: its tokens cost {cost:.3f}x of the full model on average, by the latency table")
    if config.picture is not None:
        text = model.tokenizer.decode(blocks.tokens[0])  # type: ignore[union-attr]
        _show_usage(model, routings[-1], text, config.budget[-1], config.picture)


def _generate(config: GenerateConfig) -> None:
    from flextron.generation import compare_speculative, generate

    model = _load(config)
    routing = _tokens_within(model, str(config.budget), config) if config.per_token else None
    options: dict[str, Any] = {"subnet": None if routing else _chosen(model, config)}
    options |= {"max_new_tokens": config.max_new_tokens, "chat": config.chat}
    draft = _draft(model, config)
    start = time.monotonic()
    written = generate(
        model,
        config.prompt,
        routing=routing,
        speculative=draft,
        temperature=config.temperature,
        seed=config.seed,
        stream=True,
        **options,
    )
    if draft is not None:
        _note(f"{draft}; {draft.written / (time.monotonic() - start):.1f} tokens/s with the prompt")
    if draft is not None and config.compare:
        speed_up, equal = compare_speculative(model, config.prompt, draft, **options)
        _note(f"{speed_up:.2f} times as fast as plain greedy decoding, {'the same' if equal else 'another'} text")
    if routing is not None:
        _note(f"tokens cost {routing.average_cost:.3f}x of the full model on average, by the latency table")
    if routing is not None and config.picture is not None:
        _show_usage(model, routing, config.prompt + written, str(config.budget), config.picture)


def _draft(model: ElasticModel, config: GenerateConfig) -> Draft | None:
    """What --speculative asks for."""
    from flextron.choice import choose
    from flextron.config.fields import names_widths
    from flextron.speculative import Draft

    wish = config.speculative
    if wish is None:
        return None
    subnet = choose(model, wish, config.model) if names_widths(wish) else _within(model, wish, config)
    return Draft(subnet, config.draft_tokens)


def _export(config: ExportConfig) -> None:
    from flextron.exporting import check_free, export, export_gguf

    check_free(config.out, to=config.to, overwrite=config.overwrite)
    model = _load(config)
    subnet = _to_export(model, config)
    how: dict[str, Any] = {"overwrite": config.overwrite, "verify": config.verify}
    if config.to == "gguf":
        print(export_gguf(model, subnet, config.out, quantize=config.quantize, **how))
    else:
        print(export(model, subnet, config.out, remote_code=config.remote_code, **how))


def _to_export(model: ElasticModel, config: ExportConfig) -> Subnet:
    """The sub-network that --subnet, --budget and --equal-widths ask for."""
    if not config.equal_widths:
        return _chosen(model, config)
    from flextron.baselines import equal_widths_within
    from flextron.exporting import can_state
    from flextron.pricing import Ceiling, formula_table

    if config.budget is not None:
        limits = _routed(model, config.budget, config).ceilings
    else:
        table = formula_table(model, "parameters")
        limits = (Ceiling(table, table.price(_chosen(model, config)), f"the parameters of {config.subnet}"),)
    return equal_widths_within(limits, lambda s: can_state(model, s, to=config.to, quantize=config.quantize))


def _quickstart(config: QuickstartConfig) -> None:
    from flextron.demo import quickstart

    quickstart(config)


def _env(config: EnvConfig) -> None:
    del config
    from flextron.environment import describe_environment

    print(describe_environment())


_RUN: dict[type, Callable[[Any], None]] = {
    QuickstartConfig: _quickstart,
    RankConfig: _rank,
    TrainConfig: _train,
    MeasureLatencyConfig: _measure_latency,
    TrainRouterConfig: _train_router,
    RouteConfig: _route,
    EvaluateConfig: _evaluate,
    GenerateConfig: _generate,
    ExportConfig: _export,
    EnvConfig: _env,
}

if __name__ == "__main__":
    raise SystemExit(main())
