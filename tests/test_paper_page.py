"""The numbers behind the page of results (benchmarks/paper_page.py): differences at equal cost."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from paper_page import Loss

CURVE = [Loss((5.0, 7.0), 0.5), Loss((4.0, 6.0), 0.6), Loss((3.0, 4.0), 1.0)]


@pytest.mark.parametrize(
    ("cost", "blocks"),
    [
        (0.5, (5.0, 7.0)),
        (0.6, (4.0, 6.0)),
        (1.0, (3.0, 4.0)),
        (0.55, (4.5, 6.5)),
        (0.8, (3.5, 5.0)),
        (0.4, (6.0, 8.0)),  # below the lowest along the last line
    ],
)
def test_losses_between_answers_lie_on_the_line_between_them(cost, blocks):
    assert Loss(blocks, cost).above(CURVE) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_answers_that_took_the_same_time_are_no_division_by_zero():
    curve = [Loss((5.0, 5.0), 0.5), Loss((4.0, 4.0), 0.5), Loss((3.0, 3.0), 1.0)]
    assert Loss((5.0, 5.0), 0.5, cost_error=0.1).above(curve)[0] in (0.0, 1.0)


def test_differences_are_paired_block_by_block():
    assert Loss((4.6, 6.6), 0.55).above(CURVE) == pytest.approx((0.1, 0.0), abs=1e-9)
    assert Loss((4.6, 6.8), 0.55).above(CURVE) == pytest.approx((0.2, 0.1))


def test_what_timing_may_be_off_by_counts_times_the_slope():
    """Between 0.5 and 0.6 of the time the curve falls by 10 nats for all of it, so 0.01 of it is worth 0.1."""
    assert Loss((4.6, 6.6), 0.55, cost_error=0.01).above(CURVE) == pytest.approx((0.1, 0.1))
    timed = [replace(CURVE[0], cost_error=0.02), CURVE[1], CURVE[2]]
    assert Loss((4.6, 6.6), 0.55, cost_error=0.01).above(timed) == pytest.approx((0.1, 0.1 * 2**0.5))
    assert Loss((4.6, 6.6), 0.55).above(timed) == pytest.approx((0.1, 0.0), abs=1e-9)  # the router's own widths
