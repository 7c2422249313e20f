"""`flextron measure-latency`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flextron.commands import shared
from flextron.config import MeasureLatencyConfig

if TYPE_CHECKING:
    from flextron.costs.table import CostTable
    from flextron.model import ElasticModel


def run(config: MeasureLatencyConfig) -> None:
    """Measure latency tables, or read one from a CSV file."""
    folder = shared.folder_of(config.model)
    from flextron.atomic import reserved
    from flextron.costs.saved import FOLDER

    with reserved(folder / FOLDER, grows=True):
        _save_all(folder, config)


def _save_all(folder: Path, config: MeasureLatencyConfig) -> None:
    from flextron.costs.saved import describe, save_table
    from flextron.costs.timing import trust_warning

    if config.from_csv is not None:
        tables = iter([_table_of_csv(config, config.from_csv)])
    else:
        model = shared.load(config)
        tables = (_measured(model, phase, config) for phase in config.phase)
    for table in tables:
        print(describe(table), flush=True)  # first, or a full disk would take it along
        print(f"wrote {save_table(folder, table)}", flush=True)
        warning = trust_warning(table.conditions)
        if warning is not None:
            print(f"warning: {warning}. Measure again when other programs are done.", file=sys.stderr)


def _measured(model: ElasticModel, phase: str, config: MeasureLatencyConfig) -> CostTable:
    from flextron.costs.latency import measure_latency

    how = partial(
        measure_latency, model, phase=phase, batch=config.batch, tokens=config.tokens, rounds=config.rounds, show=True
    )
    if not config.in_llamacpp:
        return how()
    from flextron.exporting.gguf.timing import in_llamacpp

    with in_llamacpp(model, phase=phase, tokens=config.tokens, quantize=config.quantize) as runner:
        return how(runner=runner)


def _table_of_csv(config: MeasureLatencyConfig, file: Path) -> CostTable:
    from flextron.costs.saved import LLAMA_CPP, table_from_csv
    from flextron.costs.timing import PHASES, TOKENS
    from flextron.elastic.checkpoint import load_metadata

    (phase,) = config.phase
    space = load_metadata(config.model, {})[0] or shared.load(config).search_space
    engine = LLAMA_CPP if config.engine == "llamacpp" else config.engine
    given = {"engine": engine, "device": config.device_name, "batch": config.batch}
    given |= {TOKENS[PHASES[phase]]: config.tokens, "dtype": None if config.dtype == "auto" else config.dtype}
    conditions = {key: value for key, value in given.items() if value is not None}
    return table_from_csv(file, space, phase=phase, conditions=conditions)
