"""Busy machines: verdicts from made-up measurements; a real busy process; and where the warning is repeated."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

import tiny
from flextron import cli, route
from flextron.choosing.explaining import as_text, explain
from flextron.costs import busy
from flextron.costs.busy import BUSY, ProcessorTime, processor_time
from flextron.costs.latency import measure_latency
from flextron.costs.pricing import Ceiling, doubts
from flextron.costs.saved import describe, find_table, save_table
from flextron.costs.table import CostTable, linear_table
from flextron.costs.timing import Timing, present_conditions, time_interleaved, trust_warning
from flextron.exporting.card import model_card
from flextron.model import ElasticModel
from flextron.subnet import SearchSpace

SPACE = SearchSpace(2, (0, 4, 8), (1, 2))
SUBNETS = [SPACE.uniform(4), SPACE.uniform(8, 1), SPACE.smallest]
WARNING = "measured on a busy machine: other programs used 48% of the processor"


@pytest.fixture(autouse=True)
def cores(monkeypatch, request):
    """Made-up measurements are of a machine with 4 cores."""
    if request.node.get_closest_marker("timing") is None:
        monkeypatch.setattr(busy.os, "cpu_count", lambda: 4)


# ------------------------------------------------------------------ the processor


@pytest.mark.parametrize(
    ("wall", "own", "others", "share", "is_busy"),
    [
        (10, 40, 0, 0, False),
        (10, 38, 1, 0.025, False),  # the processor is full, with us
        (10, 33, 6, 0.15, True),  # others compete with us for the last of it
        (10, 10, 6, 0.15, False),  # cores are left
        (10, 10, 10, BUSY, True),
        (10, 1, 40, 1, True),
        (10, 1, 41, 1, True),  # clocks differ a little
        (10, 40, -0.1, 0, False),
        (10, 40, None, None, False),
        (0, 0, 0, None, False),
    ],
)
def test_others_that_compete_make_a_machine_busy(wall, own, others, share, is_busy):
    used = ProcessorTime(wall, own, others)
    assert used.share_of_others == share
    assert used.is_busy == is_busy


def test_times_are_subtracted_and_added():
    first, second = ProcessorTime(1, 2, 3), ProcessorTime(5, 7, 9)
    assert second - first == ProcessorTime(4, 5, 6)
    assert second + first == ProcessorTime(6, 9, 12)
    unknown = ProcessorTime(1, 2, None)
    assert (second - unknown).others is None
    assert (unknown + second).others is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_own_work_is_not_that_of_others():
    start = processor_time()
    while time.perf_counter() - start.wall < 0.3:
        pass
    used = processor_time() - start
    assert 0.05 < used.own <= used.wall * 1.1
    assert used.others > -0.1  # what /proc/stat counts comes in hundredths


def test_a_system_that_does_not_tell_is_never_busy(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(busy.Path, "open", missing)
    assert processor_time().others is None


# ------------------------------------------------------------------ verdicts


def timing(*rounds: float, noise: float = 0.17, others: float | None = 0.0) -> Timing:
    """One sub-network's ratios; others' part of four cores for ten seconds."""
    used = ProcessorTime(10, 5, None if others is None else 40 * others)
    return Timing((rounds,), 100.0, noise, used)


@pytest.mark.parametrize(
    ("measured", "error", "warning"),
    [
        (timing(0.5, 0.5), 0.01, None),
        (timing(0.5, 0.5), None, None),
        (timing(0.5, 0.5, noise=0.3), 0.02, None),  # tiny models vary, and are priced well
        (timing(0.5, 0.8), 0.04, None),  # as do rounds
        (timing(0.5, 0.51), 0.3, None),  # steady: the costs are not additive
        (timing(0.5), 0.3, None),
        (timing(0.5), None, None),
        (timing(0.5, 0.5, others=0.48), None, WARNING),
        (timing(0.5, others=0.48), 0.26, f"{WARNING}; the table is 26% off on sub-networks that it has not seen"),
        (
            timing(0.5, 0.7, others=None),
            0.26,
            "measured on an unsteady machine: times of the same sub-network differ by 17%; "
            "the table is 26% off on sub-networks that it has not seen",
        ),
        (
            timing(0.5, 1.0),
            None,
            "measured on an unsteady machine: times of the same sub-network differ by 33%",
        ),
        (
            timing(0.5, noise=0.4),
            0.26,
            "measured on an unsteady machine: times of the full model differ by 40%; "
            "the table is 26% off on sub-networks that it has not seen",
        ),
    ],
)
def test_which_tables_are_in_doubt(measured, error, warning):
    assert measured.doubt(error) == warning
    if error is None:
        assert measured.warning == warning


def test_spreads_are_those_of_each_sub_network():
    both = Timing(((0.5, 0.6, 0.7), (0.4,)), 100.0, 0.0)
    assert both.spreads == pytest.approx([1 / 6, 0])
    assert both.rounds_differ == pytest.approx(1 / 6)
    assert Timing(((0.5,),), 100.0, 0.0).rounds_differ is None
    assert both.warning is None


# ------------------------------------------------------------------ rounds that are repeated


def rounds_under(*shares: float | None, rounds: int = 2) -> tuple[Timing, int]:
    """Timed while others use these parts of 4 cores in round after round of 10 s; how many rounds there were."""
    readings = count()
    now = ProcessorTime(0, 0, 0)

    def read() -> ProcessorTime:
        nonlocal now
        number, end = divmod(next(readings), 2)
        if end:
            share = shares[number]
            now = now + ProcessorTime(10, 5, None if share is None else 40 * share)
        return now

    def prepare(subnet):
        return lambda: 1.0 + next(runs) * 1e-6

    runs = count()
    measured = time_interleaved(
        prepare, SPACE.full, SUBNETS, rounds=rounds, repeats=1, draw=np.random.default_rng(0), read=read
    )
    return measured, next(readings) // 2


@pytest.mark.parametrize(
    ("shares", "share", "timed"),
    [
        ((0.0, 0.0), 0, 2),
        ((0.5, 0.0, 0.0), 0, 3),  # the busy one is replaced
        ((0.5, 0.5, 0.0, 0.1), 0.05, 4),
        ((0.5, 0.4, 0.6, 0.4), 0.4, 4),  # in as much time again; the calmest count
        ((0.5, 0.6, 0.7, 0.8), 0.55, 4),
    ],
)
def test_busy_rounds_are_repeated_for_as_long_again(shares, share, timed):
    measured, done = rounds_under(*shares)
    assert measured.processor.share_of_others == pytest.approx(share)
    assert done == timed
    assert {len(ratios) for ratios in measured.ratios} == {2}
    assert (measured.warning is not None) == (share >= BUSY)


def test_where_the_load_is_unknown_nothing_is_repeated():
    measured, done = rounds_under(None, None)
    assert (done, measured.processor.share_of_others, measured.warning) == (2, None, None)


def test_one_round_is_repeated_once():
    assert rounds_under(0.5, 0.5, rounds=1)[1] == 2


# ------------------------------------------------------------------ the warning is repeated


def made_up(model, metric="tpot", warning=WARNING) -> CostTable:
    conditions = {**present_conditions(model), "phase": "decode", "batch": 1, "context_tokens": 16}
    conditions |= {} if warning is None else {"warning": warning}
    per_unit = {"per_neuron": [0.1] * tiny.LAYERS, "per_kv_group": [0.2] * tiny.LAYERS}
    return linear_table(model.search_space, metric=metric, unit="ms", fixed=1.0, conditions=conditions, **per_unit)


NOTE = f"the latency table of tpot was {WARNING}. Measure it again on an idle machine: flextron measure-latency"


def test_trust_warning():
    assert trust_warning({}) is None
    assert trust_warning({"warning": WARNING}) == WARNING


def test_it_survives_the_file_the_scale_and_the_sum(llama, tmp_path):
    save_table(tmp_path, made_up(llama))
    table = find_table(llama, tmp_path, "tpot")
    assert trust_warning(table.scaled(3).conditions) == WARNING
    calm = made_up(llama, "ttft", warning=None)
    for both in (calm.plus(table, metric="e2e"), table.plus(calm, metric="e2e")):
        assert doubts([Ceiling(both, 1, "")] * 2) == [NOTE.replace("tpot", "e2e")]
    assert doubts([Ceiling(calm, 1, "")]) == []


def test_routes_notes_repeat_it_once(llama, sensitivity, tmp_path):
    save_table(tmp_path, made_up(llama))
    routed = route(llama, "tpot=0.9x,parameters=0.9x", tmp_path, sensitivity=sensitivity)
    assert [note for note in routed.notes if "busy" in note] == [NOTE]
    explained = explain(llama, routed, tmp_path, measure=False)
    assert as_text(routed, explained, tmp_path).count(NOTE) == 1


def test_the_model_card_repeats_it(llama, tmp_path):
    llama.save_pretrained(tmp_path / "elastic")
    model = ElasticModel.from_pretrained(tmp_path / "elastic")
    save_table(tmp_path / "elastic", made_up(model))
    assert f"Do not trust the times of tpot: the table was {WARNING}." in model_card(model, model.search_space.full, 1)


@pytest.mark.parametrize(
    ("measured", "error", "text"),
    [
        (10.9, 0.01, ""),
        (11.2, 0.01, "12% above"),
        (11.2, 0.15, ""),
        (8.0, 0.15, "20% below"),
        (12.0, None, "20% above"),
    ],
)
def test_how_far_measured_is_off_predicted(llama, sensitivity, tmp_path, monkeypatch, measured, error, text):
    table = made_up(llama, warning=None)
    save_table(tmp_path, replace(table, conditions={**table.conditions, "error_median": error}))
    routed = route(llama, "0.8x", tmp_path, sensitivity=sensitivity)
    ms = measured / 10 * table.price(routed.subnet)
    timed = replace(timing(0.5, 0.5, others=0.48), ratios=((0.5,),), full_ms=2 * ms)
    monkeypatch.setattr("flextron.choosing.explaining._timed", lambda *args, **how: timed)
    shown = as_text(routed, explain(llama, routed, tmp_path), tmp_path)
    (line,) = (line for line in shown.splitlines() if "measured: " in line)
    assert line.endswith(f"{f'; measured is {text} predicted' if text else ''} ({WARNING})")


# ------------------------------------------------------------------ for real


@contextmanager
def busy_cores(processes: int):
    """Keep this many cores busy."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what others use")


@pytest.fixture
def elastic(llama, sensitivity, tmp_path):
    folder = tmp_path / "elastic"
    llama.save_pretrained(folder)
    sensitivity.save(folder)
    return folder


@linux
@pytest.mark.timing
def test_a_busy_core_gives_a_warning(elastic, tmp_path, capsys):
    """On two cores as the issue has it; on more, as many are kept busy as make the same part."""
    arguments = ["measure-latency", str(elastic), "--phase", "decode", "--tokens", "16", "--rounds", "1"]
    with busy_cores(max(1, os.cpu_count() // 2)):
        assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    table = CostTable.load(next((elastic / "latency").iterdir()))
    warning = trust_warning(table.conditions)
    assert warning.startswith("measured on a busy machine: other programs used ")
    assert "% off on sub-networks that it has not seen" in warning
    assert f"warning: {warning}. Measure again" in shown.err
    assert f"other programs used {table.conditions['other_programs']:.0%} of the processor" in describe(table)
    model = ElasticModel.from_pretrained(elastic)
    assert any(warning in note for note in route(model, "0.9x").notes)
    assert cli.main(["export", str(elastic), str(tmp_path / "small"), "--budget", "0.9x"]) == 0
    assert capsys.readouterr().err.count(warning) == 1
    assert warning in (tmp_path / "small" / "README.md").read_text()


@linux
@pytest.mark.timing
def test_an_idle_machine_gives_none(llama):
    start = processor_time()
    time.sleep(1)
    if (processor_time() - start).share_of_others > 0.05:
        pytest.skip("this machine is busy with other programs")
    table = measure_latency(llama, tokens=16, rounds=2)
    if table.conditions["other_programs"] > BUSY / 2:
        pytest.skip("this machine became busy meanwhile")
    assert trust_warning(table.conditions) is None
