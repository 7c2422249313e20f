"""The command line: read arguments and recipes into a config, and run the verb's function in commands/.

`--help` imports no torch: each verb imports what it needs when it runs.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

import tyro
import yaml

from flextron import __version__
from flextron.commands import (
    bench_serve,
    env,
    evaluate,
    export,
    generate,
    inspect,
    measure_latency,
    pack,
    quantize,
    quickstart,
    rank,
    route,
    serve,
    train,
    train_router,
)
from flextron.config import (
    COMMANDS,
    BenchServeConfig,
    EnvConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MeasureLatencyConfig,
    PackConfig,
    QuantizeConfig,
    QuickstartConfig,
    RankConfig,
    RouteConfig,
    ServeConfig,
    TrainConfig,
    TrainRouterConfig,
)
from flextron.config.refusals import absurd_number, nearest, plain, shortened, unknown_option
from flextron.elastic.smollm2 import ELASTIC, NAME, elastic_smollm2
from flextron.elastic.source import PACK, source_of
from flextron.errors import FlextronError

DESCRIPTION = "One checkpoint, every latency: nested sub-networks of any Hugging Face LLM."
RECIPE_HELP = (
    "--recipe FILE reads options from a YAML file, one a line, such as `tokens: 4096`. Options on the command line win."
)
LONGEST_RECIPE = 100_000
"""Characters of a recipe; YAML of a thousand times as many would take minutes to read."""
TEXT_COLUMNS = 100
"""Columns of the help's text, on a terminal that has as many."""
_NO_MEMORY = re.compile(r"^MemoryError|OutOfMemoryError|can't allocate memory|Storage size calculation overflowed")
"""How Python, torch on a GPU and torch on a CPU say it."""
_RUN: dict[type, Callable[[Any], None]] = {
    InspectConfig: inspect.run,
    RankConfig: rank.run,
    TrainConfig: train.run,
    MeasureLatencyConfig: measure_latency.run,
    TrainRouterConfig: train_router.run,
    RouteConfig: route.run,
    EvaluateConfig: evaluate.run,
    GenerateConfig: generate.run,
    ServeConfig: serve.run,
    BenchServeConfig: bench_serve.run,
    ExportConfig: export.run,
    PackConfig: pack.run,
    QuantizeConfig: quantize.run,
    QuickstartConfig: quickstart.run,
    EnvConfig: env.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _prepare_outputs()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where its errors are caught, and not when Python ends
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone
        _drop_outputs()
        return 1
    except OSError as error:  # such as a full disk behind the output
        with suppress(OSError):
            print(f"error: cannot print the output: {_said(error)}", file=sys.stderr)
        _drop_outputs()
        return 2


def _run(arguments: Sequence[str]) -> int:
    try:
        config = parse(arguments)
        config = _checked_model(config)  # before torch is imported, which takes seconds
        _RUN[type(config)](config)
    except BrokenPipeError:
        raise
    except (FlextronError, ValueError, OSError) as error:
        if os.environ.get("FLEXTRON_DEBUG"):
            raise
        print(f"error: {shortened(_said(error), arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished work is kept.", file=sys.stderr)
        return 130
    except Exception as error:
        if _NO_MEMORY.search(repr(error)):
            wanted = str(error).strip().splitlines() or ["the machine has no more"]
            print(f"error: not enough memory: {shortened(wanted[0], arguments)}", file=sys.stderr)
            return 2
        print(
            "this is a bug in flextron. Report it with the lines below and what `flextron env` prints.", file=sys.stderr
        )
        raise
    return 0


def _checked_model(config: Any) -> Any:
    """The config, with the place of the elastic model that comes with flextron, where it is named."""
    model = config.__dict__.get("model", NAME)
    if model == ELASTIC:
        return replace(config, model=str(elastic_smollm2()))
    if model != NAME and not (Path(model) / PACK).is_file():
        source_of(model)
    return config


def _prepare_outputs() -> None:
    """Let no output fail: what a terminal cannot show is spelled out, and what was closed goes nowhere."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf8")  # noqa: SIM115 - to the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_outputs() -> None:
    """Let what is still to be written go nowhere."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _said(error: Exception) -> str:
    """What an error says; of the operating system's, the file and the reason without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def parse(arguments: Sequence[str]) -> Any:
    """Read the arguments, and the recipe that they name, into the config of their verb.

    Raises:
        FlextronError: a recipe that cannot be read.
        SystemExit: 0 after help or version, 2 for arguments that do not fit (the message is printed).
    """
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    if verb == "--version":
        print(f"flextron {__version__}")
        raise SystemExit(0)
    if verb.startswith("--tyro-"):  # completion for a shell
        return tyro.extras.subcommand_cli_from_dict(dict(COMMANDS), prog="flextron", args=[verb, *rest])
    if verb not in COMMANDS:
        near = nearest(verb, list(COMMANDS))
        way_out = f"did you mean {near}?" if near else f"choose one of {', '.join(COMMANDS)}."
        _refuse(f"flextron has no verb {verb}; {way_out}", arguments)
    if {"-h", "--help"} & set(rest):
        print(_explained(COMMANDS[verb]))
        rest = ["--help"]
    rest = _with_recipes(rest)
    nul = next((word for word in rest if "\0" in word), None)
    if nul is not None:
        _refuse(f"{nul!r} has a NUL character, which no option takes.", arguments)
    return _config(COMMANDS[verb], f"flextron {verb}", rest)


def _config(kind: type, prog: str, arguments: list[str]) -> Any:
    """The dataclass `kind` with the arguments as its fields.

    Raises:
        SystemExit: 0 after help, 2 for arguments that do not fit (the message is printed).
    """
    if arguments == ["--help"]:
        return tyro.cli(kind, prog=prog, args=arguments, description="")
    unknown = unknown_option(kind, arguments, prog)
    if unknown:
        _refuse(unknown, arguments)
    try:
        with redirect_stderr(io.StringIO()) as frame, _wide_terminal(sum(map(len, arguments))):
            config: Any = tyro.cli(kind, prog=prog, args=arguments)
    except SystemExit:
        _refuse(plain(frame.getvalue(), prog), arguments)
    absurd = absurd_number(config)
    if absurd:
        _refuse(absurd, arguments)
    return config


def _refuse(message: str, arguments: Sequence[str]) -> NoReturn:
    print(f"error: {shortened(message, arguments)}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def _wide_terminal(characters: int) -> Iterator[None]:
    """Let tyro break no lines that repeat so many characters, so that its messages can be read back."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(10_000 + 2 * characters)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _overview() -> str:
    """The general help: every verb with the first line of its own help, in the order in which data passes them."""
    width = max(map(len, COMMANDS))
    hanging = " " * (width + 4)
    verbs = [
        _filled(_paragraphs(kind)[0], first=f"  {verb:<{width}}  ", later=hanging) for verb, kind in COMMANDS.items()
    ]
    end = _filled("`flextron VERB --help` explains a verb and its options. `flextron --version` prints the version.")
    return "\n".join(["usage: flextron VERB [OPTIONS]", "", DESCRIPTION, "", "verbs:", *verbs, "", end])


def _explained(kind: type) -> str:
    """What a verb does, with examples. Lines fit the terminal, except those of examples, so that they can be copied."""
    paragraphs = [*_paragraphs(kind), *([] if kind is EnvConfig else [RECIPE_HELP])]
    wrapped = [text if text.startswith("Example") else _filled(text) for text in paragraphs]
    return "\n\n".join(wrapped) + "\n"


def _filled(text: str, first: str = "", later: str = "") -> str:
    """Break text into lines that fit the terminal; `first` and `later` begin the first line and the others."""
    columns = min(TEXT_COLUMNS, shutil.get_terminal_size().columns)
    return fill(
        text, columns, break_on_hyphens=False, break_long_words=False, initial_indent=first, subsequent_indent=later
    )


def _paragraphs(kind: type) -> list[str]:
    return [" ".join(text.split()) for text in cleandoc(kind.__doc__ or "").split("\n\n")]


def _with_recipes(arguments: list[str]) -> list[str]:
    """Replace `--recipe FILE` by the options that the file lists, placed before all other options, which win."""
    if "--recipe" not in arguments:
        return arguments
    at = arguments.index("--recipe")
    if at + 1 == len(arguments):
        raise FlextronError("--recipe needs a YAML file.")
    given = [*arguments[:at], *arguments[at + 2 :]]
    first_option = next((place for place, word in enumerate(given) if word.startswith("--")), len(given))
    return [*given[:first_option], *_recipe_arguments(arguments[at + 1]), *given[first_option:]]


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few of them, one inside the other, stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not for recipes; write the value out")
        return super().compose_node(parent, index)


def _recipe(file: str) -> Any:
    """The content of a recipe.

    Raises:
        FlextronError: the file cannot be read, is too long, or is not YAML.
    """
    try:
        with Path(file).open(encoding="utf8") as opened:
            text = opened.read(LONGEST_RECIPE + 1)
        if len(text) > LONGEST_RECIPE:
            raise yaml.YAMLError(f"it is longer than {LONGEST_RECIPE} characters, the most that a recipe may have")
        return yaml.load(text, Loader=_Loader) or {}  # noqa: S506 - a child of the safe loader
    except Exception as error:  # a value after a tag, such as !!int, makes yaml raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FlextronError(f"cannot read the recipe {file}: {reason}.") from None


def _recipe_arguments(file: str) -> list[str]:
    recipe = _recipe(file)
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
