"""quickstart on a tiny checkpoint: what it writes, what it reuses, and what it refuses. The real one is a slow test."""

import json
import time
from dataclasses import replace

import pytest

from flextron.config import QuickstartConfig
from flextron.costs.latency import measure_latency
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


@pytest.fixture(scope="module")
def config(checkpoint, tmp_path_factory):
    """Settings of a run that has ended."""
    config = QuickstartConfig(out=tmp_path_factory.mktemp("run") / "out", model=str(checkpoint), tokens=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PROMPT_TOKENS", 48)  # a tiny model has 64 positions
        patch.setattr(training, "LARGEST_ERROR", 10)  # and losses that hardly depend on its widths
        patch.setattr(training, "LOWEST_RANK", -1)
        patch.setattr(demo, "measure_latency", even_latency)
        patch.setattr(training, "STEPS", 20)
        patch.setattr(surrogate, "STEPS", 20)
        demo.quickstart(config)
        yield config


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_writes_a_report_with_pictures_and_every_sub_network(config):
    report = (config.out / "report.md").read_text()
    assert "![loss against time](loss.png)" in report
    assert "![widths of each layer](widths.png)" in report
    assert all(
        (config.out / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "widths.png", "tokens.png")
    )
    rows = json.loads((config.out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["full"] + ["greedy"] * 3 + ["equal widths"] * 3 + ["router"] * 3
    for row, budget in zip(rows, [1, *demo.BUDGETS * 3], strict=True):
        assert row["predicted_ms"] <= budget * rows[0]["predicted_ms"] * (1 + 1e-9)
        assert row["prefill_ms"] > 0
        assert row["tokens"] == 1022
        assert f"{row['nats_per_token']:.3f}" in report
        assert ("completion" in row) == (row["method"] in ("full", "router"))
    assert "## Every token with its own widths" in report
    assert "![what tokens got](tokens.png)" in report
    per_token = json.loads((config.out / "per_token.json").read_text())
    assert [row["budget"] for row in per_token] == list(demo.PER_TOKEN_BUDGETS)
    model = ElasticModel.from_pretrained(config.out / "elastic")
    model.search_space.check(Subnet(**rows[3]["subnet"]))


def test_a_second_run_reuses_all_but_the_report(config):
    before = files(config.out)
    demo.quickstart(config)
    after = files(config.out)
    assert {name for name in after if after[name] != before[name]} == {"report.md", "loss.png", "widths.png"}


def test_what_is_missing_is_made_again(config):
    before = files(config.out)
    (config.out / "results.json").unlink()
    demo.quickstart(config)
    after = files(config.out)
    assert after.keys() == before.keys()
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["sensitivity.json"] == before["sensitivity.json"]


def test_other_settings_in_the_same_folder_are_refused(config):
    other = QuickstartConfig(out=config.out, model=config.model, tokens=8192)
    with pytest.raises(FlextronError, match=r"other settings.*--fresh"):
        demo.quickstart(other)


def test_a_quickstart_of_an_older_version_is_refused_or_replaced(config, tmp_path):
    settings = {**json.loads((config.out / "settings.json").read_text()), "quickstart": 2}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text(json.dumps(settings))
    old = replace(config, out=tmp_path / "old")
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


@pytest.mark.slow
@pytest.mark.real
def test_the_real_one_takes_less_than_ten_minutes(tmp_path):
    start = time.monotonic()
    demo.quickstart(QuickstartConfig(out=tmp_path / "out"))
    assert time.monotonic() - start < 10 * 60
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    full, greedy, equal, routed = rows[0], rows[3], rows[6], rows[9]
    assert all(row["nats_per_token"] < row["before_training"] for row in rows[:7])
    assert full["nats_per_token"] < routed["nats_per_token"] < equal["nats_per_token"]
    assert routed["nats_per_token"] < greedy["nats_per_token"] + 0.05
    assert routed["prefill_ms"] < 0.6 * full["prefill_ms"]
