"""What commands share: the model, its folder, and what a sub-network or a budget asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextron.config import EvaluateConfig, ExportConfig, GenerateConfig
from flextron.errors import CheckpointError

if TYPE_CHECKING:
    from flextron.choosing.routing import Routed
    from flextron.data.blocks import TokenBlocks
    from flextron.evaluation import Evaluation
    from flextron.model import ElasticModel
    from flextron.routers.token.batch import TokenRouting
    from flextron.subnet import Subnet


def load(config: Any, dtype: str | None = None) -> ElasticModel:
    """The model that a config names, in its type, or in `dtype`, and on its device."""
    import warnings

    from flextron.elastic.checkpoint import quiet_transformers
    from flextron.elastic.coverage import CoverageWarning
    from flextron.model import ElasticModel

    quiet_transformers()
    print(f"loading {config.model}", file=sys.stderr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CoverageWarning)
        model = ElasticModel.from_pretrained(config.model, dtype=dtype or config.dtype, device=config.device)
    for warning in caught:
        if issubclass(warning.category, CoverageWarning):
            note(str(warning.message))
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    return model


def load_original(config: EvaluateConfig) -> ElasticModel | None:
    """The model that --original names, to compare predictions with."""
    return None if config.original is None else load(replace(config, model=config.original))


def folder_of(model: str) -> Path:
    """MODEL as a folder that takes what is measured; found before anything is loaded."""
    from flextron.atomic import lost

    folder = Path(model)
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: {model}. Latency tables and routers are kept beside an elastic checkpoint; "
            f"make one with `flextron rank MODEL OUT`.{lost(folder)}"
        )
    return folder


@contextmanager
def outputs(*files: Path | None) -> Iterator[None]:
    """Reserve the files that a command writes at its end, and see first that they can be written.

    Raises:
        CheckpointError: one cannot, another process writes it, or it is a folder.
    """
    from flextron.atomic import check_new_file, reserved

    with ExitStack() as held:
        for file in files:
            if file is not None:
                check_new_file(file, overwrite=True)
                held.enter_context(reserved(file))
        yield


def note(text: str) -> None:
    """Say on standard error what a user should know."""
    print(f"note: {text}", file=sys.stderr)


def chosen(model: ElasticModel, config: GenerateConfig | ExportConfig, **how: Any) -> Subnet:
    """The sub-network that --subnet or --budget asks for; `how` goes to `flextron.route`."""
    from flextron.choosing.choice import choose

    if config.budget is None:
        return choose(model, config.subnet, config.model)
    return within(model, config.budget, config, **how)


def tokens_within(model: ElasticModel, budget: str, config: GenerateConfig | EvaluateConfig) -> TokenRouting:
    """How tokens are routed within a budget."""
    from flextron.choosing.routing import route_tokens

    hard = isinstance(config, GenerateConfig) and config.hard
    return route_tokens(model, budget, config.model, hard=hard, any_device=config.any_device, warn=note)


def show_usage(model: ElasticModel, routing: TokenRouting, text: str, budget: str, file: Path) -> None:
    """Say what the tokens of a text use, and write a picture of it."""
    from flextron.choosing.explaining import save_usage, usage_of
    from flextron.pictures.usage import usage_text

    usage = usage_of(model, routing, text, budget)
    save_usage(usage, file)
    print(f"\n{usage_text(usage)}\nwrote {file}", file=sys.stderr)


def within(
    model: ElasticModel, budget: str, config: GenerateConfig | ExportConfig | EvaluateConfig, **how: Any
) -> Subnet:
    """The best sub-network within a budget; notes go to standard error."""
    answer = routed(model, budget, config, **how)
    for text in answer.notes:
        note(text)
    return answer.subnet


def routed(
    model: ElasticModel, budget: str, config: GenerateConfig | ExportConfig | EvaluateConfig, **how: Any
) -> Routed:
    """The answer to a budget; warnings go to standard error, `how` to `flextron.route`."""
    from flextron.choosing.routing import route

    return route(model, budget, config.model, any_device=config.any_device, warn=note, **how)


SHARES = ("full", "90%", "80%", "60%", "50%")
"""Sub-networks whose loss is compared, before and after a model is packed or quantised."""


def losses(model: ElasticModel, blocks: TokenBlocks) -> list[Evaluation]:
    """The losses of SHARES; of a model without sensitivities, that of the full model alone."""
    from flextron.choosing.choice import choose
    from flextron.evaluation import evaluate
    from flextron.ranking.sensitivity import Sensitivity

    known = model.folder is not None and Sensitivity.is_in(model.folder)
    subnets = [choose(model, share, model.folder) for share in (SHARES if known else SHARES[:1])]
    return evaluate(model, subnets, blocks, show=True)


def loss_table(losses: Mapping[str, list[Evaluation]], text: str) -> str:
    """The losses before and after, each by its name, and what is lost, as a Markdown table."""
    (name, before), (other, after) = losses.items()
    rows = [
        f"| {share} | {old.nats_per_token:.4f} | {new.nats_per_token:.4f} | "
        f"{new.nats_per_token - old.nats_per_token:+.4f} |"
        for share, old, new in zip(SHARES, before, after, strict=False)
    ]
    head = [f"| share of the layers' weights | {name}, nats/token | {other} | difference |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows, "", f"Measured on {text}."])
