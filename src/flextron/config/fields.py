"""Types of the options that several commands share, and the checks on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from flextron.budget import FORMS, Budget


def unset(metavar: str) -> object:
    """Tell `--help` how to write the value of an option that has no default, instead of "(default: None)"."""
    return arg(metavar=metavar, help_behavior_hint="")


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HeldType = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
Score = Literal["reconstruction", "absolute", "absolute_weight", "rms", "rms_weight"]
Engine = Literal["hf", "gguf"]
Quantization = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m"]
Phase = Literal["prefill", "decode"]

OptionalInt = Annotated[int | None, unset("INT")]
OptionalPath = Annotated[Path | None, unset("PATH")]
OptionalText = Annotated[str | None, unset("STR")]

ModelArgument = Annotated[Positional[str], arg(metavar="MODEL")]
OutArgument = Annotated[Positional[Path], arg(metavar="OUT")]
_SUBNET_FORMS = (
    "full; a share of the layers' weights, such as 60%; equal widths in all layers, such as neurons=768,kv_groups=2; "
    "or a JSON file that `flextron route --out` wrote."
)
SubnetArgument = Annotated[str, arg(help=f"Sub-network to use: {_SUBNET_FORMS}")]
SubnetsArgument = Annotated[tuple[str, ...], arg(metavar="STR [STR ...]", help=f"Sub-networks, each: {_SUBNET_FORMS}")]
BudgetArgument = Annotated[
    str | None,
    arg(
        metavar="STR",
        help_behavior_hint="",
        help=f"Use the best sub-network within this budget, instead of --subnet: {FORMS}.",
    ),
]
BudgetsArgument = Annotated[
    tuple[str, ...],
    arg(
        metavar="STR [STR ...]",
        help_behavior_hint="",
        help=f"Also use the best sub-network within each of these budgets, such as 0.9x 0.6x. A budget is {FORMS}.",
    ),
]
RouteArgument = Annotated[str, arg(help=f"What the sub-network may cost: {FORMS}.")]
NeuronStepArgument = Annotated[
    int | None,
    arg(
        metavar="INT",
        help_behavior_hint="",
        help="Within --budget, use only MLP widths that are multiples of this, and the full width. Choose 64 for "
        "tensor cores, 256 for k-quants. The default allows all widths of the search space.",
    ),
]
AnyDeviceArgument = Annotated[
    bool,
    arg(
        help="For budgets of time, use a latency table that was measured elsewhere, if none was measured on this device and version."
    ),
]
HeldTypeArgument = Annotated[
    HeldType,
    arg(
        help="Data type of the weights. auto keeps the checkpoint's. int8 and int4 take about a quarter and a sixth of float32's memory, on a CPU."
    ),
]
DtypeArgument = Annotated[Dtype, arg(help="Data type of the weights. auto keeps the checkpoint's.")]
DeviceArgument = Annotated[str, arg(help="Where to run, such as cpu or cuda:0. auto takes a GPU if there is one.")]


def option(name: str) -> str:
    """Write a field's name as on the command line: out_dir -> --out-dir; OUT, an argument by place, stays."""
    return name if name.isupper() else f"--{name.replace('_', '-')}"


def check_at_least(name: str, value: float, limit: float) -> None:
    """Raise a ValueError below the limit."""
    if not value >= limit:
        raise ValueError(f"{option(name)} is {value}; it must be at least {limit}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raise a ValueError outside the limits. The limits themselves are allowed."""
    if not low <= value <= high:
        raise ValueError(f"{option(name)} is {value}; it must lie between {low} and {high}.")


def check_ending(name: str, file: Path | None, endings: tuple[str, ...]) -> None:
    """Raise a ValueError if the file's name has none of these endings."""
    if file is not None and file.suffix not in endings:
        raise ValueError(f"{option(name)} is {file}; its name must end in {' or '.join(endings)}.")


def check_one_choice(subnet: str, budget: str | None) -> None:
    """Raise a ValueError if both name a sub-network, or if the budget cannot be read."""
    if budget is None:
        return
    if subnet != "full":
        raise ValueError(
            f"--subnet {subnet} and --budget {budget} exclude each other: a budget chooses the sub-network. Keep one."
        )
    Budget.parse(budget)


def check_usage_picture(file: Path | None, *, per_token: bool) -> None:
    """Raise a ValueError for a picture of the tokens' compute without --per-token, or in an unknown format."""
    if file is not None and not per_token:
        raise ValueError(f"--picture {file} needs --per-token: without it, all tokens use the same sub-network.")
    check_ending("picture", file, (".html", ".png", ".svg", ".pdf"))


def names_widths(wish: str) -> bool:
    """Whether a sub-network is named by its size, as --subnet names it, and not by a budget."""
    return wish.endswith(("%", ".json")) or wish.startswith(("neurons=", "kv_groups="))


def check_draft(wish: str | None, *, compare: bool, per_token: bool, temperature: float) -> None:
    """Raise a ValueError if the draft cannot be read, or if the other options exclude a draft."""
    if wish is None:
        if compare:
            raise ValueError("--compare needs --speculative, such as --speculative 0.5x.")
        return
    if per_token or temperature:
        raise ValueError(
            "--speculative works only for greedy text of one sub-network: leave out --per-token and --temperature."
        )
    if not names_widths(wish):
        Budget.parse(wish)
