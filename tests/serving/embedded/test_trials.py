"""Which steps run by compiled kernels: those in which these are the faster of the two here."""

from types import SimpleNamespace

import pytest

from flextron.serving.embedded import trials
from flextron.serving.embedded.prices import LevelCosts, StepPrices


@pytest.mark.parametrize(
    ("kernels_ms", "most", "few"),
    [
        (0.5, 128, 128),  # a token; torch takes 60 ms and 0.5 for each token
        (0.9, 128, 128),
        (1.2, 128, 64),
        (2.0, 128, 32),
        (9.0, 128, 16),  # with so few, torch's calls always cost more
        (1.0, 0, 0),  # a model that the kernels do not take
    ],
)
def test_the_faster_way_is_found_out(kernels_ms, most, few, monkeypatch):
    mixed, asked = SimpleNamespace(few_tokens=most), []

    def time_step(mixed, _cache, step):
        tokens = sum(row.tokens for row in step)
        asked.append((tokens, mixed.few_tokens))
        return step, kernels_ms * tokens if tokens <= mixed.few_tokens else 60 + 0.5 * tokens

    monkeypatch.setattr(trials, "time_step", time_step)
    prices = StepPrices([LevelCosts(0.5, 0.5, 0.5), LevelCosts(1, 1, 1)])
    trials.fit_prices(prices, mixed, None, levels=2, rows=4, prompt_tokens=256)
    assert mixed.few_tokens == few
    slow = [limit for tokens, limit in asked if tokens == 128]
    assert (128 in slow) == (most == 128)
