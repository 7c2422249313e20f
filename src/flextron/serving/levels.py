"""The levels of a model: nested sub-networks on its router's path, priced and with predicted losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flextron.budget import Budget, Limit
from flextron.choosing.routing import Routed, route
from flextron.costs.formulas import FORMULAS
from flextron.costs.saved import FOLDER as LATENCY
from flextron.costs.saved import find_table
from flextron.costs.table import UNITS, CostTable
from flextron.costs.timing import PHASES, TOKENS
from flextron.elastic.model import ElasticModel
from flextron.errors import BudgetError, CostError
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.choices import increase_matrix, to_indices
from flextron.routers.static.learning import FIRST_PAIRS
from flextron.routers.static.pairs import Pairs
from flextron.routers.static.surrogate import Surrogate
from flextron.serving.engine import Level
from flextron.serving.saved import FULL, Levels
from flextron.subnet import Subnet

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Shares of the full model's cost that levels keep within by default."""
Warn = Callable[[str], None]


def make_levels(
    model: ElasticModel,
    folder: str | Path | None = None,
    *,
    shares: Sequence[float] = SHARES,
    metric: str | None = None,
    any_device: bool = False,
    sensitivity: Sensitivity | None = None,
    warn: Warn = lambda _: None,
) -> Levels:
    """Return the levels of a model, from the smallest to the full one, each nested in the next.

        make_levels(model).save("out/trained")

    Each share gives the answer of `flextron.route` to that budget, by the router or greedily. Shares with one answer
    give one level, and shares below the smallest sub-network none. The router predicts losses; without one, what a
    router would learn from the folder's measured pairs, as a pack has them; without those, the sensitivities predict
    increases over the full model.

    Args:
        folder: the checkpoint with latency tables, routers and sensitivities; by default where `model` was loaded from.
        metric: what shares are of; by default the time per output token where the folder has a table for this device,
            else parameters.
        any_device: use latency tables of another device or version, and `warn`.
        sensitivity: to use instead of the folder's.

    Raises:
        BudgetError: the folder has neither router nor sensitivities.
        CheckpointError, RouterError: one of them is damaged or of another checkpoint.
        CostError: `metric` is a time, and the folder has no table of it.
        ValueError: another metric, or a share that is not above 0 and at most 1.
    """
    folder = model.folder if folder is None else folder
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares are {list(shares)}; each must be above 0 and at most 1.")
    tables = {time: _latency(model, folder, time, any_device=any_device, warn=warn) for time in PHASES.values()}
    metric = _metric(metric, tables, warn)
    if sensitivity is None and folder is not None and Sensitivity.is_in(folder):
        sensitivity = Sensitivity.load(folder)
    answers = _answers(
        shares,
        lambda share: route(
            model,
            Budget((Limit(metric, share, relative=True),)),
            folder,
            any_device=any_device,
            sensitivity=sensitivity,
        ),
        model.search_space.full,
        warn,
    )
    losses, predict = _losses(answers[FULL], sensitivity, None if folder is None else _pairs(model, folder))
    return Levels(
        tuple(_level(name, answer, tables, predict) for name, answer in answers.items()),
        metric,
        losses,
        model.search_space,
        model.fingerprint(),
        {time: dict(table.conditions) for time, table in tables.items() if table is not None},
    )


def _answers(shares: Sequence[float], ask: Callable[[float], Routed], full: Subnet, warn: Warn) -> dict[str, Routed]:
    """The answer to each share by the name of its level, smallest first; the full model's comes last."""
    answers: dict[str, Routed] = {}
    for share in sorted({*shares, 1.0}):
        try:
            answer = ask(share)
        except BudgetError as error:
            if share == 1.0:
                raise
            warn(f"no level of {share:g}x: {error}")
            continue
        if answer.subnet == full:
            answers[FULL] = answer
            break
        if answer.subnet not in [known.subnet for known in answers.values()]:
            answers[f"{share:g}x"] = answer
    return answers


def _latency(
    model: ElasticModel, folder: str | Path | None, metric: str, *, any_device: bool, warn: Warn
) -> CostTable | None:
    """The folder's latency table; None where it has none that may be used here."""
    if folder is None or not any((Path(folder) / LATENCY).glob("*.json")):
        return None
    try:
        return find_table(model, folder, metric, foreign=any_device, warn=warn)
    except CostError as error:
        warn(f"levels have no predicted {metric}: {error}")
        return None


def _metric(metric: str | None, tables: dict[str, CostTable | None], warn: Warn) -> str:
    if metric is None and tables["tpot"] is None:
        warn("no latency table for this device, so shares are of parameters, not of time.")
        return "parameters"
    if metric is not None and metric not in UNITS:
        raise ValueError(f"no cost {metric!r}; shares are of one of {', '.join(UNITS)}.")
    if metric is not None and metric not in FORMULAS and tables[metric] is None:
        raise CostError(f"no latency table of {metric} for this device. Measure one: flextron measure-latency")
    return metric or "tpot"


def _pairs(model: ElasticModel, folder: str | Path) -> Pairs | None:
    """The pairs measured with these weights, if they are enough to learn from."""
    pairs = Pairs.most_of(folder, model.fingerprint(), model.search_space)
    return None if pairs is None or len(pairs) < FIRST_PAIRS else pairs


def _losses(
    full: Routed, sensitivity: Sensitivity | None, pairs: Pairs | None
) -> tuple[str | None, Callable[[Subnet], float | None]]:
    """What predicts losses, and how."""
    if (router := full.router) is not None:
        return "router", router.predicted_loss
    if sensitivity is None:
        return None, lambda _: None
    space = sensitivity.search_space
    if pairs is not None:
        surrogate = Surrogate.of(sensitivity).fit(to_indices(space, pairs.subnets), pairs.losses)
        return "pairs", lambda subnet: float(surrogate.predict(to_indices(space, [subnet]))[0])
    increases_SK = increase_matrix(sensitivity)

    def increase(subnet: Subnet) -> float:
        indices_S = to_indices(space, [subnet])[0]
        return float(increases_SK[np.arange(len(indices_S)), indices_S].sum())

    return "sensitivities", increase


def _level(
    name: str, answer: Routed, tables: dict[str, CostTable | None], predict: Callable[[Subnet], float | None]
) -> Level:
    (limit,) = answer.ceilings
    decode, prefill = tables["tpot"], tables["ttft"]
    tokens = prefill.conditions.get(TOKENS[prefill.metric]) if prefill is not None else None
    return Level(
        name,
        limit.table.price(answer.subnet) / limit.table.full,
        answer.subnet,
        predict(answer.subnet),
        None if decode is None else decode.price(answer.subnet),
        None if prefill is None or not tokens else prefill.price(answer.subnet) / tokens,
    )
