"""Results that benchmarks/router.py keeps between runs."""

import json

import pytest

from flextron.costs.timing import Timing
from flextron.errors import FlextronError
from router import Kept, add_rounds


def test_further_rounds_are_added_to_those_before():
    nothing = {"rounds": 0, "full_ms": 0.0, "noise": 0.0, "ratios": {}}
    first = add_rounds(nothing, ["a", "b"], Timing(((0.5,), (0.8,)), 100.0, 0.02), 1)
    assert first["ms"] == {"a": 50.0, "b": 80.0}
    both = add_rounds(first, ["a", "b"], Timing(((0.7, 0.6), (0.8, 0.9)), 130.0, 0.05), 2)
    assert both["rounds"] == 3
    assert both["ratios"] == {"a": [0.5, 0.7, 0.6], "b": [0.8, 0.8, 0.9]}
    assert (both["full_ms"], both["noise"]) == pytest.approx((120.0, 0.04))
    assert both["ms"] == pytest.approx({"a": 72.0, "b": 96.0})


def test_results_go_on_from_an_unfinished_run_and_from_a_finished_one(tmp_path):
    out = tmp_path / "out.json"
    first = Kept(out, {"seed": 0})
    assert first.once("loss", lambda: [1.0]) == [1.0]
    assert Kept(out, {"seed": 0}).once("loss", lambda: [2.0]) == [1.0]
    assert not out.exists()

    out.write_text(json.dumps({"command": "router.py", **first.results}))
    first.file.unlink()
    again = Kept(out, {"seed": 0})
    assert again.once("loss", lambda: [3.0]) == [1.0]
    assert "command" not in again.results
    with pytest.raises(FlextronError, match=r"out\.json has results of other settings"):
        Kept(out, {"seed": 1})
