"""`flextron export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flextron.commands import shared
from flextron.config import ExportConfig
from flextron.errors import BudgetError

if TYPE_CHECKING:
    from flextron.model import ElasticModel
    from flextron.subnet import Subnet


def run(config: ExportConfig) -> None:
    """Write a sub-network as a model of its own."""
    from flextron.exporting import check_free, export, export_gguf

    check_free(config.out, to=config.to, overwrite=config.overwrite)
    model = shared.load(config)
    subnet = _to_export(model, config)
    how: dict[str, Any] = {"overwrite": config.overwrite, "verify": config.verify}
    if config.to == "gguf":
        print(export_gguf(model, subnet, config.out, quantize=config.quantize, **how))
    else:
        print(export(model, subnet, config.out, remote_code=config.remote_code, **how))


def _to_export(model: ElasticModel, config: ExportConfig) -> Subnet:
    """The sub-network that --subnet, --budget and --equal-widths ask for."""
    if not config.equal_widths:
        return shared.chosen(model, config)
    from flextron.choosing.baselines import equal_widths_within
    from flextron.costs.pricing import Ceiling, formula_table
    from flextron.exporting import can_state, refuse_in_gguf

    if config.budget is not None:
        limits = shared.routed(model, config.budget, config).ceilings
    else:
        table = formula_table(model, "parameters")
        limits = (Ceiling(table, table.price(shared.chosen(model, config)), f"the parameters of {config.subnet}"),)
    step = config.neuron_step or 1

    def fits(subnet: Subnet) -> bool:
        neurons = subnet.neurons[0]
        rounded = neurons % step == 0 or neurons == model.search_space.neurons[-1]
        return rounded and can_state(model, subnet, to=config.to, quantize=config.quantize)

    try:
        return equal_widths_within(limits, fits)
    except BudgetError:
        if config.to == "gguf":  # no widths at all can be stated: say why
            refuse_in_gguf(model, model.search_space.full, config.quantize)
        raise
