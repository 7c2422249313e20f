"""The numbers behind the page of results (benchmarks/paper_page.py): differences at equal cost."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from paper_page import Loss, _interpolated

CURVE = [(0.5, (5.0, 7.0)), (0.6, (4.0, 6.0)), (1.0, (3.0, 4.0))]
"""Cost, and losses of two blocks."""


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
    found = _interpolated(CURVE, cost)
    assert found.cost == cost
    assert found.blocks == pytest.approx(blocks)


def test_answers_that_took_the_same_time_are_no_division_by_zero():
    assert _interpolated([(0.5, (5.0,)), (0.5, (4.0,)), (1.0, (3.0,))], 0.5).blocks in ((5.0,), (4.0,))


def test_differences_are_paired_block_by_block():
    difference, error = Loss((4.6, 6.6), 0.55).above(_interpolated(CURVE, 0.55))
    assert (difference, error) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
