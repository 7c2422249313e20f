"""Stages of the tour: order, what is kept, estimates, and Ctrl-C."""

import pytest

from flextron.demo.stages import Pace, Stage, in_words, run_stages, time_left


def stage(name, made, *, work=10.0):
    def make():
        made.append(name)
        return f"{name} is there."

    return Stage(f"Make {name}", f"{name} is needed.", lambda: name in made, work, make)


def test_stages_run_in_order_and_say_what_why_and_how_long(capsys):
    made = []
    run_stages([stage("bread", made, work=30), stage("soup", made)], Pace(seconds=4, tokens=2))
    assert made == ["bread", "soup"]
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "[1/2] Make bread, about 60 s"
    assert lines[2].strip() == "Why: bread is needed."
    assert lines[3].strip() == "Done in 1 s: bread is there."


def test_a_stage_that_is_done_is_kept(capsys):
    made = ["bread"]
    run_stages([stage("bread", made), stage("soup", made)], Pace(1, 1))
    assert made == ["bread", "soup"]
    assert "[1/2] Make bread: kept from before" in capsys.readouterr().out


def test_time_left_counts_what_is_not_done():
    made = ["bread"]
    assert time_left([stage("bread", made), stage("soup", made, work=7)], Pace(seconds=4, tokens=2)) == 14


def test_each_stage_corrects_the_pace():
    pace = Pace(seconds=1, tokens=100)
    assert pace(50) == 0.5
    pace.learn(100, 3)  # which took three times as long
    assert pace(50) == 1


def test_ctrl_c_names_the_stage_and_leaves_the_rest(capsys):
    def interrupted():
        raise KeyboardInterrupt

    made = []
    with pytest.raises(KeyboardInterrupt):
        run_stages([Stage("Cook", "Hunger.", lambda: False, 1, interrupted), stage("soup", made)], Pace(1, 1))
    assert not made
    assert "Stopped in stage 1 of 2: Cook" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (59.6, "60 s"), (99, "99 s"), (130, "2 min 10 s"), (899, "15 min")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
