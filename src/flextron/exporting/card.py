"""The model card of an export: its origin, how it was made, and its known latency and quality."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from flextron.costs.pricing import format_cost
from flextron.costs.saved import FOLDER
from flextron.costs.table import CostTable
from flextron.costs.timing import trust_warning
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_environment
from flextron.errors import CheckpointError, FlextronError
from flextron.records import RecordError, checked, parse_object
from flextron.routers.static.router import Router, metrics_with_router
from flextron.subnet import Subnet

CARD = "README.md"
MOST_NAMES = 5
"""Texts that are named one by one."""


def command() -> str:
    """Return the running flextron command as typed, or the name of the Python program that runs instead."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    if program.stem == "flextron" or program.parts[-2:] == ("flextron", "cli.py"):
        return shlex.join(["flextron", *sys.argv[1:]])
    return f"a Python program, {program.name}" if program.name else "a Python program"


def base_model(model: ElasticModel) -> str:
    """Return the hub id of the elastic checkpoint, or the name of its folder."""
    return model.folder.resolve().name if model.folder is not None else str(model.config.name_or_path)


def model_card(model: ElasticModel, subnet: Subnet, parameters: int) -> str:
    """Return the text of README.md."""
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [flextron]", "---"]
    base = base_model(model) or model.config.model_type
    sections = [
        "\n".join(front),
        f"# A sub-network of {base}",
        f"{subnet}: {model.share(subnet):.1%} of the layers' weights, {parameters:,} parameters. It keeps the "
        "highest-ranked units of the full model, with the full model's weights.",
        "## How it was made",
        "\n".join(f"- {line}" for line in _history(model)),
        *_latency(model, subnet),
        *_quality(model),
        "## Versions",
        f"```\n{describe_environment()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _history(model: ElasticModel) -> Iterator[str]:
    origin = _read(model.folder, "config.json", _Config).get("_name_or_path")
    named = f", made from {text_name(origin)}" if origin else ""
    yield f"Base model: `{base_model(model) or model.config.model_type}`, a {model.config.model_type} model{named}"
    ranking = model.ranking
    if ranking is not None:
        yield f"Ranked by {ranking.score} on {ranking.tokens:,} tokens of {text_name(ranking.text)}"
    run = _read(model.folder, "train.json", _Run)
    if run:
        text, optimizer = run["text"], run["optimizer"]
        names = ", ".join(map(text_name, text["data"]))
        yield (
            "Method: elastic continued training by distillation from the full model; all sub-networks share the "
            f"weights; {text['tokens']:,} tokens of {names}; learning rate {optimizer['learning_rate']:g}, "
            f"{run['arithmetic']}, seed {run['seed']}"
        )
    else:
        yield "Method: cut from the base model without elastic training"
    yield f"Exported by: `{command()}`"


def _table(file: Path) -> CostTable | None:
    try:
        return CostTable.load(file)
    except FlextronError:  # of another version: a card does without
        return None


def _latency(model: ElasticModel, subnet: Subnet) -> list[str]:
    """A line for each latency table beside the checkpoint."""
    files = [] if model.folder is None else sorted((model.folder / FOLDER).glob("*.json"))
    tables = [table for table in map(_table, files) if table is not None and table.search_space == model.search_space]
    if not tables:
        return []
    rows = [
        f"| {table.metric} | {format_cost(table.price(subnet), table.unit)} | {format_cost(table.full, table.unit)} | "
        f"{', '.join(f'{key} {value}' for key, value in table.conditions.items() if key in _SHOWN)} |"
        for table in tables
    ]
    head = "| time | of this model | of the full model | measured with |\n|---|---:|---:|---|"
    warnings = [
        f"Do not trust the times of {table.metric}: the table was {warning}."
        for table in tables
        if (warning := trust_warning(table.conditions)) is not None
    ]
    return ["## Latency, as the latency tables predict it", "\n".join([head, *rows]), *warnings]


_SHOWN = ("device", "dtype", "engine", "batch", "prompt_tokens", "context_tokens")


def _quality(model: ElasticModel) -> list[str]:
    """Return a table of loss by budget for each router."""
    sections = []
    for metric in [] if model.folder is None else metrics_with_router(model.folder):
        try:
            about = Router.load(str(model.folder), metric, model).about
        except FlextronError:
            continue  # the router belongs to other weights
        if not about.checks:
            continue  # made from stored pairs: its answers were not measured
        rows = [f"| {check.budget:g}x | {check.loss:.3f} |" for check in about.checks]
        sections += [
            f"## Latency against quality, budgets of {metric}",
            f"Nats per token on {about.tokens:,} tokens of {text_name(about.text)}, for the router's sub-network at "
            "each fraction of the full model's time:",
            "\n".join([f"| {metric} | nats per token |\n|---|---:|", *rows]),
        ]
    return sections


class _Config(TypedDict, total=False):
    _name_or_path: str | None


class _Text(TypedDict):
    tokens: int
    data: tuple[str, ...]


class _Optimizer(TypedDict):
    learning_rate: float


class _Run(TypedDict):
    """Those settings of train.json that a card tells."""

    text: _Text
    optimizer: _Optimizer
    arithmetic: str
    seed: int


def _read(folder: Path | None, name: str, kind: type[Any]) -> Any:
    """Return what a card tells of a JSON file beside a model; {} where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        return checked(parse_object((folder / name).read_bytes()), kind)
    except (OSError, RecordError) as error:
        raise CheckpointError(f"cannot read {folder / name} for the model card: {error}. Mend it.") from None


def text_name(text: str) -> str:
    """Return a text's name without this machine's folders."""
    return text if text.startswith("sample/") else Path(text).name


def text_names(texts: Sequence[str]) -> str:
    """Return the texts' names, or how many texts there are if the names would fill a line."""
    return ", ".join(map(text_name, texts)) if len(texts) <= MOST_NAMES else f"{len(texts)} texts"
