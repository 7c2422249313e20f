"""The order of `benchmarks/paper.py`: what runs once, what runs side by side, what a failure stops."""

import json
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import paper as paper_script
from paper import Paper, Settings


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
    with pytest.raises(SystemExit, match="is of other settings"):
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
            pass
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
    assert "the same command goes on from here" in capfd.readouterr().err
