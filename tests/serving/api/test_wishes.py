"""Budgets of requests become levels, in the order body, alias, headers, default. No model, no torch."""

from dataclasses import replace

import pytest

from flextron.serving.api.fields import Fields
from flextron.serving.api.refusal import ApiError
from flextron.serving.api.wishes import Asked, Policy, Wish, asked_of, grant, parse_wish
from flextron.serving.engine import Level
from flextron.subnet import Subnet

LEVELS = [
    Level(name, share, Subnet((width,), (1,)), None, 10 * share, 2 * share)
    for width, (name, share) in enumerate({"0.5x": 0.5, "0.6x": 0.59, "0.8x": 0.8, "full": 1.0}.items(), 1)
]
UNTIMED = [replace(level, step_ms=None, prefill_ms_per_token=None) for level in LEVELS]
FULL = 3
ADAPTIVE = Policy()


def granted(body=None, alias=None, headers=None, *, policy=ADAPTIVE, levels=LEVELS, prompt=100):
    return grant(asked_of(Fields(body or {}), alias, headers or {}), policy, levels, prompt)


class TestOrder:
    def test_body_before_alias_before_headers_before_default(self):
        headers, policy = {"x-slo-tpot-ms": "8"}, Policy(default=parse_wish("0.6x", "default"), adaptive=False)
        assert granted({"budget": "0.5x"}, "full", headers, policy=policy).level == 0
        assert granted({}, "full", headers, policy=policy).level == FULL
        assert granted({}, None, headers, policy=policy).level == 2
        assert granted(policy=policy).level == 1


class TestShares:
    @pytest.mark.parametrize(
        ("budget", "level"),
        [("0.5x", 0), ("0.6x", 1), ("0.7999x", 1), ("0.8x", 2), ("0.99x", 2), ("1x", 3), ("2x", 3), ("full", 3)],
    )
    def test_the_widest_level_within_runs_and_is_never_changed(self, budget, level):
        found = granted({"budget": budget})
        assert (found.level, found.floor, found.asked) == (level, level, budget)
        assert found.tpot_ms is found.ttft_ms is None

    def test_a_floor_lets_it_be_narrowed(self):
        found = granted({"budget": "0.8x", "floor": "0.6x"})
        assert (found.level, found.floor) == (2, 1)
        assert granted({"floor": "0.8x"}).floor == 2

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"budget": "0.49x"}, "below the smallest sub-network of this server, 0.5x (0.500"),
            ({"budget": "0.6x", "floor": "0.8x"}, "floor is 0.8x, above the budget's level 0.6x"),
            ({"floor": "0.1x"}, "floor 0.1x is below"),
            ({"floor": "tpot=9ms"}, "it must be a share"),
            ({"budget": "0.6x", "strict": True}, "strict needs an objective in time"),
            ({"budget": "150MB"}, "a server keeps no budget of weights=150MB"),
            ({"budget": "ttft=200ms@512"}, "a server keeps no budget of ttft=200ms@512"),
            ({"budget": "ttft=0.5x"}, "a server keeps no budget of ttft=0.5x"),
            ({"budget": "0.6x,0.8x"}, "limits something twice"),
            ({"budget": ""}, "the budget is empty"),
            ({"budget": "fast"}, "cannot read the budget 'fast'"),
            ({"budget": 0.6}, "it must be a string such as"),
            ({"budget": ["0.6x"]}, "it must be a string such as"),
            ({"strict": 1}, "it must be true or false"),
        ],
    )
    def test_what_cannot_be_kept_is_refused_with_a_way_out(self, body, message):
        with pytest.raises(ApiError) as caught:
            granted(body)
        assert caught.value.status == 400
        assert message in str(caught.value)

    def test_the_servers_floor_is_the_smallest(self):
        with pytest.raises(ApiError, match=r"Ask for 0\.6x or more"):
            granted({"budget": "0.5x"}, policy=Policy(floor=1))


class TestTimes:
    @pytest.mark.parametrize(
        ("budget", "level"), [("tpot=5ms", 0), ("5.91ms", 1), ("tpot=9ms", 2), ("tpot=1s", 3), ("0.6x,tpot=1s", 1)]
    )
    def test_the_widest_level_that_fits_and_the_floor_of_the_server(self, budget, level):
        found = granted({"budget": budget})
        assert (found.level, found.floor) == (level, 0)
        assert found.tpot_ms is not None
        assert granted({"budget": budget, "floor": "0.5x"}).floor == 0

    def test_time_to_the_first_token_depends_on_the_prompt(self):
        assert granted({"budget": "ttft=130ms"}, prompt=50).level == FULL
        assert granted({"budget": "ttft=130ms"}, prompt=100).level == 1
        assert granted({"budget": "ttft=130ms"}, prompt=1000).level == 0  # as good as can be
        with pytest.raises(ApiError, match="takes 1e\\+03 ms for a prompt of 1000 tokens"):
            granted({"budget": "ttft=130ms", "strict": True}, prompt=1000)

    def test_headers_are_objectives(self):
        found = granted(headers={"x-slo-ttft-ms": "130", "x-slo-tpot-ms": "9"})
        assert (found.level, found.floor, found.ttft_ms, found.tpot_ms) == (1, 0, 130, 9)
        assert found.asked == "tpot=9ms,ttft=130ms"

    @pytest.mark.parametrize("value", ["", "fast", "-1", "0", "nan", "inf", "1e9"])
    def test_headers_that_are_no_times(self, value):
        with pytest.raises(ApiError, match="milliseconds above 0"):
            granted(headers={"x-slo-tpot-ms": value})

    def test_one_that_no_level_keeps_names_the_fastest(self):
        with pytest.raises(ApiError, match=r"0\.5x, takes 5 ms for a token"):
            granted({"budget": "tpot=4.9ms"})

    def test_levels_without_times_refuse_them(self):
        with pytest.raises(ApiError, match="needs levels with predicted times of decode"):
            granted({"budget": "tpot=9ms"}, levels=UNTIMED)
        assert granted({"budget": "0.6x"}, levels=UNTIMED).level == 1
        decode_only = [replace(level, prefill_ms_per_token=None) for level in LEVELS]
        assert granted({"budget": "tpot=9ms"}, levels=decode_only).level == 2
        with pytest.raises(ApiError, match="needs levels with predicted times of prefill"):
            granted({"budget": "ttft=9ms"}, levels=decode_only)


class TestDefault:
    def test_it_may_be_narrowed_where_the_server_adapts(self):
        assert granted().floor == 0
        assert granted(policy=Policy(adaptive=False)).floor == FULL

    def test_it_may_hold_times(self):
        wish = replace(Wish(), tpot_ms=8.0, text="tpot=8ms")
        found = granted(policy=Policy(default=wish, adaptive=False))
        assert (found.level, found.floor, found.tpot_ms) == (2, 0, 8.0)


class TestPhases:
    def test_each_has_its_level(self):
        found = granted({"budget": {"thinking": "0.6x", "answer": "full"}})
        assert (found.level, found.floor, found.answer, found.answer_floor) == (1, 1, FULL, FULL)
        assert found.after == "</think>"
        lower = granted({"budget": {"thinking": "0.6x", "answer": "full", "after": "END"}, "floor": "0.5x"})
        assert (lower.floor, lower.answer_floor, lower.after) == (0, 0, "END")

    @pytest.mark.parametrize(
        "budget",
        [
            {},
            {"thinking": "0.6x"},
            {"thinking": "0.6x", "answer": "tpot=9ms"},
            {"thinking": "0.6x", "answer": "full", "after": ""},
            {"thinking": "0.6x", "answer": "full", "more": 1},
            {"thinking": 0.6, "answer": "full"},
            {"thinking": "0.1x", "answer": "full"},
        ],
    )
    def test_others_are_refused(self, budget):
        with pytest.raises(ApiError):
            granted({"budget": budget})


def test_asked_tells_nothing_where_nothing_is_named():
    assert asked_of(Fields({}), None, {}) == Asked()
