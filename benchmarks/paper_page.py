"""The page of `paper.py`: tables and a picture from what its stages have left.

    python benchmarks/paper_page.py out/paper docs/results.md

All differences are paired by blocks of the same text; ± is the standard error over these blocks.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from flextron.atomic import write_text
from flextron.drawing import save_figure
from flextron.subnet import Subnet

mpl.use("agg")
PUBLISHED = Path(__file__).parent / "published.json"
OURS = "elastic, router"
TOKENWISE = "elastic, per token"
NAMES = {
    OURS: "**elastic, static router**",
    TOKENWISE: "elastic, routed per token",
    "greedy": "(c) same weights, greedy",
    "knapsack": "same weights, knapsack",
    "evolution": "(d) same weights, evolutionary search",
    "random": "same weights, random search",
    "equal widths": "(a) same weights, equal widths (Mix'n'Match)",
    "layer dropping": "(b) same weights, layer dropping",
    "alone-share": "(e) each size trained alone, same tokens in all",
    "alone-each": "(e) each size trained alone, same tokens each",
    "optipfair": "(f) optipfair, trained alone, same tokens each",
    "mergekit": "(f) mergekit, trained alone, same tokens each",
    "ranked only": "(h) no elastic training",
    "no-ranking": "(h) no ranking, and no router to visit by",
    "no-distillation": "(h) no distillation",
    "no-sandwich": "(h) no sandwich: random sub-networks only",
    "no-surrogate": "(h) no surrogate: the router trained through the LLM",
}
MUST_LOSE = ("equal widths", "layer dropping", "greedy", "optipfair", "mergekit", "alone-share")
"""What the router must beat."""


@dataclass(frozen=True)
class Loss:
    """Of one method at one budget on one text."""

    blocks: tuple[float, ...]
    cost: float | None = None
    """As a part of the full model's time, by the latency table."""

    @property
    def nats(self) -> float:
        """Nats per token."""
        return fmean(self.blocks)

    def above(self, other: Loss) -> tuple[float, float]:
        """Difference to another, paired, and its standard error."""
        differences = [a - b for a, b in zip(self.blocks, other.blocks, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return fmean(differences), error


Losses = dict[float, dict[str, Loss]]
"""By budget and method."""


class Results:
    """What the stages have left in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = _read(folder / "stages.json")
        self.settings = self.about["settings"]
        self.choices = _read(folder / "choices.json")
        self.texts: list[str] = self.settings["texts"]
        answers = sorted((folder / "answers").glob("*x.json"), reverse=True)
        self.answers = {float(file.name.removesuffix("x.json")): file for file in answers}

    @property
    def budgets(self) -> list[float]:
        """Parts of the full model's time, from the largest."""
        return list(self.answers)

    def evaluated(self, name: str, text: int) -> dict[str, Loss]:
        """Losses of a checkpoint by the names that they were asked by; nothing where the stage was left out."""
        file = self.folder / "losses" / f"{name}-{text}.json"
        if not file.is_file():
            return {}
        return {Path(row["name"]).name: Loss(tuple(row["blocks"]), row["cost"]) for row in _read(file)}

    def full(self, text: int) -> dict[str, Loss]:
        """The full model, before and after elastic training."""
        found = {"before": self.evaluated("ranked only", text).get("full")}
        found["after"] = self.evaluated("elastic", text).get("full")
        return {name: loss for name, loss in found.items() if loss is not None}

    def losses(self, text: int) -> Losses:
        """All methods."""
        return {budget: self._at(budget, text) for budget in self.budgets}

    def _at(self, budget: float, text: int) -> dict[str, Loss]:
        answer = self.answers[budget].name
        ours = self.evaluated("elastic", text)
        price = self._chosen("router", budget)[1]
        found = {OURS: Loss(ours[f"ttft={budget}x"].blocks, price), TOKENWISE: ours[f"ttft={budget}x per token"]}
        evaluations = self.choices[f"loss, {self.texts[text]}, {budget}"]
        for method in ("greedy", "knapsack", "evolution", "random", "equal widths", "layer dropping"):
            subnet, part = self._chosen(method, budget)
            rows = [row for row in evaluations if subnet is not None and Subnet(**row["subnet"]) == subnet]
            if rows:
                found[method] = Loss(tuple(rows[0]["blocks"]), part)
        for name in ("alone-share", "alone-each"):
            found |= _named(name, self.evaluated(f"{name}-{budget}x", text).get(answer), price)
        for tool in ("optipfair", "mergekit"):
            loss = self.evaluated(f"{tool}-{budget}x", text).get("full")
            if loss is not None:
                found |= _named(tool, loss, _read(self.folder / f"{tool}-{budget}x-pruned" / "pruned.json")["cost"])
        for name in ("ranked only", "no-ranking", "no-distillation", "no-sandwich"):
            found |= _named(name, self.evaluated(name, text).get(answer), price)
        return found | _named("no-surrogate", self.evaluated("no-surrogate", text).get(answer), None)

    def _chosen(self, method: str, budget: float) -> tuple[Subnet | None, float | None]:
        """A method's sub-network, and its measured time as a part of the full model's."""
        found = self.choices[f"choice, {method}, {budget}"]["subnet"]
        if found is None:
            return None, None
        subnet, times = Subnet(**found), self.choices["times"]
        return subnet, times["ms"][subnet.to_json()] / times["full_ms"]

    def seeds(self, budget: float, text: int) -> list[float]:
        """Loss of the router's answer after elastic training, for every seed."""
        answer = self.answers[budget].name
        others = [self.evaluated(f"seed-{seed}", text).get(answer) for seed in (1, 2)]
        first = self.evaluated("elastic", text)[f"ttft={budget}x"]
        return [loss.nats for loss in (first, *others) if loss is not None]


def _named(name: str, loss: Loss | None, cost: float | None) -> dict[str, Loss]:
    return {} if loss is None else {name: Loss(loss.blocks, cost)}


def write_page(folder: Path, page: Path | None = None) -> Path:
    """Write the page, by default results.md in the folder, and its picture beside it."""
    page = folder / "results.md" if page is None else page
    results = Results(folder)
    picture = page.with_suffix(".png")
    save_figure(_figure(results), picture)
    lines = [*_head(results), f"![loss against measured time]({picture.name})", ""]
    for place, text in enumerate(results.texts):
        lines += _table(results, place, text)
    lines += [*_verdict(results), *_tasks(results, page), *_published(), *_left_out(results), *_costs(results)]
    write_text(page, "\n".join(lines) + "\n")
    return page


def _head(results: Results) -> list[str]:
    settings, size = results.settings, results.about["size"]
    minutes = sum(results.about["seconds"].values()) / 60
    return [
        "# Results",
        "",
        f"Written by `benchmarks/paper_page.py` from what `python benchmarks/paper.py --size {settings['size']}` left "
        f"({minutes:.0f} minutes). {Path(settings['model']).name}: ranked on {size['rank_tokens']} tokens, trained on "
        f"{size['train_tokens']} of {', '.join(map(_short, settings['train']))}, "
        f"seed {settings['seed']}. Losses: {size['loss_tokens']} tokens of each text. Budgets are parts of the full "
        "model's time to the first token of a 512-token prompt.",
        "",
        "Conditions: " + "; ".join(line.partition(" on Linux")[0] for line in results.about["environment"]) + ".",
        "",
    ]


def _table(results: Results, place: int, text: str) -> list[str]:
    losses = results.losses(place)
    full = ", ".join(f"{name} elastic training {loss.nats:.3f}" for name, loss in results.full(place).items())
    lines = [
        f"## Loss on {_short(text)}",
        "",
        f"Full model, nats per token: {full}. In every cell: measured part of the full model's time, nats per token, "
        "and the difference to the first row, ± its paired standard error (above 0: worse than the router).",
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
            difference, error = loss.above(row[OURS])
            beside = "" if method == OURS else f" ({difference:+.3f} ± {error:.3f})"
            cost = "" if loss.cost is None else f"{loss.cost:.2f}x: "
            cells.append(f"{cost}{loss.nats:.3f}{beside}")
        if set(cells) != {"–"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    several = {budget: results.seeds(budget, place) for budget in losses}
    if max(map(len, several.values())) > 1:
        said = ", ".join(f"{b}x {fmean(each):.3f} ± {stdev(each):.3f}" for b, each in several.items() if len(each) > 1)
        lines += ["", f"Over seeds of training, mean ± standard deviation: {said}."]
    return [
        *lines,
        "",
        "Times were measured in interleaved runs, except those of per-token routing, optipfair and mergekit, which are "
        "by the latency table; rows (e) and (h) have the router's widths, except the router without a surrogate: its "
        "own keep to the budget by the latency table.",
        "",
    ]


def _verdict(results: Results) -> list[str]:
    """Where the router is ahead and where behind, from the numbers."""
    ahead, behind, unclear = [], [], []
    for place, text in enumerate(results.texts):
        for budget, row in results.losses(place).items():
            for method, loss in row.items():
                if method in (OURS, TOKENWISE):
                    continue
                difference, error = loss.above(row[OURS])
                said = f"{NAMES[method]} at {budget}x on {_short(text)} ({difference:+.3f} ± {error:.3f})"
                sure = abs(difference) > 2 * error
                (unclear if not sure else ahead if difference > 0 else behind).append((method, said))
    must = [said for method, said in unclear if method in MUST_LOSE]
    lost = [said for method, said in behind if method in MUST_LOSE]
    missing = [
        f"{NAMES[method]} at {budget}x on {_short(text)}"
        for place, text in enumerate(results.texts)
        for budget, row in results.losses(place).items()
        for method in MUST_LOSE
        if method not in row
    ]
    return [
        "## Where we are behind",
        "",
        f"Of {len([*ahead, *behind, *unclear])} comparisons the static router is ahead in {len(ahead)} by over two "
        f"standard errors, behind in {len(behind)}, and within them in {len(unclear)}.",
        "",
        *(f"- behind: {said}" for _, said in behind),
        "",
        "It has to beat (a), (b), (c), (f) and, with the same tokens in all, (e): it is behind in "
        f"{len(lost)} of these comparisons (above), and within two standard errors in {len(must)}.",
        "",
        *(f"- within: {said}" for said in must),
        *(f"- not compared: {said}" for said in missing),
        "",
    ]


def _tasks(results: Results, page: Path) -> list[str]:
    found = results.folder / "tasks" / "results.md"
    if not found.is_file():
        return ["## Tasks", "", "Not run: no data of tasks was given (docs/tasks.md).", ""]
    picture = page.with_name(f"{page.stem}-tasks.png")
    shutil.copyfile(found.with_suffix(".png"), picture)
    return ["## Tasks", "", found.read_text(encoding="utf8"), f"![accuracy against cost]({picture.name})", ""]


def _published() -> list[str]:
    """(g) what others have published of models trained end to end."""
    if not PUBLISHED.is_file():
        return []
    rows = _read(PUBLISHED)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines = ["## (g) Published results of models of such sizes", "", f"| model | {' | '.join(tasks)} |"]
    lines.append("|:---|" + "---:|" * len(tasks))
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for task in tasks:
            own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
            said = [f"{r['value']} ({r['metric']}, {r['shots']}-shot) [{sources.index(r['source']) + 1}]" for r in own]
            cells.append("; ".join(said) or "–")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return [*lines, "", *(f"{place}. {source}" for place, source in enumerate(sources, 1)), ""]


def _left_out(results: Results) -> list[str]:
    """What a whole comparison would have and this one has not."""
    size = results.about["size"]
    found = {method for row in results.losses(0).values() for method in row}
    lines = [f"- {name}." for method, name in NAMES.items() if method not in found]
    if size["seeds"] == 1:
        lines.append("- More than one seed of training: standard errors are of the text, not of training.")
    for what, key in (("Tasks", "tasks_at"), ("Other tools' pruning", "rivals_at")):
        if set(size[key]) != set(size["budgets"]):
            lines.append(f"- {what} at budgets other than {', '.join(f'{each}x' for each in size[key])}.")
    if size["limit"]:
        lines.append(f"- Tasks on more than {size['limit']} documents each.")
    return ["## What was not run", "", *lines, ""]


def _costs(results: Results) -> list[str]:
    """Time of all stages, those that differ in text or budget only put together."""
    groups: dict[str, float] = {}
    for name, seconds in results.about["seconds"].items():
        kind = re.sub(r"-?\d.*$", "", name.partition(",")[0]).removesuffix(" to ").strip()
        kind = "losses" if kind.startswith("losses") else kind
        groups[kind] = groups.get(kind, 0) + seconds
    lines = ["## What it took", "", "| stages | seconds |", "|:---|---:|"]
    return [*lines, *(f"| {kind} | {seconds:.0f} |" for kind, seconds in groups.items())]


def _short(text: str) -> str:
    """A text's name without folders, unless it comes with flextron."""
    return text if text.startswith("sample/") else Path(text).name


def _figure(results: Results) -> Figure:
    shown = {
        OURS: ("o-", "#1f5fa8"),
        TOKENWISE: ("*-", "#c2185b"),
        "greedy": ("^--", "#5b9bd5"),
        "evolution": ("D--", "#8a4fa3"),
        "equal widths": ("s--", "#c2622d"),
        "layer dropping": ("P--", "#b03a48"),
        "alone-share": ("v:", "#3f8f5f"),
        "alone-each": ("^:", "#3f8f5f"),
        "optipfair": ("x:", "#555555"),
        "mergekit": ("+:", "#999999"),
    }
    figure = Figure(figsize=(1 + 6.5 * len(results.texts), 5.2), layout="constrained")
    for place, axes in enumerate(figure.subplots(1, len(results.texts), squeeze=False)[0]):
        rows = results.losses(place)
        for method, (style, color) in shown.items():
            points = [(row[method].cost, row[method].nats) for row in rows.values() if method in row]
            if points and all(cost is not None for cost, _ in points):
                axes.plot(*zip(*sorted(points), strict=True), style, color=color, label=method, markersize=5)
        full = results.full(place).get("after")
        if full is not None:
            axes.plot(1, full.nats, "k*", markersize=11, label="full model")
        axes.set(title=_short(results.texts[place]), xlabel="part of the full model's time", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf8"))


if __name__ == "__main__":
    print(write_page(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
