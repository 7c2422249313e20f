"""Write the results page of `paper.py`: tables and a picture from the files of its stages.

    python benchmarks/paper_page.py out/paper docs/results.md

All differences are paired by blocks of the same text and taken at equal cost: the router's losses are interpolated
between its answers and the full model. ± is the standard error over these blocks; if two sub-networks were timed, it
includes the standard error over timing rounds.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from flextron.atomic import write_text
from flextron.costs.table import CostTable
from flextron.exporting.card import text_names
from flextron.pictures.widths import save_figure
from flextron.subnet import Subnet

mpl.use("agg")
SHAPE = "shape.json"
"""File in the folder of a model pruned by another tool: the sub-network of the same cost."""
PUBLISHED = Path(__file__).parent / "published.json"
OURS = "elastic, router"
TOKENWISE = "elastic, per token"
STYLES = {
    OURS: ("o-", "#1f5fa8"),
    TOKENWISE: ("*-", "#c2185b"),
    "greedy": ("^--", "#5b9bd5"),
    "knapsack": ("v--", "#3f8f5f"),
    "evolution": ("D--", "#8a4fa3"),
    "random": ("x:", "#888888"),
    "equal widths": ("s--", "#c2622d"),
    "layer dropping": ("P--", "#b03a48"),
    "alone-share": ("v:", "#3f8f5f"),
    "alone-each": ("^:", "#3f8f5f"),
    "optipfair": ("x:", "#555555"),
    "mergekit": ("+:", "#999999"),
}
"""Line style and colour of every method in pictures."""
NAMES = {
    OURS: "**elastic, static router**",
    TOKENWISE: "elastic, routed per token",
    "greedy": "(c) same weights, greedy",
    "knapsack": "same weights, knapsack",
    "evolution": "(d) same weights, evolutionary search",
    "random": "same weights, random search",
    "equal widths": "(a) same weights, equal widths (Mix'n'Match)",
    "layer dropping": "(b) same weights, layer dropping",
    "alone-share": "(e) each size trained alone, same tokens in total",
    "alone-each": "(e) each size trained alone, same tokens for each",
    "optipfair": "(f) optipfair, trained alone, same tokens in total",
    "mergekit": "(f) mergekit, trained alone, same tokens in total",
    "ranked only": "(h) no elastic training",
    "no-ranking": "(h) no ranking, trained on these widths",
    "no-distillation": "(h) no distillation",
    "no-sandwich": "(h) no sandwich: the full model is not trained",
    "no-surrogate": "(h) no surrogate: the router is trained through the LLM",
}
SAME_WEIGHTS = ("equal widths", "layer dropping", "greedy")
"""The methods that the router must beat on the same weights."""
MUST_LOSE = (*SAME_WEIGHTS, "optipfair", "mergekit", "alone-share")
"""All methods that the router must beat."""


@dataclass(frozen=True)
class Loss:
    """Loss of one method at one budget on one text."""

    blocks: tuple[float, ...]
    """Nats per token of each block."""
    cost: float
    """Cost as a fraction of the full model's time."""
    timed: bool = True
    """Whether the cost was measured; otherwise the latency table predicts it."""
    cost_error: float = 0.0
    """Standard error of a measured cost over timing rounds; 0 for the router's own widths, which cost the same."""

    @property
    def nats(self) -> float:
        """Mean nats per token."""
        return fmean(self.blocks)

    def above(self, curve: Sequence[Loss]) -> tuple[float, float]:
        """Return the difference to a curve of losses at this cost, and its standard error.

        `curve` has ascending costs and is linear between its points; beyond the ends, the last line is extended. The
        error combines that of the blocks with that of timing, if this cost has one: the errors of this cost and of
        both points, multiplied by the slope of the line.
        """
        right = min(max(bisect_left([point.cost for point in curve], self.cost), 1), len(curve) - 1)
        low, high = curve[right - 1], curve[right]
        run = high.cost - low.cost
        part = (self.cost - low.cost) / run if run > 0 else 0.0
        line = [a + part * (b - a) for a, b in zip(low.blocks, high.blocks, strict=True)]
        differences = [a - b for a, b in zip(self.blocks, line, strict=True)]
        if len(differences) < 2:
            return fmean(differences), math.nan
        slope = (high.nats - low.nats) / run if self.cost_error and run > 0 else 0.0
        costs = (self.cost_error, (1 - part) * low.cost_error, part * high.cost_error)
        error = math.hypot(standard_error(differences), *(slope * each for each in costs))
        return fmean(differences), error


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


Losses = dict[float, dict[str, Loss]]
"""Losses by budget and method."""


class Results:
    """The results of all stages in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = _read(folder / "stages.json")
        self.settings = self.about["settings"]
        self.choices = _read(folder / "choices.json")
        self.table = table_of(folder)
        self.texts: list[str] = self.settings["texts"]
        answers = sorted((folder / "answers").glob("*x.json"), reverse=True)
        self.answers = {float(file.name.removesuffix("x.json")): file for file in answers}

    @property
    def of_a_pack(self) -> bool:
        """Whether the model was trained before this run, so that nothing was trained for comparison."""
        return bool(self.settings["size"] == "pack")

    @property
    def budgets(self) -> list[float]:
        """Budgets as fractions of the full model's time, from the largest."""
        return list(self.answers)

    def evaluated(self, name: str, text: int) -> dict[str, dict[str, Any]]:
        """Return a checkpoint's evaluations by requested name; empty if the stage was not run."""
        file = self.folder / "losses" / f"{name}-{text}.json"
        return {Path(row["name"]).name: row for row in _read(file)} if file.is_file() else {}

    def full(self, text: int) -> dict[str, Loss]:
        """Return the full model's loss before, where it was measured, and after elastic training."""
        found = {"before": self.evaluated("ranked only", text), "after": self.evaluated("elastic", text)}
        return {name: Loss(tuple(rows["full"]["blocks"]), 1.0) for name, rows in found.items() if rows}

    def losses(self, text: int) -> Losses:
        """Return the losses of all methods on a text."""
        return {budget: self._at(budget, text) for budget in self.budgets}

    def above(self, loss: Loss, text: int) -> tuple[float, float]:
        """Return the difference to the router's loss at the same cost, and its standard error.

        The router's losses are interpolated between its answers and the full model, and extended below its lowest
        budget.
        """
        ours = self.evaluated("elastic", text)
        curve = [replace(self.full(text)["after"], timed=loss.timed)]
        for budget in self.budgets:
            blocks = tuple(ours[f"ttft={budget}x"]["blocks"])
            cost, error = self._timed("router", budget)[1:]
            if not loss.timed:
                cost, error = self._price(Subnet.load(self.answers[budget])), 0.0
            curve.append(Loss(blocks, cost, loss.timed, error))
        return loss.above(sorted(curve, key=lambda point: point.cost))

    def _at(self, budget: float, text: int) -> dict[str, Loss]:
        answer = self.answers[budget].name
        ours = self.evaluated("elastic", text)
        cost = self._timed("router", budget)[1]  # no cost error: compared methods have the same widths
        tokenwise = ours[f"ttft={budget}x per token"]
        found = {
            OURS: Loss(tuple(ours[f"ttft={budget}x"]["blocks"]), cost),
            TOKENWISE: Loss(tuple(tokenwise["blocks"]), tokenwise["cost"], timed=False),
        }
        evaluations = self.choices[f"loss, {self.texts[text]}, {budget}"]
        for method in ("greedy", "knapsack", "evolution", "random", "equal widths", "layer dropping"):
            if f"choice, {method}, {budget}" not in self.choices:
                continue
            subnet, part, error = self._timed(method, budget)
            rows = [row for row in evaluations if subnet is not None and Subnet(**row["subnet"]) == subnet]
            if rows:
                found[method] = Loss(tuple(rows[0]["blocks"]), part, cost_error=error)
        same_widths = {f"alone-{kind}": f"alone-{kind}-{budget}x" for kind in ("share", "each")}
        same_widths |= {name: name for name in ("ranked only", "no-ranking", "no-distillation", "no-sandwich")}
        for name, file in same_widths.items():
            rows_by_name = self.evaluated(file, text)
            if answer in rows_by_name:
                found[name] = Loss(tuple(rows_by_name[answer]["blocks"]), cost)
        for tool in ("optipfair", "mergekit"):
            rows_by_name = self.evaluated(f"{tool}-{budget}x", text)
            if rows_by_name:
                shape = Subnet.load(self.folder / f"{tool}-{budget}x-pruned" / SHAPE)
                found[tool] = self._costing(tuple(rows_by_name["full"]["blocks"]), shape)
        rows_by_name = self.evaluated("no-surrogate", text)
        if answer in rows_by_name:
            subnet = Subnet.load(self.folder / "no-surrogate" / answer)
            found["no-surrogate"] = self._costing(tuple(rows_by_name[answer]["blocks"]), subnet)
        return found

    def _costing(self, blocks: tuple[float, ...], subnet: Subnet) -> Loss:
        """Return a Loss at the measured time of a sub-network, or at the table's if it was not timed."""
        if subnet.to_json() not in self.choices["times"]["ratios"]:
            return Loss(blocks, self._price(subnet), timed=False)
        part, error = self._measured(subnet)
        return Loss(blocks, part, cost_error=error)

    def _measured(self, subnet: Subnet) -> tuple[float, float]:
        """Return the measured time as a fraction of the full model's, and its standard error."""
        ratios = self.choices["times"]["ratios"][subnet.to_json()]
        return fmean(ratios), standard_error(ratios)

    def _timed(self, method: str, budget: float) -> tuple[Subnet | None, float, float]:
        """Return a method's sub-network, its measured time as a fraction of the full model's, and the time's error."""
        found = self.choices[f"choice, {method}, {budget}"]["subnet"]
        if found is None:
            return None, math.nan, math.nan
        subnet = Subnet(**found)
        return subnet, *self._measured(subnet)

    def _price(self, subnet: Subnet) -> float:
        """Return a sub-network's time in the latency table, as a fraction of the full model's."""
        return self.table.price(subnet) / self.table.full

    def seeds(self, budget: float, text: int) -> list[float]:
        """Return the loss of the router's answer after elastic training, for every seed."""
        others = [self.evaluated(f"seed-{seed}", text).get(self.answers[budget].name) for seed in (1, 2)]
        first = self.evaluated("elastic", text)[f"ttft={budget}x"]
        return [fmean(row["blocks"]) for row in (first, *others) if row is not None]


def table_of(folder: Path) -> CostTable:
    """Return the latency table that prices all methods."""
    return next(CostTable.load(file) for file in sorted((folder / "ranked" / "latency").glob("ttft-*.json")))


def write_page(folder: Path, page: Path | None = None) -> Path:
    """Write the page, by default results.md in the folder, and its picture next to it; return the page's path."""
    page = folder / "results.md" if page is None else page
    results = Results(folder)
    picture = page.with_suffix(".png")
    save_figure(_figure(results), picture)
    lines = [*_head(results), f"![loss against measured time]({picture.name})", ""]
    for index, text in enumerate(results.texts):
        lines += _table(results, index, text)
    lines += [*_verdict(results), *_tasks(results, page), *_published(), *_left_out(results), *_costs(results)]
    write_text(page, "\n".join(lines) + "\n")
    return page


def _head(results: Results) -> list[str]:
    settings, size = results.settings, results.about["size"]
    tokens = size["prompt_tokens"]
    prompts = (
        f"a {tokens}-token prompt" if size["batch"] == 1 else f"{size['batch']} prompts of {tokens} tokens at once"
    )
    return [
        "# Results",
        "",
        f"`benchmarks/paper_page.py` wrote this page from a run of `benchmarks/paper.py --size {settings['size']}` "
        f"({results.about['minutes']:.0f} minutes, with {results.choices['times']['rounds']} rounds of timing). "
        f"{_trained(results)} Losses are means over {size['loss_tokens']} tokens "
        f"of each text. Budgets are fractions of the full model's time to the first token of {prompts}.",
        "",
        "Conditions: " + "; ".join(line.partition(" on Linux")[0] for line in results.about["environment"]) + ".",
        "",
    ]


def _trained(results: Results) -> str:
    settings, size, dtype = results.settings, results.about["size"], results.about["dtype"]
    if results.of_a_pack:
        pack = _read(results.folder / "ranked" / "pack.json")
        return (
            f"The pack of {pack['base']} was trained before, on {pack['about']['tokens']:,} tokens of "
            f"{text_names(pack['about']['data'])}; everything here runs in {dtype}."
        )
    return (
        f"{Path(settings['model']).name} was ranked on {size['rank_tokens']} tokens, trained on "
        f"{size['train_tokens']} tokens of {', '.join(map(_short, settings['train']))}, "
        f"with seed {settings['seed']} in {dtype}."
    )


def _table(results: Results, index: int, text: str) -> list[str]:
    losses = results.losses(index)
    full = ", ".join(f"{name} elastic training {loss.nats:.3f}" for name, loss in results.full(index).items())
    lines = [
        f"## Loss on {_short(text)}",
        "",
        f"Full model, nats per token: {full}. Each cell shows the fraction of the full model's time, nats per token, "
        "and the difference to the router at the same cost ± standard error; above 0 is worse than the router.",
        "",
        "| method | " + " | ".join(f"{budget}x" for budget in losses) + " |",
        "|:---|" + "---:|" * len(losses),
    ]
    for method, name in NAMES.items():
        cells = []
        for row in losses.values():
            loss = row.get(method)
            if loss is None:
                cells.append("–")
                continue
            difference, error = results.above(loss, index)
            beside = "" if method == OURS else f" ({difference:+.3f} ± {error:.3f})"
            cells.append(f"{loss.cost:.2f}x: {loss.nats:.3f}{beside}")
        if set(cells) != {"–"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    untimed = {method for row in losses.values() for method, loss in row.items() if not loss.timed}
    by_table = [name for method, name in NAMES.items() if method in untimed]
    several = {budget: results.seeds(budget, index) for budget in losses}
    if max(map(len, several.values())) > 1:
        said = ", ".join(f"{b}x {fmean(each):.3f} ± {stdev(each):.3f}" for b, each in several.items() if len(each) > 1)
        lines += ["", f"Over seeds of training, mean ± standard deviation: {said}."]
    return [
        *lines,
        "",
        "Times were measured in interleaved rounds, in which the full model's own time varied by "
        f"{results.choices['times']['noise']:.1%}. ± includes timing error, converted to nats by the slope of the "
        "router's loss curve, which is interpolated between its answers and the full model. A model pruned by another "
        "tool is timed as the sub-network of its shape. (e) and (h) use the router's widths, except the router without "
        "a surrogate. "
        f"The latency table gives the costs of these methods and of the router next to them: {'; '.join(by_table)}.",
        "",
    ]


def _verdict(results: Results) -> list[str]:
    """Return the section that counts where the router is ahead and lists where it is behind."""
    ahead, behind, unclear = [], [], []
    for index, text in enumerate(results.texts):
        for budget, row in results.losses(index).items():
            for method, loss in row.items():
                if method in (OURS, TOKENWISE):
                    continue
                difference, error = results.above(loss, index)
                said = f"{NAMES[method]} at {budget}x on {_short(text)} ({difference:+.3f} ± {error:.3f})"
                sure = abs(difference) > 2 * error
                (unclear if not sure else ahead if difference > 0 else behind).append((method, said))
    rivals = SAME_WEIGHTS if results.of_a_pack else MUST_LOSE
    named = "(a), (b) and (c)" if results.of_a_pack else "(a), (b), (c), (f), and (e) with the same tokens in total"
    must = [said for method, said in unclear if method in rivals]
    lost = [said for method, said in behind if method in rivals]
    missing = _missing(results, rivals)
    return [
        "## Where we are behind",
        "",
        f"The static router is ahead by over two standard errors in {len(ahead)} of "
        f"{len([*ahead, *behind, *unclear])} comparisons, behind in {len(behind)}, and within two in {len(unclear)}.",
        "",
        *(f"- behind: {said}" for _, said in behind),
        "",
        f"The router must beat {named}. In these comparisons it is behind in {len(lost)} "
        f"(listed above), and within two standard errors in {len(must)}.",
        "",
        *(f"- within: {said}" for said in must),
        *(f"- not compared: {said}" for said in missing),
        "",
    ]


def _missing(results: Results, methods: Sequence[str]) -> list[str]:
    """Return a line for each of the methods that the router was not compared with."""
    rows = results.losses(0)
    gaps = {method: [budget for budget in rows if method not in rows[budget]] for method in methods}
    return [f"{NAMES[method]} at {', '.join(f'{b}x' for b in budgets)}" for method, budgets in gaps.items() if budgets]


def _tasks(results: Results, page: Path) -> list[str]:
    found = results.folder / "tasks" / "results.md"
    if not found.is_file():
        return ["## Tasks", "", "Not run: the tasks need data (docs/tasks.md).", ""]
    picture = page.with_name(f"{page.stem}-tasks.png")
    shutil.copyfile(found.with_suffix(".png"), picture)
    return [
        "## Tasks",
        "",
        found.read_text(encoding="utf8"),
        f"![accuracy over chance against cost]({picture.name})",
        "",
    ]


def _published() -> list[str]:
    """Return section (g): published results of models trained end to end."""
    if not PUBLISHED.is_file():
        return []
    rows = _read(PUBLISHED)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines = ["## (g) Published results of models of such sizes", "", f"| model | {' | '.join(tasks)} | average |"]
    lines.append("|:---|" + "---:|" * (len(tasks) + 1))
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for task in tasks:
            own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
            said = [f"{r['value']} ({r['metric']}, {r['shots']}-shot) [{sources.index(r['source']) + 1}]" for r in own]
            cells.append("; ".join(said) or "–")
        firsts = {row["task"]: row["value"] for row in reversed(rows) if row["model"] == model}
        average = f"{fmean(firsts.values()):.1f}" if len(firsts) == len(tasks) else "–"
        lines.append(f"| {model} | {' | '.join(cells)} | {average} |")
    return [*lines, "", *(f"{index}. {source}" for index, source in enumerate(sources, 1)), ""]


def _left_out(results: Results) -> list[str]:
    """Return the section that lists what this run left out."""
    size = results.about["size"]
    found = {method for row in results.losses(0).values() for method in row}
    trains = {name for name in NAMES.values() if name.startswith(("(e)", "(f)", "(h)"))} if results.of_a_pack else set()
    lines = [f"- {name}." for method, name in NAMES.items() if method not in found and name not in trains]
    if results.of_a_pack:
        lines.append("- (e), (f) and (h): each would have to be trained on as many tokens.")
    elif results.settings["size"] != "full":
        lines.append("- `--size full`, on a GPU: more text, training, documents and seeds.")
    if size["seeds"] == 1:
        lines.append("- More than one training seed: standard errors cover the text, not training.")
    has_tasks = (results.folder / "tasks" / "results.md").is_file()
    parts = {"Tasks": "tasks_at"} if has_tasks else {}
    if not results.of_a_pack:
        parts["(e) with the same tokens for each, and ablations"] = "costly_at"
    for what, key in parts.items():
        if set(size[key]) != set(size["budgets"]):
            lines.append(f"- {what} at budgets other than {', '.join(f'{each}x' for each in size[key])}.")
    if size["limit"] and has_tasks:
        lines.append(f"- Tasks on more than {size['limit']} documents each.")
    return ["## What was not run", "", *lines, ""]


def _costs(results: Results) -> list[str]:
    """Return the section with the time of all stages, summed over texts and budgets."""
    groups: dict[str, float] = {}
    for name, seconds in results.about["seconds"].items():
        kind = re.sub(r"-?\d.*$", "", name.partition(",")[0]).removesuffix(" to ").strip()
        kind = "losses" if kind.startswith("losses") else kind
        groups[kind] = groups.get(kind, 0) + seconds
    together = f"{results.about['minutes']:.0f} minutes in total; stages that time nothing ran in parallel."
    lines = ["## What it took", "", together, "", "| stages | seconds |", "|:---|---:|"]
    return [*lines, *(f"| {kind} | {seconds:.0f} |" for kind, seconds in groups.items())]


def _short(text: str) -> str:
    """Return a text's name without folders, unless it comes with flextron."""
    return text if text.startswith("sample/") else Path(text).name


def _figure(results: Results) -> Figure:
    labels = {"alone-share": "alone, same tokens in total", "alone-each": "alone, same tokens for each"}
    figure = Figure(figsize=(1 + 6.5 * len(results.texts), 5.2), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, len(results.texts), squeeze=False)[0]):
        rows = results.losses(index)
        for method, (style, color) in STYLES.items():
            points = [(row[method].cost, row[method].nats) for row in rows.values() if method in row]
            if points:
                label = labels.get(method, method)
                axes.plot(*zip(*sorted(points), strict=True), style, color=color, label=label, markersize=5)
        axes.plot(1, results.full(index)["after"].nats, "k*", markersize=11, label="full model")
        axes.set(
            title=_short(results.texts[index]), xlabel="fraction of the full model's time", ylabel="nats per token"
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf8"))


if __name__ == "__main__":
    print(write_page(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
