"""`benchmarks/paper.py`: stages run once and in parallel, failures stop them, and all commands are valid."""

import json
import shutil
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import tyro
from transformers import AutoModelForCausalLM

import no_surrogate
import paper as paper_script
import router
import tiny
from flextron.cli import parse
from flextron.costs.table import CostTable
from flextron.elastic.pack import find_pack
from flextron.subnet import SearchSpace, Subnet
from paper import Paper, Settings
from paper_page import SHAPE


@pytest.fixture
def settings(tmp_path):
    return Settings(size="tiny", model="some/model", device="cpu", out=tmp_path / "paper", jobs=2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_is_done_is_not_done_again(settings):
    ran = []
    for _ in range(2):
        Paper(settings).once("stage", ran.append)
    assert ran == [None]


@pytest.mark.parametrize("change", [{"seed": 1}, {"train_tokens": 7}, {"rank": "other.txt"}])
def test_a_folder_of_other_settings_is_refused(settings, change):
    Paper(settings).once("stage", lambda log: None)
    with pytest.raises(SystemExit, match="has results of other settings"):
        Paper(paper_script.replace(settings, **change))


def test_what_changes_no_stage_may_change(settings):
    Paper(settings).once("stage", lambda log: None)
    assert Paper(paper_script.replace(settings, parts=("tasks",), jobs=1)).seconds.keys() == {"stage"}


def test_chains_run_side_by_side_and_then_what_they_return(settings):
    paper, both, order = Paper(settings), threading.Barrier(2, timeout=60), []

    def first():
        both.wait()  # passes only if the other runs at the same time
        paper.once("first", lambda log: order.append("first"))
        return [lambda: paper.once("after the first", lambda log: order.append("after"))]

    paper.together([first, lambda: both.wait() and None])
    assert order == ["first", "after"]
    assert json.loads(paper.done.read_text())["seconds"].keys() == {"first", "after the first"}


def test_side_by_side_commands_print_into_files_with_their_part_of_the_threads(settings, monkeypatch):
    monkeypatch.setattr(paper_script.os, "cpu_count", lambda: 6)
    paper = Paper(settings)
    show = python("import os; print('threads', os.environ['OMP_NUM_THREADS'])")
    paper.together([lambda: paper.once("stage", lambda log: paper.call(show, log))])
    assert "threads 3" in (paper.out / "logs" / "stage.txt").read_text()


def test_a_failure_stops_what_has_not_begun_and_says_why(settings, capfd):
    paper, ran = Paper(settings), []

    def fails():
        paper.once("fails", lambda log: paper.call(python("import sys; print('no space'); sys.exit(3)"), log))

    def waits():
        while paper.failed is None:
            time.sleep(0.01)
        paper.once("later", ran.append)

    with pytest.raises(SystemExit) as stop:
        paper.together([fails, waits])
    assert stop.value.code == 3
    assert not ran
    assert "no space" in capfd.readouterr().err


def test_every_part_can_be_left_out():
    assert {*paper_script.get_args(paper_script.Part)} == {*paper_script.PARTS, "rivals", "choices", "tasks"}


def test_what_a_chain_returns_goes_before_others(settings):
    paper, order = Paper(paper_script.replace(settings, jobs=1)), []
    paper.together(
        [lambda: [lambda: order.append("second"), lambda: order.append("third")], lambda: order.append("last")]
    )
    assert order == ["second", "third", "last"]


def test_commands_side_by_side_share_loaded_libraries_and_print_into_files(settings, capfd):
    paper, found = Paper(settings), settings.out / "losses" / "version.txt"
    with pytest.raises(SystemExit) as stop:
        paper.together(
            [
                lambda: paper.flextron("version", "--version", output=found),
                lambda: paper.flextron("mistake", "route", str(settings.out), "--budget", "0.5x"),
            ]
        )
    assert stop.value.code == paper_script.USERS_ERROR
    assert found.read_text().startswith("flextron ")
    assert paper.seconds.keys() == {"version"}
    assert "error: " in (settings.out / "logs" / "mistake.txt").read_text()
    assert "run the same command to continue" in capfd.readouterr().err


class Recorder:
    """Replaces the stages' commands: each must parse and find the files it reads, and it leaves empty files."""

    SPACE = SearchSpace(layers=4, neurons=(0, 4, 8, 16), kv_groups=(0, 1, 2))
    TABLE = CostTable(SPACE, "ttft", "ms", 0.2, ((0, 0.5, 1, 2),) * 4, ((0, 0.1, 0.2),) * 4)

    def __init__(self, out):
        self.out, self.ran, self.parsing = out, [], threading.Lock()  # tyro parses one command line at a time

    def verb(self, arguments, log=None, output=None):
        with self.parsing:
            parse(list(arguments))
        verb = arguments[0]
        self.note(verb, arguments, made=arguments[2:3] if verb in ("rank", "train", "export") else [])
        if verb == "measure-latency":
            (Path(arguments[1]) / "latency").mkdir()
            self.TABLE.save(Path(arguments[1]) / "latency" / "ttft-here.json")
        if output is not None:
            output.parent.mkdir(exist_ok=True)
            output.touch()

    def call(self, command, log=None, output=None):
        script = Path(command[1]).stem
        with self.parsing:
            config = tyro.cli({"router": router, "no_surrogate": no_surrogate}[script].Settings, args=command[2:])
        self.note(script, command[2:], made=[])
        if script == "no_surrogate":
            for budget in config.budgets:
                (config.out / f"{budget}x.json").touch()

    def prune(self, paper, full, budget, pruned, log):
        assert full.exists()
        self.ran.append((pruned.name, []))
        pruned.mkdir()
        (pruned / SHAPE).touch()

    def note(self, name, arguments, made):
        options = ("--out", "--out-dir", "--picture")
        made = [*made, *(word for option, word in pairwise(arguments) if option in options)]
        for word in arguments:
            if word.startswith(str(self.out)) and word not in made:
                assert Path(word).exists(), f"{name} reads {word}, which no stage before it has made"
        for file in map(Path, made):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch() if file.suffix in (".json", ".png") else file.mkdir(exist_ok=True)
        self.ran.append((name, list(arguments)))

    def named(self, name):
        return [arguments for ran, arguments in self.ran if ran == name]


@pytest.fixture
def recorder(settings, monkeypatch):
    found = Recorder(settings.out)
    monkeypatch.setattr(Paper, "verb", lambda paper, *args, **kwargs: found.verb(*args, **kwargs))
    monkeypatch.setattr(Paper, "call", lambda paper, *args, **kwargs: found.call(*args, **kwargs))
    monkeypatch.setattr(paper_script, "find_spec", lambda tool: tool)
    monkeypatch.setattr(paper_script, "prune_with_optipfair", found.prune)
    monkeypatch.setattr(paper_script, "prune_with_mergekit", found.prune)
    monkeypatch.setattr(paper_script, "write_page", lambda folder: folder / "results.md")
    return found


@pytest.mark.parametrize(("size", "jobs"), [("small", 1), ("small", 2), ("full", 6)])
def test_every_stage_is_a_command_that_fits_after_what_it_reads(settings, recorder, size, jobs):
    settings = paper_script.replace(settings, size=size, jobs=jobs, task_data=settings.out.parent)
    paper_script.main(settings)
    trained = [arguments[2].rpartition("/")[2] for arguments in recorder.named("train")]
    budgets = paper_script.SIZES[size].budgets
    expected = ["elastic", "alone-each-0.6x", "no-ranking", "no-distillation", "no-sandwich"]
    expected += [f"{kind}-{budget}x" for kind in ("alone-share", "optipfair", "mergekit") for budget in budgets]
    expected += ["seed-1", "seed-2"] if size == "full" else []
    assert sorted(trained) == sorted(expected)
    told = zip(trained, recorder.named("train"), strict=True)
    tokens = {name: int(arguments[arguments.index("--tokens") + 1]) for name, arguments in told}
    in_all = tokens["elastic"]
    for kind in ("alone-share", "optipfair", "mergekit"):
        assert in_all - len(budgets) < sum(tokens[f"{kind}-{budget}x"] for budget in budgets) <= in_all
    name, timed = recorder.ran[-1]
    also = timed[timed.index("--also") + 1 :]
    assert name == "router"
    assert len(also) == 2 * len(budgets) + 1  # every pruned model's shape, and the answer without a surrogate


def test_a_trained_pack_is_only_compared(settings, recorder, tmp_path):
    shutil.copytree(find_pack("smollm2"), tmp_path / "pack")
    settings = paper_script.replace(settings, size="pack", model=str(tmp_path / "pack"), task_data=tmp_path)
    paper_script.main(settings)
    assert {name for name, _ in recorder.ran} == {"measure-latency", "train-router", "route", "router", "evaluate"}
    assert {arguments[arguments.index("--evaluations") + 1] for arguments in recorder.named("train-router")} == {"0"}
    scored = recorder.named("evaluate")[-1]
    assert scored[scored.index("--tasks") + 1 : scored.index("--task-data")] == list(paper_script.SIZES["pack"].tasks)
    assert not (tmp_path / "pack" / "latency").exists()


@pytest.mark.parametrize("part", paper_script.get_args(paper_script.Part))
def test_every_part_runs_alone_and_is_not_run_again(settings, recorder, part, capsys):
    settings = paper_script.replace(settings, parts=(part,), task_data=settings.out.parent)
    paper_script.main(settings)
    ran = len(recorder.ran)
    paper_script.main(settings)
    assert len(recorder.ran) == ran
    assert ("wrote" if part == "choices" else "the page needs the part choices") in capsys.readouterr().out


def test_more_rounds_are_timed_and_nothing_else_runs(settings, recorder):
    settings = paper_script.replace(settings, parts=("choices",))
    paper_script.main(settings)
    ran = len(recorder.ran)
    paper_script.main(paper_script.replace(settings, rounds=2 * settings.rounds))
    ((name, arguments),) = recorder.ran[ran:]
    assert (name, arguments[arguments.index("--rounds") + 1]) == ("router", str(2 * settings.rounds))


def test_other_tools_prune_side_by_side_to_the_shapes_that_are_timed(tmp_path):
    """The real tools prune a tiny model to two budgets at once; skipped if the extra `rivals` is not installed."""
    pytest.importorskip("optipfair")
    pytest.importorskip("mergekit")
    full, budgets = tmp_path / "full", (0.8, 0.5)
    tiny.plain_model("llama", num_hidden_layers=6, mlp_bias=False, attention_bias=False).save_pretrained(full)
    tiny.tokenizer().save_pretrained(full)
    space = SearchSpace(layers=6, neurons=(0, 10, 20, 30, 40), kv_groups=(0, 1, 2, 3))
    table = CostTable(space, "ttft", "ms", 0.2, ((0, 1, 2, 3, 4),) * 6, ((0, 0.1, 0.2, 0.3),) * 6)
    (tmp_path / "paper" / "ranked" / "latency").mkdir(parents=True)
    table.save(tmp_path / "paper" / "ranked" / "latency" / "ttft-here.json")
    paper = Paper(Settings(size="tiny", model="some/model", device="cpu", out=tmp_path / "paper", jobs=2))
    tools = {"optipfair": paper_script.prune_with_optipfair, "mergekit": paper_script.prune_with_mergekit}
    folders = {(tool, budget): paper.out / f"{tool}-{budget}x-pruned" for tool in tools for budget in budgets}

    def chain(tool, budget):
        folder = folders[tool, budget]
        paper.once(folder.name, lambda log: tools[tool](paper, full, budget, folder, log))

    paper.together([partial(chain, *which) for which in folders])
    for (_, budget), folder in folders.items():
        shape = Subnet.load(folder / SHAPE)
        kept = [width for width in shape.neurons if width]
        lm = AutoModelForCausalLM.from_pretrained(folder)
        assert (lm.config.num_hidden_layers, lm.config.intermediate_size) == (len(kept), kept[0])
        assert table.price(shape) <= budget * table.full
        assert all(parameter.isfinite().all() for parameter in lm.parameters())
    assert len({Subnet.load(folder / SHAPE) for folder in folders.values()}) == len(folders)
