"""The command line: from arguments and recipes to a config, and to the function in commands/ that runs it.

No torch behind `--help`: what commands need is imported when they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

import tyro
import yaml

from flextron import __version__
from flextron.commands import (
    env,
    evaluate,
    export,
    generate,
    measure_latency,
    quickstart,
    rank,
    route,
    train,
    train_router,
)
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
from flextron.errors import FlextronError

DESCRIPTION = "One checkpoint, every latency: nested sub-networks of any Hugging Face LLM. Also: flextron --version."
RECIPE_HELP = """

--recipe FILE stands for the options listed in a YAML file, one a line, such as `tokens: 4096`; options given win."""
_RUN: dict[type, Callable[[Any], None]] = {
    RankConfig: rank.run,
    TrainConfig: train.run,
    MeasureLatencyConfig: measure_latency.run,
    TrainRouterConfig: train_router.run,
    RouteConfig: route.run,
    EvaluateConfig: evaluate.run,
    GenerateConfig: generate.run,
    ExportConfig: export.run,
    QuickstartConfig: quickstart.run,
    EnvConfig: env.run,
}


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
    except BrokenPipeError:  # who read the output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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


if __name__ == "__main__":
    raise SystemExit(main())
