"""Types of the fields that several commands share, and what is checked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from flextron.budget import FORMS, Budget

ModelArgument = Annotated[Positional[str], arg(metavar="MODEL")]
OutArgument = Annotated[Positional[Path], arg(metavar="OUT")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Score = Literal["reconstruction", "absolute", "absolute_weight", "rms", "rms_weight"]
Engine = Literal["hf", "gguf"]
Quantization = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m"]
Phase = Literal["prefill", "decode"]
BudgetArgument = Annotated[
    str | None, arg(help=f"Instead of --subnet, what it may cost; the best sub-network within it is taken: {FORMS}.")
]
BudgetsArgument = Annotated[
    tuple[str, ...], arg(help=f"Further sub-networks, the best within what each may cost, such as 0.9x 0.6x: {FORMS}.")
]
NeuronStepArgument = Annotated[
    int | None,
    arg(
        help="Let every MLP's width within the budget be a multiple of this, or full: 64 for tensor cores, 256 for "
        "k-quants. Without, all widths of the search space."
    ),
]
RouteArgument = Annotated[str, arg(help=f"What the sub-network may cost: {FORMS}.")]


def check_at_least(name: str, value: float, limit: float) -> None:
    """Raise a ValueError below the limit."""
    if not value >= limit:
        raise ValueError(f"{name} is {value}; it must be at least {limit}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raise a ValueError outside the limits, which count as inside."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")


def check_ending(name: str, file: Path | None, endings: tuple[str, ...]) -> None:
    """Raise a ValueError if the file's name has none of these endings."""
    if file is not None and file.suffix not in endings:
        raise ValueError(f"{name} is {file}; its name must end in {' or '.join(endings)}.")


def check_one_choice(subnet: str, budget: str | None) -> None:
    """Either names the sub-network; a budget that cannot be read is found before a model is loaded."""
    if budget is None:
        return
    if subnet != "full":
        raise ValueError(
            f"subnet ({subnet}) and budget ({budget}) exclude each other: a budget chooses the sub-network. Keep one."
        )
    Budget.parse(budget)


def check_usage_picture(file: Path | None, *, per_token: bool) -> None:
    """Raise a ValueError for a picture of what tokens used where they use the same, or in an unknown format."""
    if file is not None and not per_token:
        raise ValueError(f"picture is {file}; it is of --per-token.")
    check_ending("picture", file, (".html", ".png", ".svg", ".pdf"))


def names_widths(wish: str) -> bool:
    """Whether a sub-network is named by its size, as --subnet names it, not by a budget."""
    return wish.endswith(("%", ".json")) or wish.startswith(("neurons=", "kv_groups="))


def check_draft(wish: str | None, *, compare: bool, per_token: bool, temperature: float) -> None:
    """Raise a ValueError for a draft that cannot be read, or beside what it cannot write ahead for."""
    if wish is None:
        if compare:
            raise ValueError("--compare is of --speculative.")
        return
    if per_token or temperature:
        raise ValueError(
            "--speculative writes ahead for greedy text of one sub-network: leave out --per-token, temperature 0."
        )
    if not names_widths(wish):
        Budget.parse(wish)
