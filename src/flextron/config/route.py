"""What `flextron route` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron.budget import Budget
from flextron.config.fields import (
    Dtype,
    ModelArgument,
    NeuronStepArgument,
    RouteArgument,
    check_ending,
)


@dataclass(frozen=True)
class RouteConfig:
    """Choose the best sub-network within a budget, draw it, and compare its time with what was predicted.

    Example: flextron route out/smollm2-elastic --budget 0.6x --out subnet.json
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    budget: RouteArgument
    neuron_step: NeuronStepArgument = None
    measure: bool = True
    """Measure the times that the budget limits, a few seconds each, where the latency table was measured here."""
    picture: Path | None = None
    """File for a picture of the widths: .png, .svg or .pdf."""
    out: Path | None = None
    """JSON file for the sub-network, for --subnet of other commands."""
    json: bool = False
    """Print JSON instead of text."""
    any_device: bool = False
    """Use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        check_ending("out", self.out, (".json",))
        check_ending("picture", self.picture, (".png", ".svg", ".pdf"))
