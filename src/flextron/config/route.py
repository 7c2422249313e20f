"""The options of `flextron route`."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.budget import Budget
from flextron.config.fields import (
    AnyDeviceArgument,
    DeviceArgument,
    HeldTypeArgument,
    ModelArgument,
    NeuronStepArgument,
    OptionalPath,
    RouteArgument,
    check_ending,
)


@dataclass(frozen=True)
class RouteConfig:
    """Choose the best sub-network within a budget, and draw it.

    For a budget of time, `route` also measures the sub-network, so that you can compare the predicted time with the
    real one.

    Example: flextron route out/smollm2-elastic --budget 0.8x --out subnet.json
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see `flextron rank`) or pack, or smollm2-elastic (trained, comes with flextron)."""
    budget: RouteArgument
    any_device: AnyDeviceArgument = False
    json: bool = False
    """Print JSON instead of text."""
    measure: bool = True
    """Measure the times that the budget limits. This takes a few seconds for each, and happens only if the latency table was measured here."""
    neuron_step: NeuronStepArgument = None
    picture: OptionalPath = None
    """File for a picture of the widths: .png, .svg or .pdf."""
    out: OptionalPath = None
    """JSON file for the sub-network. Other commands read it with --subnet."""
    dtype: HeldTypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        check_ending("out", self.out, (".json",))
        check_ending("picture", self.picture, (".png", ".svg", ".pdf"))
