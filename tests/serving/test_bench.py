"""`flextron bench-serve`: its traces, what it sums up, and a replay against a real server."""

import json

import pytest

from flextron.errors import FlextronError
from flextron.serving.bench import Arrival, Outcome, Summary, Target, burst_trace, load_trace, sample_prompts

TARGET = Target("http://127.0.0.1:1", "model", ttft_ms=100, tpot_ms=10)


def outcome(ttft=50.0, tpot=5.0, status=200, error=None, **levels) -> Outcome:
    return Outcome(Arrival(0, "a", 4), status, error, ttft, tpot, sum(levels.values()), levels)


class TestTraces:
    def test_a_burst_arrives_at_the_rates_asked_for(self):
        trace = burst_trace(["a", "b"], rates=(1, 10, 1), seconds=(100, 100, 100), new_tokens=(3, 5))
        counts = [sum(low <= arrival.at < low + 100 for arrival in trace) for low in (0, 100, 200)]
        assert 70 < counts[0] < 130
        assert 900 < counts[1] < 1100
        assert [arrival.at for arrival in trace] == sorted(arrival.at for arrival in trace)
        assert {arrival.max_tokens for arrival in trace} == {3, 4, 5}
        assert trace == burst_trace(["a", "b"], rates=(1, 10, 1), seconds=(100, 100, 100), new_tokens=(3, 5))

    def test_prompts_begin_differently(self):
        prompts = sample_prompts(20)
        assert {len(prompt.split()) for prompt in prompts} == {20}
        assert len({prompt[:30] for prompt in prompts}) > 0.9 * len(prompts)

    def test_a_file_is_read_and_its_faults_are_named(self, tmp_path):
        file = tmp_path / "trace.jsonl"
        lines = [{"at": 2, "prompt": "b", "max_tokens": 3}, {"at": 1, "prompt": "a", "max_tokens": 2, "budget": "0.6x"}]
        file.write_text("\n".join(map(json.dumps, lines)))
        assert load_trace(file) == [Arrival(1, "a", 2, "0.6x"), Arrival(2, "b", 3)]
        for text, message in (
            ("{}", "line 1: KeyError"),
            ('\n{"at": 1', "line 1"),
            ("", "has no requests"),
            ("[]", "line 1: TypeError"),
        ):
            file.write_text(text)
            with pytest.raises(FlextronError, match=message):
                load_trace(file)


class TestSummary:
    def test_late_refused_and_broken_answers_are_missed(self):
        outcomes = [
            outcome(full=4),
            outcome(ttft=101),
            outcome(tpot=11),
            outcome(status=429, ttft=None),
            outcome(status=0, error="gone", ttft=None),
            outcome(error="the answer broke off"),
        ]
        summary = Summary.of(outcomes, TARGET, 2.0, {})
        assert (summary.met, summary.refused, summary.failed) == (1, 1, 2)
        assert summary.goodput == 0.5
        assert summary.mean_loss is None

    def test_the_loss_is_that_of_the_levels_served(self):
        outcomes = [outcome(**{"0.6x": 3, "full": 1}), outcome(full=4)]
        summary = Summary.of(outcomes, TARGET, 1.0, {"0.6x": 4.0, "full": 3.0})
        assert summary.mean_loss == pytest.approx(3 + 3 / 8)
        assert "0.6x 3, full 5" in summary.lines()[-1]
