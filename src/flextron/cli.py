"""The command line: one sub-command per verb, which imports the verb when it runs. No torch behind `--help`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
    QuickstartConfig,
    RankConfig,
    TrainConfig,
)
from flextron.errors import FlextronError

if TYPE_CHECKING:
    from flextron.elastic import ElasticModel

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


def _evaluate(config: EvaluateConfig) -> None:
    from flextron.choice import choose
    from flextron.data import load_blocks
    from flextron.evaluation import evaluate

    model = _load(config)
    subnets = [choose(model, wish, config.model) for wish in config.subnet]
    blocks = load_blocks(model.tokenizer, config.text, tokens=config.tokens, block_tokens=config.block_tokens)
    results = evaluate(model, subnets, blocks, show=True)
    if config.json:
        rows = [{"name": wish, **asdict(result)} for wish, result in zip(config.subnet, results, strict=True)]
        numbers = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # no NaN
        print(json.dumps(numbers, indent=1, allow_nan=False))
        return
    first = config.subnet[0]
    print(f"{results[0].tokens} tokens of {config.text}; ± is the standard error over blocks of {config.block_tokens}")
    print(f"{'sub-network':<28}{'share':>7}{'nats/token':>18}{'bits/byte':>11}   above {first}")
    for wish, result in zip(config.subnet, results, strict=True):
        loss = f"{result.nats_per_token:.4f} ±{result.standard_error:.4f}"
        above = f"{result.difference:+.4f} ±{result.difference_standard_error:.4f}"
        print(f"{wish:<28}{result.share:>7.1%}{loss:>18}{result.bits_per_byte:>11.4f}   {above}")


def _generate(config: GenerateConfig) -> None:
    from flextron.choice import choose
    from flextron.generation import generate

    model = _load(config)
    subnet = choose(model, config.subnet, config.model)
    generate(
        model,
        config.prompt,
        subnet=subnet,
        max_new_tokens=config.max_new_tokens,
        chat=config.chat,
        temperature=config.temperature,
        seed=config.seed,
        stream=True,
    )


def _export(config: ExportConfig) -> None:
    from flextron.atomic import check_new
    from flextron.choice import choose
    from flextron.exporting import export

    check_new(config.out, overwrite=config.overwrite)
    model = _load(config)
    subnet = choose(model, config.subnet, config.model)
    report = export(model, subnet, config.out, overwrite=config.overwrite, remote_code=config.remote_code)
    print(report)


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
    EvaluateConfig: _evaluate,
    GenerateConfig: _generate,
    ExportConfig: _export,
    EnvConfig: _env,
}

if __name__ == "__main__":
    raise SystemExit(main())
