"""`flextron export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flextron.commands import shared
from flextron.config import ExportConfig
from flextron.errors import BudgetError

if TYPE_CHECKING:
    from flextron.exporting.exporters import Exporter
    from flextron.model import ElasticModel
    from flextron.subnet import Subnet


def run(config: ExportConfig) -> None:
    """Write a sub-network as a model of its own."""
    from flextron.atomic import check_apart, reserved, tell_dropped
    from flextron.exporting.exporters import EXPORTERS

    exporter = EXPORTERS[config.to](config)
    check_apart(config.out, config.model)
    with reserved(config.out):
        exporter.check_free(config.out, overwrite=config.overwrite)
        tell_dropped(config.out, "--overwrite")
        model = shared.load(config)
        subnet = _to_export(model, config, exporter)
        print(exporter.write(model, subnet, config.out, overwrite=config.overwrite, verify=config.verify))


def _to_export(model: ElasticModel, config: ExportConfig, exporter: Exporter) -> Subnet:
    """The sub-network that --subnet, --budget and --equal-widths ask for."""
    how: dict[str, Any] = {**exporter.table_engine, "neuron_step": config.neuron_step}
    if not config.equal_widths:
        return shared.chosen(model, config, **how)
    from flextron.choosing.baselines import equal_widths_within
    from flextron.costs.formulas import formula_table
    from flextron.costs.pricing import Ceiling, doubts

    if config.budget is not None:
        limits = shared.routed(model, config.budget, config, **how).ceilings
        for doubt in doubts(limits):
            shared.note(doubt)
    else:
        table = formula_table(model, "parameters")
        limits = (Ceiling(table, table.price(shared.chosen(model, config)), f"the parameters of {config.subnet}"),)
    step = config.neuron_step or 1

    def fits(subnet: Subnet) -> bool:
        neurons = subnet.neurons[0]
        rounded = neurons % step == 0 or neurons == model.search_space.neurons[-1]
        return rounded and exporter.can_state(model, subnet)

    try:
        return equal_widths_within(limits, fits)
    except BudgetError:
        exporter.check_states(model, model.search_space.full)  # where no widths at all can be stated, says why
        raise
