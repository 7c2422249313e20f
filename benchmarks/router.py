"""Compare the router with other ways to choose a sub-network within a time budget, at equally many measured losses.

    python benchmarks/router.py --model out/smollm2-elastic --out router.json --picture router.png

For each text it prints four tables:

- the loss of every method at every budget;
- measured against allowed times;
- how far every method is above the router at equal measured time;
- the router's loss minus that of the best other method, paired on the same tokens.

Finished parts are saved in OUT.partial.json, and the same command continues from there. After the end, the same command
with more --rounds continues from OUT. Delete both files to start again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from flextron import ElasticModel, Subnet, evaluate, load_blocks
from flextron.atomic import write_text
from flextron.choosing import baselines
from flextron.costs.latency import measure_latency
from flextron.costs.pricing import Ceiling, check_possible
from flextron.costs.saved import describe, find_table, save_table
from flextron.costs.table import CostTable
from flextron.costs.timing import PHASES, REPEATS, TOKENS, Timing, time_interleaved, timed_run
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_device, faster_dtype
from flextron.errors import CostError, FlextronError
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static.making import describe_router, make_router, unused_blocks
from flextron.routers.static.pairs import LossMeter
from flextron.routers.static.router import Router, metrics_with_router
from model import write_results
from paper_page import OURS, STYLES, Loss, standard_error

mpl.use("agg")
METHODS = ("router", "greedy", "knapsack", "evolution", "random", "equal widths", "layer dropping")
"""All methods, in the order of the columns."""
ROUNDS_AT_ONCE = 8
"""Number of timing rounds after which results are saved."""


@dataclass(frozen=True)
class Settings:
    """Compare the router with other methods on one elastic checkpoint."""

    model: str
    """Folder of an elastic checkpoint with sensitivities."""
    phase: Literal["prefill", "decode"] = "decode"
    """Phase whose time the budgets limit."""
    budgets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    """Budgets, as fractions of the full model's time."""
    between: tuple[float, ...] = (0.85, 0.55)
    """Further budgets, marked in the tables: one router serves all budgets, a search starts again for each."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Texts to measure the chosen sub-networks on."""
    tokens: int = 8192
    """Number of tokens of each text."""
    measure_on: str = "sample/train"
    """Text on which the router and the searches measure, without the documents that the model was ranked on."""
    measure_tokens: int = 1024
    """Number of tokens of this text."""
    evaluations: int = 256
    """Number of sub-networks that the router measures; each search divides the same number among the budgets."""
    timed_tokens: int = 512
    """Number of tokens in the prompt or context, if a latency table is measured."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare, the router first."""
    curve: int = 0
    """Number of budgets at which to check that the router's losses fall and its predicted times rise; 0 skips this."""
    rounds: int = 3
    """Number of interleaved timings of each chosen sub-network, earlier runs included; 0 times nothing in this run."""
    also: tuple[Path, ...] = ()
    """Files of further sub-networks to time."""
    any_device: bool = False
    """Whether to use a latency table of another device or thread count, for example to measure losses in one thread."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    device: str = "cpu"
    """Device to run on; auto uses a GPU if there is one."""
    seed: int = 0
    """Seed of the router and the searches."""
    out: Path | None = None
    """JSON file to write."""
    picture: Path | None = None
    """PNG file to write."""

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown methods {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}.")

    @property
    def all_budgets(self) -> list[float]:
        """All budgets, from the largest."""
        return sorted({*self.budgets, *self.between}, reverse=True)


class Kept:
    """Results by name, saved to a file after each; they start from the file of an unfinished or finished run."""

    def __init__(self, out: Path | None, belongs_to: dict[str, Any]) -> None:
        self.file = None if out is None else out.with_suffix(".partial.json")
        self.results: dict[str, Any] = {"belongs_to": json.loads(json.dumps(belongs_to))}
        for file in (self.file, out):
            if file is not None and file.is_file():
                found = json.loads(file.read_text(encoding="utf8"))
                if found["belongs_to"] != self.results["belongs_to"]:
                    raise FlextronError(f"{file} has results of other settings. Delete it, or name another --out.")
                self.results = {name: found[name] for name in found if name not in ("command", "environment")}
                return

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the saved result called `name`; call `make` if there is none."""
        if name not in self.results:
            self.put(name, make())
        return self.results[name]

    def put(self, name: str, result: Any) -> None:
        """Save a result, replacing an earlier one of this name."""
        self.results[name] = json.loads(json.dumps(result))
        if self.file is not None:
            write_text(self.file, json.dumps(self.results, indent=1) + "\n")


Chosen = dict[str, dict[float, Subnet]]
"""Sub-networks by method and budget, without budgets for which a method has no answer."""


def main(settings: Settings) -> None:
    """Choose and measure sub-networks, and print the tables."""
    quiet_transformers()
    model = ElasticModel.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype), device=settings.device)
    table = _table(model, settings)
    print(f"{describe(table)}\n")
    same = replace(settings, out=None, picture=None, rounds=0, also=(), curve=0, any_device=False)
    belongs_to = {**asdict(same), "model": model.fingerprint()}
    kept = Kept(settings.out, {**belongs_to, "full_ms": table.full})
    chosen = _choose(model, table, settings, kept)
    full = {
        text: _losses(model, [model.search_space.full], text, settings, kept, f"{text}, full")
        for text in settings.texts
    }
    losses = {text: _all_losses(model, chosen, text, settings, kept) for text in settings.texts}
    if settings.curve:
        _check_order(model, table, settings, kept)
    if not settings.rounds:
        for text in settings.texts:
            _print_losses(text, losses[text], full[text][0], settings)
            _print_differences(text, losses[text], settings)
        return
    times = _times(model, table, chosen, settings, kept)
    conditions = _conditions(model, table, settings, kept)
    for text in settings.texts:
        _print_losses(text, losses[text], full[text][0], settings)
    _print_times(chosen, table, times, settings)
    for text in settings.texts:
        _print_at_equal_time(text, losses[text], full[text][0], chosen, times, settings)
        _print_differences(text, losses[text], settings)
    print(f"\n{conditions}")
    write_results(settings.out, {**kept.results, "conditions": conditions, "table": asdict(table)})
    if kept.file is not None:
        kept.file.unlink(missing_ok=True)
    if settings.picture is not None:
        _draw(settings.picture, losses, full, times, chosen, conditions)


def _table(model: ElasticModel, settings: Settings) -> CostTable:
    """Return the checkpoint's latency table, or measure one."""
    try:
        return find_table(
            model, settings.model, PHASES[settings.phase], tokens=settings.timed_tokens, foreign=settings.any_device
        )
    except CostError as error:
        print(f"measuring a latency table: {error}", flush=True)
    table = measure_latency(model, phase=settings.phase, tokens=settings.timed_tokens, seed=settings.seed, show=True)
    print(f"wrote {save_table(settings.model, table)}")
    return table


# ------------------------------------------------------------------ choosing


def _choose(model: ElasticModel, table: CostTable, settings: Settings, kept: Kept) -> Chosen:
    """Return every method's sub-network at every budget."""
    sensitivity = Sensitivity.load(settings.model)
    router = _router(model, table, settings, kept)
    blocks, _ = unused_blocks(model, sensitivity, settings.measure_on, tokens=settings.measure_tokens)
    meter = LossMeter(model, blocks, arithmetic=faster_dtype(model.device))
    each = max(1, router.about.pairs // len(settings.all_budgets))
    search = {"evaluations": each, "seed": settings.seed}
    influence = np.array(kept.once("influence", lambda: baselines.block_influence(model, blocks).tolist()))
    methods: dict[str, Callable[[float], Subnet]] = {
        "router": partial(_router_choice, router, table),
        "greedy": partial(baselines.greedy, sensitivity, table),
        "knapsack": partial(baselines.knapsack, sensitivity, table),
        "evolution": lambda limit: baselines.evolve(sensitivity, table, limit, meter, **search),
        "random": lambda limit: baselines.random_search(table, limit, meter, **search),
        "equal widths": partial(baselines.equal_widths, table),
        "layer dropping": partial(baselines.drop_layers, influence, table),
    }
    chosen: Chosen = {}
    for method in settings.methods:
        found = {
            budget: _choice(method, methods[method], budget, table, meter, kept) for budget in settings.all_budgets
        }
        chosen[method] = {budget: subnet for budget, subnet in found.items() if subnet is not None}
    return chosen


def _router(model: ElasticModel, table: CostTable, settings: Settings, kept: Kept) -> Router:
    """Return the checkpoint's router, or train and save one."""
    if table.metric in metrics_with_router(settings.model):
        router = Router.load(settings.model, table.metric, model)
        print(describe_router(router))
        return router
    start = time.perf_counter()
    router = make_router(
        model,
        settings.model,
        phase=settings.phase,
        evaluations=settings.evaluations,
        tokens=settings.measure_tokens,
        text=settings.measure_on,
        seed=settings.seed,
        any_device=settings.any_device,
        show=True,
    )
    seconds = kept.once("router training", lambda: time.perf_counter() - start)
    print(f"{describe_router(router)}\nrouter trained in {seconds:.0f} s")
    return router


def _router_choice(router: Router, table: CostTable, limit: float) -> Subnet:
    ceiling = Ceiling(table, limit, f"{limit:.2f} {table.unit}")
    check_possible([ceiling])
    return router.choose([ceiling])


def _choice(
    method: str,
    choose: Callable[[float], Subnet],
    budget: float,
    table: CostTable,
    meter: LossMeter,
    kept: Kept,
) -> Subnet | None:
    """Return one method's sub-network at one budget, or print why there is none and return None."""

    def make() -> dict[str, Any]:
        start, before = time.perf_counter(), meter.measured
        try:
            found, message = asdict(choose(budget * table.full)), None
        except FlextronError as error:
            found, message = None, str(error)
        seconds = time.perf_counter() - start
        return {"subnet": found, "error": message, "seconds": seconds, "measured": meter.measured - before}

    result = kept.once(f"choice, {method}, {budget}", make)
    if result["subnet"] is None:
        print(f"{method} at {budget}: {result['error']}")
        return None
    print(f"{method} at {budget}: {result['seconds']:.1f} s, {result['measured']} measured", flush=True)
    return Subnet(**result["subnet"])


# ------------------------------------------------------------------ measuring


def _losses(
    model: ElasticModel, subnets: list[Subnet], text: str, settings: Settings, kept: Kept, name: str
) -> list[dict[str, Any]]:
    """Return evaluations of sub-networks, each compared with the first."""
    blocks = load_blocks(model.tokenizer, text, tokens=settings.tokens)
    found: list[dict[str, Any]] = kept.once(
        f"loss, {name}", lambda: [asdict(evaluation) for evaluation in evaluate(model, subnets, blocks, show=True)]
    )
    return found


def _all_losses(
    model: ElasticModel, chosen: Chosen, text: str, settings: Settings, kept: Kept
) -> dict[float, dict[str, dict[str, Any]]]:
    """Return evaluations by budget and method, compared at each budget with the router's."""
    losses = {}
    for budget in settings.all_budgets:
        subnets = {method: of_method[budget] for method, of_method in chosen.items() if budget in of_method}
        distinct = list(dict.fromkeys(subnets.values()))
        found = _losses(model, distinct, text, settings, kept, f"{text}, {budget}") if distinct else []
        losses[budget] = {method: found[distinct.index(subnet)] for method, subnet in subnets.items()}
    return losses


def _times(model: ElasticModel, table: CostTable, chosen: Chosen, settings: Settings, kept: Kept) -> dict[str, Any]:
    """Return times of all chosen sub-networks and of those in files, under the conditions of the table.

    It saves after every few rounds. Rounds of earlier runs count, so only missing rounds are timed.
    """
    subnets = [*(subnet for of_method in chosen.values() for subnet in of_method.values())]
    distinct = list(dict.fromkeys([*subnets, *map(Subnet.load, settings.also)]))
    names = [subnet.to_json() for subnet in distinct]
    conditions = table.conditions
    times = kept.results.get("times")
    if times is None or not set(names) <= set(times["ratios"]):
        times = {"rounds": 0, "full_ms": 0.0, "noise": 0.0, "ratios": {}}
    while (done := times["rounds"]) < settings.rounds:
        rounds = min(ROUNDS_AT_ONCE, settings.rounds - done)
        print(f"rounds {done + 1} to {done + rounds} of {settings.rounds}", flush=True)
        timing = time_interleaved(
            timed_run(model, settings.phase, batch=conditions["batch"], tokens=conditions[TOKENS[table.metric]]),
            model.search_space.full,
            distinct,
            rounds=rounds,
            repeats=REPEATS[settings.phase],
            draw=np.random.default_rng(settings.seed + done),
            show=True,
        )
        times = add_rounds(times, names, timing, rounds)
        kept.put("times", times)
    return dict(times)


def add_rounds(times: dict[str, Any], names: list[str], timing: Timing, rounds: int) -> dict[str, Any]:
    """Return times of all rounds: the ratios, their medians in ms, and the mean over rounds of the other values."""
    done = times["rounds"]
    everything = done + rounds
    ratios = {name: [*times["ratios"].get(name, ()), *found] for name, found in zip(names, timing.ratios, strict=True)}
    full_ms = (done * times["full_ms"] + rounds * timing.full_ms) / everything
    noise = (done * times["noise"] + rounds * timing.noise) / everything
    ms = {name: full_ms * median(found) for name, found in ratios.items()}
    return {"rounds": everything, "full_ms": full_ms, "noise": noise, "ms": ms, "ratios": ratios}


def _check_order(model: ElasticModel, table: CostTable, settings: Settings, kept: Kept) -> None:
    """Print whether losses fall and predicted times rise as the budget rises."""
    router = Router.load(settings.model, table.metric, model)
    budgets = [float(budget) for budget in np.linspace(router.net.lowest, 1, settings.curve)]
    start = time.perf_counter()
    subnets = [_router_choice(router, table, budget * table.full) for budget in budgets]
    choosing_ms = 1000 * (time.perf_counter() - start) / len(budgets)
    one_block_in_two = replace(settings, tokens=settings.tokens // 2)
    found = _losses(model, subnets, settings.texts[0], one_block_in_two, kept, f"curve of {settings.curve}")
    steps = -np.diff([evaluation["nats_per_token"] for evaluation in found])
    prices = np.diff([table.price(subnet) for subnet in subnets])
    print(
        f"\n{settings.curve} budgets from {budgets[0]:.2f}x to 1x, {one_block_in_two.tokens} tokens of "
        f"{settings.texts[0]}: the loss rises {(steps < 0).sum()} times, by at most {max(0, -steps.min()):.4f} nats; "
        f"the predicted time falls {(prices < 0).sum()} times; one choice takes {choosing_ms:.1f} ms"
    )


def _ms(times: dict[str, Any], subnet: Subnet) -> float:
    return float(times["ms"][subnet.to_json()])


# ------------------------------------------------------------------ showing


def _conditions(model: ElasticModel, table: CostTable, settings: Settings, kept: Kept) -> str:
    about = table.conditions
    measured = {
        search: sum(
            result["measured"] for name, result in kept.results.items() if name.startswith(f"choice, {search},")
        )
        for search in ("evolution", "random")
    }
    return (
        f"{Path(settings.model).name}, {settings.dtype}, {describe_device(model.device)}; {settings.phase}, "
        f"batch {about['batch']}, {about[TOKENS[table.metric]]} tokens, {about['engine']}; "
        f"loss on {settings.tokens} tokens; measured sub-networks: "
        + ", ".join(f"{search} {count}" for search, count in measured.items())
    )


def _header(columns: list[str]) -> str:
    return f"| budget | {' | '.join(columns)} |\n|:---|{'---:|' * len(columns)}"


def _name(budget: float, settings: Settings) -> str:
    return f"{budget:g}x" + ("" if budget in settings.budgets else " (between)")


def _print_losses(
    text: str, losses: dict[float, dict[str, dict[str, Any]]], full: dict[str, Any], settings: Settings
) -> None:
    print(f"\n{text}: nats per token; full model {full['nats_per_token']:.3f} ± {full['standard_error']:.3f}\n")
    print(_header(list(settings.methods)))
    for budget, row in losses.items():
        cells = [f"{row[method]['nats_per_token']:.3f}" if method in row else "–" for method in settings.methods]
        print(f"| {_name(budget, settings)} | {' | '.join(cells)} |")


def _print_times(chosen: Chosen, table: CostTable, times: dict[str, Any], settings: Settings) -> None:
    print(
        "\nMeasured ms / allowed ms (measured fraction of the full model's time); "
        f"full model {times['full_ms']:.2f} measured, {table.full:.2f} in the table; noise {times['noise']:.1%}\n"
    )
    print(_header(list(settings.methods)))
    for budget in settings.all_budgets:
        allowed = budget * table.full
        found = [_ms(times, of_method[budget]) if budget in of_method else None for of_method in chosen.values()]
        cells = ["–" if ms is None else f"{ms:.2f} / {allowed:.2f} ({ms / times['full_ms']:.2f}x)" for ms in found]
        print(f"| {_name(budget, settings)} | {' | '.join(cells)} |")


def _print_at_equal_time(
    text: str,
    losses: dict[float, dict[str, dict[str, Any]]],
    full: dict[str, Any],
    chosen: Chosen,
    times: dict[str, Any],
    settings: Settings,
) -> None:
    """Print how far every other method is above the router's losses, interpolated at the method's measured time."""

    def timed(method: str, budget: float) -> Loss:
        ratios = times["ratios"][chosen[method][budget].to_json()]
        blocks = tuple(losses[budget][method]["blocks"])
        return Loss(blocks, fmean(ratios), cost_error=standard_error(ratios))

    ours = [timed("router", budget) for budget in chosen.get("router", {})]
    if not ours:
        return
    curve = sorted([Loss(tuple(full["blocks"]), 1.0), *ours], key=lambda point: point.cost)
    others = [method for method in settings.methods if method != "router"]
    print(f"\n{text}: nats per token above the router at equal measured time, ± standard error of text and timing\n")
    print(_header(others))
    for budget in settings.all_budgets:
        found = [timed(method, budget).above(curve) if budget in chosen[method] else None for method in others]
        cells = ["–" if cell is None else f"{cell[0]:+.3f} ± {cell[1]:.3f}" for cell in found]
        print(f"| {_name(budget, settings)} | {' | '.join(cells)} |")


def _print_differences(text: str, losses: dict[float, dict[str, dict[str, Any]]], settings: Settings) -> None:
    print(f"\n{text}: router minus the best other method, ± paired standard error")
    for budget, row in losses.items():
        others = {method: found for method, found in row.items() if method != "router"}
        if "router" not in row or not others:
            continue
        best = min(others, key=lambda method: others[method]["nats_per_token"])
        difference, error = -others[best]["difference"], others[best]["difference_standard_error"]
        print(f"  {_name(budget, settings):<16}{difference:+.4f} ± {error:.4f} nats per token ({best})")


def _draw(
    picture: Path,
    losses: dict[str, dict[float, dict[str, dict[str, Any]]]],
    full: dict[str, list[dict[str, Any]]],
    times: dict[str, Any],
    chosen: Chosen,
    conditions: str,
) -> None:
    """Draw loss against measured time for every method, one panel per text."""
    figure = Figure(figsize=(1 + 6.5 * len(losses), 5.2), layout="constrained")
    for axes, (text, rows) in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses.items(), strict=True):
        for method in METHODS:
            style, color = STYLES[OURS if method == "router" else method]
            if method not in chosen:
                continue
            points = [
                (_ms(times, subnet), rows[budget][method]["nats_per_token"])
                for budget, subnet in chosen[method].items()
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), style, color=color, label=method, markersize=5)
        axes.plot(times["full_ms"], full[text][0]["nats_per_token"], "k*", markersize=11, label="full model")
        axes.set(title=text, xlabel="measured time, ms", ylabel="loss, nats per token")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(conditions.replace("; ", "\n"), fontsize=9)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Settings))
