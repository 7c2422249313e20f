"""`evaluate_tasks`: accuracy of sub-networks on tasks, with lm-eval's prompts and scoring, on the same documents."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from flextron.atomic import reserved
from flextron.data.blocks import require_tokenizer
from flextron.elastic.model import ElasticModel
from flextron.errors import FlextronError, first_line
from flextron.records import Journal, RecordError, checked
from flextron.routers.token.batch import TokenRouting
from flextron.subnet import Subnet
from flextron.tasks.names import DATA, check_names, data_folder, name_and_shots, no_such_task, task_names
from flextron.tasks.results import TaskResult, plain_name

SHOTS = {"mmlu": 5, "hellaswag": 10}
"""Default number of examples before each question. Other tasks have lm-eval's default."""
METRICS = {"hellaswag": "acc_norm"}
"""The main metric of a task, if it is not `acc`."""
VERSION = 2
_SEED = 1234
_YAML = Path(__file__).parent / "yaml"


@dataclass(frozen=True)
class _Loaded:
    """A task of lm-eval, or the tasks of a group, and the documents to score."""

    name: str
    shots: int
    tasks: dict[str, Any]
    samples: dict[str, list[int]]
    data: str
    """Identifies the data: a hash of local files, or hub."""


def evaluate_tasks(
    model: ElasticModel,
    runs: Mapping[str, Subnet | TokenRouting],
    tasks: Sequence[str] | str = "paper",
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    keep: str | Path | None = None,
    show: bool = False,
) -> list[TaskResult]:
    """Measure the accuracy of each run on each task. `results.averages` compares the others with the first run.

    Args:
        tasks: "paper", or names of lm-eval's tasks. NAME@SHOTS sets the number of examples, such as hellaswag@0.
        data: folder of local files (docs/tasks.md). The default is `$FLEXTRON_TASK_DATA`, then lm-eval's own tasks
            with data from the Hugging Face hub.
        limit: most documents of each task, always the same random sample, spread evenly over the task's subjects.
        keep: file that stores each finished run on a task. Runs with the same weights, task and settings are read from
            it instead of computed.

    Raises:
        FlextronError: lm-eval is not installed, a task is unknown, its data is missing, or there is no tokenizer.
        SubnetError: a sub-network is not in the model's search space. This is checked first.
        ValueError: there is no run or no task, or `limit` is below 1.
    """
    if not runs or not tasks:
        raise ValueError("name at least one run and one task.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    for run in runs.values():
        if isinstance(run, Subnet):
            model.search_space.check(run)
    require_tokenizer(model.tokenizer)
    loaded = _load([tasks] if isinstance(tasks, str) else tasks, data_folder(data), limit)
    with _quiet():
        from flextron.tasks.lm import ElasticLM  # needs lm-eval

        lm = ElasticLM(model)
    weights = {"weights": model.fingerprint(), "dtype": str(model.dtype), "device": model.device.type}
    results = []
    with nullcontext() if keep is None else reserved(keep):
        kept = _Kept(keep)
        for task in loaded:
            settings = {**weights, "task": task.name, "shots": task.shots, "limit": limit, "data": task.data}
            lm.encoded.clear()
            for name, run in runs.items():
                key = {"version": VERSION, "lm_eval": version("lm-eval"), **settings, "run": _identity(run)}
                if not kept.has(key):
                    lm.shown, lm.stderr = (f"{task.name}, {name}" if show else None), sys.stderr
                    kept.add(key, _score(model, lm, run, task))
                results.append(_result(name, task, kept.of(key)))
    return sorted(results, key=lambda result: list(runs).index(result.run))


def sample(strata: Sequence[str], limit: int | None) -> list[int]:
    """Indices of at most `limit` documents, ascending: a fixed draw, in proportion to the size of each stratum.

    A larger limit includes the documents of a smaller one.
    """
    if limit is None or limit >= len(strata):
        return list(range(len(strata)))
    draw = random.Random(_SEED)  # noqa: S311 - a fixed draw, no secret
    members: dict[str, list[int]] = defaultdict(list)
    for place, stratum in enumerate(strata):
        members[stratum].append(place)
    order = []
    for stratum in sorted(members):
        places = members[stratum]
        draw.shuffle(places)
        start = draw.random()
        order += [((rank + start) / len(places), place) for rank, place in enumerate(places)]
    return sorted(place for _, place in sorted(order)[:limit])


def _load(tasks: Sequence[str], folder: Path | None, limit: int | None) -> list[_Loaded]:
    check_names(tasks, folder)
    try:
        manager_of = import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise FlextronError(f'tasks need lm-eval: {error}. Run: pip install "flextron[tasks]"') from None
    with _quiet():
        local = {"include_path": str(_YAML), "include_defaults": False, "metadata": {"data": str(folder)}}
        manager = manager_of(**local if folder else {})
        return [_load_one(manager, wish, folder, limit) for wish in task_names(tasks)]


def _load_one(manager: Any, wish: str, folder: Path | None, limit: int | None) -> _Loaded:
    name, shots = name_and_shots(wish)
    if name not in manager.all_tasks:
        raise no_such_task(name, folder)
    try:
        found = manager.load([name])["tasks"]
    except FlextronError:
        raise
    except Exception as error:  # lm-eval and datasets raise many kinds
        reason = first_line(error)
        hint = f" With no Hugging Face hub in reach, pass --task-data DIR or set {DATA} (docs/tasks.md)."
        raise FlextronError(f"cannot load the task {name}: {reason}." + ("" if folder else hint)) from None
    for task in found.values():
        default = task.get_config("num_fewshot") or 0
        task.set_config("num_fewshot", SHOTS.get(name, default) if shots is None else shots)
    shots = next(iter(found.values())).get_config("num_fewshot")
    data = "hub"
    if folder:
        from flextron.tasks.local import digest  # needs datasets

        data = digest(folder, name)
    return _Loaded(wish, shots, found, _samples(found, limit), data)


def _samples(tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[int]]:
    places: list[tuple[str, int]] = []
    strata: list[str] = []
    for name, task in tasks.items():
        documents = task.eval_docs
        places += [(name, place) for place in range(len(documents))]
        strata += documents["subject"] if "subject" in documents.features else [name] * len(documents)
    samples: dict[str, list[int]] = defaultdict(list)
    for chosen in sample(strata, limit):
        name, place = places[chosen]
        samples[name].append(place)
    return dict(samples)


def _score(model: ElasticModel, lm: Any, run: Subnet | TokenRouting, task: _Loaded) -> dict[str, Any]:
    """Score a run on a task, in the form in which `_Kept` stores it."""
    routing = run if isinstance(run, TokenRouting) else None
    if routing is not None:
        routing.forget()
    tasks = {name: task.tasks[name] for name in task.samples}
    for each in tasks.values():
        each.set_fewshot_seed(_SEED)
    with _quiet(), _use(model, run):
        evaluated = import_module("lm_eval.evaluator").evaluate(
            lm, {"tasks": tasks}, samples=task.samples, bootstrap_iters=0, log_samples=True
        )
    documents = [
        (f"{name}/{row['doc_id']}", row)
        for name, rows in evaluated["samples"].items()
        for row in sorted(rows, key=lambda row: int(row["doc_id"]))
    ]
    metrics = [metric for metric in ("acc", "acc_norm") if all(metric in row for _, row in documents)]
    if not metrics:
        raise FlextronError(f"the task {task.name} reports no accuracy, which the runs are compared by. Leave it out.")
    return {
        "scores": {metric: [float(row[metric]) for _, row in documents] for metric in metrics},
        "documents": [document for document, _ in documents],
        "share": model.share(run) if isinstance(run, Subnet) else run.share,
        "cost": None if routing is None else routing.average_cost,
        "chance": fmean(_chance(tasks[document.rpartition("/")[0]], row) for document, row in documents),
    }


def _chance(task: Any, row: Mapping[str, Any]) -> float:
    """The accuracy of guessing on one document: one over the number of its choices, 0 where there are none."""
    if task.get_config("output_type") != "multiple_choice":
        return 0.0
    contexts_and_choices = {tuple(request[:2]) for request in row["arguments"]}
    return 1 / len(contexts_and_choices)


def _use(model: ElasticModel, run: Subnet | TokenRouting) -> AbstractContextManager[Any]:
    return model.use(run) if isinstance(run, Subnet) else run.use()


def _result(name: str, task: _Loaded, scored: Mapping[str, Any]) -> TaskResult:
    wanted = METRICS.get(plain_name(task.name), "acc")
    scores = {metric: tuple(values) for metric, values in scored["scores"].items()}
    return TaskResult(
        run=name,
        task=task.name,
        shots=task.shots,
        metric=wanted if wanted in scores else "acc",
        scores=scores,
        documents=tuple(scored["documents"]),
        share=scored["share"],
        cost=scored["cost"],
        chance=scored["chance"],
    )


def _identity(run: Subnet | TokenRouting) -> str:
    """Identifies a run among all others on the same weights."""
    if isinstance(run, Subnet):
        return run.to_json()
    digest = hashlib.sha256(repr((run.budgets_B.tolist(), run.subnets, run.hard, run.shuffled, run.masked)).encode())
    for name, tensor in sorted(run.router.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Kept:
    """Scores of finished runs in an append-only file. The key holds everything that a score depends on."""

    def __init__(self, file: str | Path | None) -> None:
        self._journal = None if file is None else Journal(file)
        self._scored: dict[str, dict[str, Any]] = {}
        if self._journal is not None:
            self._read(self._journal)

    def _read(self, journal: Journal) -> None:
        try:
            self._scored.update(journal.read(_kept))
        except OSError as error:
            where = f"the results kept in {journal.file}"
            raise FlextronError(f"cannot read {where}: {error}. Delete it to start anew.") from None

    def has(self, key: Mapping[str, Any]) -> bool:
        return _text(key) in self._scored

    def of(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return self._scored[_text(key)]

    def add(self, key: Mapping[str, Any], scored: dict[str, Any]) -> None:
        self._scored[_text(key)] = scored
        if self._journal is not None:
            self._journal.append({"key": dict(key), "scored": scored})


class _Scored(TypedDict):
    """What a run scored on a task."""

    scores: dict[str, tuple[float, ...]]
    documents: tuple[str, ...]
    share: float
    cost: float | None
    chance: float


def _kept(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    scored: dict[str, Any] = dict(checked(entry["scored"], _Scored, "scored"))
    if "acc" not in scored["scores"] or {len(each) for each in scored["scores"].values()} != {len(scored["documents"])}:
        raise RecordError("it has not one score for each document")
    return _text(entry["key"]), scored


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's progress bars and warnings, which are about settings made here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
