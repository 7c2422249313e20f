"""quickstart on a tiny checkpoint: what it writes, keeps and refuses. The real one is a slow test."""

import contextlib
import io
import json
import time
from dataclasses import dataclass, replace

import pytest

import tiny
from flextron.config import QuickstartConfig
from flextron.costs.latency import measure_latency
from flextron.demo import plan, report, tour
from flextron.demo import quickstart as demo
from flextron.errors import FlextronError
from flextron.model import ElasticModel
from flextron.routers.static import learning as training
from flextron.routers.static import surrogate
from flextron.subnet import Subnet


def even_latency(model, **options):
    """What is measured here, with costs that follow widths: those of a tiny model are mostly noise."""
    table = measure_latency(model, **options)
    space = table.search_space
    neurons, kv_groups = ([width / widths[-1] for width in widths] for widths in (space.neurons, space.kv_groups))
    return replace(table, fixed=0.5, neurons=[neurons] * space.layers, kv_groups=[kv_groups] * space.layers)


def interrupt(_config):
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Ran:
    """A run that was interrupted when training began, and went on to the end."""

    config: QuickstartConfig
    interrupted: str
    files: dict
    """After the interruption."""
    output: str

    @property
    def out(self):
        return self.config.out


@pytest.fixture(scope="module")
def ran(checkpoint, tmp_path_factory):
    config = QuickstartConfig(out=tmp_path_factory.mktemp("run") / "out", model=str(checkpoint))
    first, second = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # A tiny model has 64 positions; per_token, so that one run passes all stages.
        patch.setattr(tour, "QUICK", replace(plan.QUICK, prompt_tokens=48, per_token=True))
        patch.setattr(tour, "TOKEN_TOKENS", 2048)
        patch.setattr(training, "LARGEST_ERROR", 10)  # and losses that hardly depend on its widths
        patch.setattr(training, "_orders", lambda _: True)
        patch.setattr(tour, "measure_latency", even_latency)
        patch.setattr(training, "STEPS", 20)
        patch.setattr(surrogate, "STEPS", 20)
        with patch.context() as stop, contextlib.redirect_stdout(first):
            stop.setattr(tour, "train", interrupt)
            with pytest.raises(KeyboardInterrupt):
                demo.quickstart(config)
        kept = files(config.out)
        with contextlib.redirect_stdout(second):
            demo.quickstart(config)
        yield Ran(config, first.getvalue(), kept, second.getvalue())


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_ctrl_c_leaves_the_first_picture_and_says_how_to_go_on(ran):
    assert {"loss.png", "widths.png", "report.md", "before.json"} <= ran.files.keys()
    assert "results.json" not in ran.files
    assert "Done in" in ran.interrupted.split("[4/8]")[1]
    assert f"after the start, is {ran.out / 'loss.png'}" in ran.interrupted
    assert "Stopped in stage 5 of 8: Train all sub-networks" in ran.interrupted
    assert f"{ran.out} keeps the stages that are done. The same command goes on" in ran.interrupted


def test_the_report_so_far_says_that_nothing_is_trained_yet(ran, tmp_path):
    text = report.write(tmp_path, json.loads((ran.out / "before.json").read_text())).read_text()
    assert "nothing is trained yet" in text
    assert text.count("| greedy |") == text.count("| equal widths |") == 3


def test_the_same_command_goes_on_where_it_was(ran):
    assert ran.output.count("kept from before") == 4
    after = files(ran.out)
    assert all(after[name] == ran.files[name] for name in ("before.json", "sensitivity.json"))


def test_each_stage_says_what_why_and_how_long(ran):
    for number in range(1, 5):
        assert f"[{number}/8] " in ran.interrupted
    stages = ran.interrupted.split("\n[")[1:5]
    assert all(", about " in part and "Why: " in part and "Done in " in part for part in stages)
    assert "what is left takes about" in ran.interrupted
    assert "until the first picture" in ran.interrupted


def test_writes_a_report_with_pictures_and_every_sub_network(ran):
    report = (ran.out / "report.md").read_text()
    assert "![loss against time](loss.png)" in report
    assert "![widths of each layer](widths.png)" in report
    assert all(
        (ran.out / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "widths.png", "tokens.png")
    )
    rows = json.loads((ran.out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["full"] + ["greedy"] * 3 + ["equal widths"] * 3 + ["router"] * 3
    for row, budget in zip(rows, [1, *plan.BUDGETS * 3], strict=True):
        assert row["predicted_ms"] <= budget * rows[0]["predicted_ms"] * (1 + 1e-9)
        assert row["prefill_ms"] > 0
        assert row["spread"] >= 0
        assert row["tokens"] == 1020
        assert f"{row['nats_per_token']:.3f}" in report
        assert ("completion" in row) == (row["method"] in ("full", "router"))
    assert all(row["before_training"] for row in rows[:7])
    assert "## Every token with its own widths" in report
    assert "![what tokens got](tokens.png)" in report
    per_token = json.loads((ran.out / "per_token.json").read_text())
    assert [row["budget"] for row in per_token] == list(plan.PER_TOKEN_BUDGETS)
    model = ElasticModel.from_pretrained(ran.out / "elastic")
    model.search_space.check(Subnet(**rows[3]["subnet"]))


def test_a_second_run_reuses_all_but_the_report(ran):
    before = files(ran.out)
    demo.quickstart(ran.config)
    after = files(ran.out)
    assert {name for name in after if after[name] != before[name]} == {"report.md", "loss.png", "widths.png"}


def test_what_is_missing_is_made_again(ran):
    before = files(ran.out)
    (ran.out / "results.json").unlink()
    demo.quickstart(ran.config)
    after = files(ran.out)
    assert after.keys() == before.keys()
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["sensitivity.json"] == before["sensitivity.json"]


def test_other_settings_in_the_same_folder_are_refused(ran):
    for other in (replace(ran.config, tokens=8192), replace(ran.config, thorough=True)):
        with pytest.raises(FlextronError, match=r"other settings.*--fresh"):
            demo.quickstart(other)


def test_a_quickstart_of_an_older_version_is_refused_or_replaced(ran, tmp_path):
    settings = {**json.loads((ran.out / "settings.json").read_text()), "quickstart": 2}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text(json.dumps(settings))
    old = replace(ran.config, out=tmp_path / "old")
    with pytest.raises(FlextronError, match=r"other settings.*--fresh"):
        demo._prepare(old)
    demo._prepare(replace(old, fresh=True))
    assert json.loads((tmp_path / "old" / "settings.json").read_text())["quickstart"] == demo.VERSION


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(FlextronError, match="exists"):
            demo.quickstart(QuickstartConfig(out=tmp_path, fresh=fresh))
    assert (tmp_path / "thesis.txt").exists()


def test_the_report_names_noise_and_what_was_left_out(ran, tmp_path):
    results = json.loads((ran.out / "results.json").read_text())
    results["warning"] = "The machine was busy."
    results["conditions"]["left_out"] = "flextron quickstart --thorough"
    for row, off in zip(results["rows"], (1.0, 1.09, 1.2, 0.7, *[1.0] * 6), strict=True):
        row.update(predicted_ms=100, prefill_ms=100 * off, spread=0.04)
    lines = report.write(tmp_path, results).read_text().splitlines()
    above_table = lines[: next(number for number, line in enumerate(lines) if line.startswith("|"))]
    assert "**Do not trust the times below.** The machine was busy." in above_table
    cells = [line.split(" | ")[-2] for line in lines if line.startswith("| ")][1:11]
    assert cells[:4] == ["100 ± 4", "109 ± 4", "120 ± 5, 20% above predicted", "70 ± 3, 30% below predicted"]
    assert "BUSY MACHINE" in report._title(results)
    assert "flextron quickstart --thorough" in lines


def test_pictures_have_error_bars_of_times_and_losses(ran):
    results = json.loads((ran.out / "results.json").read_text())
    axes = report._loss_figure(results).axes[0]
    bars = [container for container in axes.containers if container.has_xerr and container.has_yerr]
    assert [bar.get_label() for bar in bars] == ["router", "greedy", "equal widths"]


@pytest.mark.slow
@pytest.mark.real
def test_the_trained_one_takes_less_than_five_minutes(tmp_path):
    start = time.monotonic()
    demo.quickstart(QuickstartConfig(out=tmp_path / "out"))
    assert time.monotonic() - start < 5 * 60
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    full, greedy, equal, routed = rows[0], rows[3], rows[6], rows[9]
    assert full["nats_per_token"] < routed["nats_per_token"] < equal["nats_per_token"]
    assert routed["nats_per_token"] < greedy["nats_per_token"] + 0.05
    assert routed["prefill_ms"] < 0.6 * full["prefill_ms"]


@pytest.mark.slow
@pytest.mark.real
def test_from_scratch_takes_less_than_ten_minutes(tmp_path):
    start = time.monotonic()
    demo.quickstart(QuickstartConfig(out=tmp_path / "out", from_scratch=True))
    assert time.monotonic() - start < 10 * 60
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    full, equal, routed = rows[0], rows[6], rows[9]
    assert all(row["nats_per_token"] < row["before_training"] for row in rows[:7])
    assert full["nats_per_token"] < routed["nats_per_token"] < equal["nats_per_token"]
    assert routed["prefill_ms"] < 0.6 * full["prefill_ms"]


def test_a_pack_is_timed_fitted_and_shown_without_training(tmp_path, checkpoint, monkeypatch, capsys):
    """It brings ranking, sensitivities and pairs; the report names what it was trained on."""
    from flextron.data.blocks import load_blocks
    from flextron.elastic.permutation import permute
    from flextron.exporting.pack import make_pack, save_pack
    from flextron.routers.static.pairs import Pairs

    trained = ElasticModel.from_pretrained(checkpoint)
    permute(trained, tiny.ranking_for(trained))
    trained.folder = tmp_path / "beside"
    trained.folder.mkdir()
    sensitivity = tiny.uneven_sensitivity(trained)
    sensitivity.save(trained.folder)
    pairs = Pairs.beside(trained.folder, {"fingerprint": trained.fingerprint(), "text": "a text", "tokens": 255})
    for seed in range(120):
        subnet = tiny.random_subnet(trained.search_space, seed)
        pairs.add(subnet, 3 + 2 * (1 - sensitivity.share(subnet)))
    base = ElasticModel.from_pretrained(checkpoint, dtype="float32")
    blocks = load_blocks(trained.tokenizer, "sample/train", tokens=512, block_tokens=32)
    about = {"tokens": 1234, "data": ["a.jsonl"], "accuracy": "| share | over chance |"}
    pack = make_pack(trained, base, blocks, base_name=str(checkpoint), about=about)
    save_pack(pack, tmp_path / "pack", trained, "A card")

    config = QuickstartConfig(out=tmp_path / "out", model=str(tmp_path / "pack"))
    monkeypatch.setattr(tour, "QUICK", replace(plan.QUICK, prompt_tokens=48))
    monkeypatch.setattr(tour, "measure_latency", even_latency)
    monkeypatch.setattr(training, "STEPS", 20)
    monkeypatch.setattr(tour, "train", interrupt)  # fails if it is called
    text = demo.quickstart(config).read_text(encoding="utf8")
    said = capsys.readouterr().out
    assert "[1/4]" in said
    assert "it learnt from 120 sub-networks, measured on 255 tokens each before packing" in said
    assert "trained together on 1,234 tokens of a.jsonl" in text
    assert "## Accuracy over chance" in text
    assert "flextron quickstart --from-scratch" in text
    assert "| 0.6x | router |" in text
    assert (config.out / "loss.png").stat().st_size > 10_000
    before = (config.out / "results.json").read_bytes()
    demo.quickstart(config)
    assert (config.out / "results.json").read_bytes() == before
