"""Choose the sub-networks that training visits: the full model, the smallest, presets, and random ones.

Flextron (Cai et al., ICML 2024), section 3.3, samples at random. The sandwich rule, which always trains the largest and
the smallest, comes from slimmable networks (Yu and Huang, 2019). New here: random sub-networks spread evenly over cost,
with widths per layer near the greedy choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np

from flextron.choosing.choice import choose
from flextron.config import VisitOptions
from flextron.costs.table import CostTable
from flextron.elastic.model import ElasticModel
from flextron.ranking.sensitivity import COUNTS, Sensitivity
from flextron.records import checked
from flextron.routers.static.learning import sample_answer
from flextron.routers.static.router import Router
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.learning import TokenRouterAbout, static_answers
from flextron.routers.token.net import TokenRouter
from flextron.subnet import AXES, Subnet

KINDS = ("full", "smallest", "preset", "random")
ATTENTION_PRICE = 4 / COUNTS["kv_groups"]
"""Loss per attention weight left out, relative to an MLP weight, so that it counts 4 times as much in a choice.

In SmolLM2, a third of all KV groups (8% of the weights) costs 0.9 nats; a quarter of all neurons (19%) costs 0.4.
"""
_GOLDEN = (5**0.5 - 1) / 2


class _Position(TypedDict):
    """What `Sampler.state_dict` returns."""

    generator: dict[str, Any]
    place: float
    visits: tuple[int, ...]


class TokenRouterInUse(NamedTuple):
    """A token router with its cost table: budgets are fractions of the full model's cost in that table."""

    router: TokenRouter
    table: CostTable
    about: TokenRouterAbout


@dataclass(frozen=True)
class Visit:
    """One sub-network that a step trains, and its kind."""

    kind: str
    """One of KINDS."""
    subnet: Subnet
    routing: TokenRouting | None = None
    """Gives each token its own widths near those of the sub-network; None if all tokens use the sub-network."""

    def use(self, model: ElasticModel) -> AbstractContextManager[ElasticModel]:
        """Return a context in which the model runs this visit."""
        return model.use(self.subnet) if self.routing is None else self.routing.use()


class SubnetSampler:
    """An endless, seeded sequence of sub-networks in fixed proportions; `state_dict` lets it resume.

    The next kind is the one whose share of the visits lags most behind its weight, so the proportions hold at any
    length. The share of the layers' weights of random sub-networks covers [smallest, full] evenly: it advances by the
    golden ratio from a random start, so even a short run covers the range. The widths are the greedy allocation for
    that share, after each sub-layer's sensitivities are multiplied by exp(N(0, spread)). Random sub-networks take the
    given sensitivities in turn: measured ones lead to widths near the best choices, even ones to nearly equal widths.
    """

    def __init__(
        self,
        sensitivities: Sequence[Sensitivity],
        *,
        smallest: Subnet,
        presets: Sequence[Subnet] = (),
        weights: Sequence[float] = (1, 1, 0, 2),
        spread: float = 0.5,
        draw_visit: Callable[[float, np.random.Generator], Visit] | None = None,
        seed: int = 0,
    ) -> None:
        """Make a sampler.

        Args:
            sensitivities: measured or even (`even_sensitivity`); random sub-networks take them in turn.
            smallest: the smallest sub-network to train.
            weights: relative frequency of each of KINDS; presets take turns.
            spread: standard deviation of the logarithm of the noise on sensitivities; 0 gives greedy choices only.
            draw_visit: makes random visits in place of the sensitivities, from a position in [0, 1) and a generator;
                for example, a router's answer to the budget at that position of its range.

        Raises:
            ValueError: `weights` are not four numbers from 0 up; presets are named but have weight 0, or none is named
                and they have a weight; or the smallest sub-network is the full model.
        """
        if len(weights) != len(KINDS) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"visits must be four weights from 0 up, for {', '.join(KINDS)}; got {list(weights)}.")
        if weights[2] and not presets:
            raise ValueError(f"presets have weight {weights[2]}, but none is named. Name presets, or pass weight 0.")
        if presets and not weights[2]:
            raise ValueError(f"presets are named, but have weight 0 in {list(weights)}. Pass, for example, 1 1 1 2.")
        self._sensitivities = tuple(sensitivities)
        self._smallest = smallest
        self._presets = tuple(presets)
        self._weights = np.array(weights, dtype=float) / sum(weights)
        self._spread = spread
        self._draw_visit = draw_visit
        self._lowest_share = self._sensitivities[0].share(smallest)
        if self._lowest_share >= 1:
            raise ValueError(
                "the smallest sub-network is the full model: there is nothing between them to train. "
                "Name a smaller one, or load a search space with more than one size."
            )
        self._generator = np.random.default_rng(seed)
        self._position = self._generator.random()
        self._visits = [0] * len(KINDS)

    def next(self) -> Visit:
        """Return the next visit."""
        lag = self._weights * (sum(self._visits) + 1) - self._visits
        kind = KINDS[int(lag.argmax())]
        visit = {"full": self._full, "smallest": self._least, "preset": self._preset, "random": self._random}[kind]()
        self._visits[KINDS.index(kind)] += 1
        return visit

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence, as JSON values."""
        return {"generator": self._generator.bit_generator.state, "place": self._position, "visits": list(self._visits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: `state` is no such position.
        """
        position = checked(state, _Position)
        visits, place = position["visits"], position["place"]
        if len(visits) != len(KINDS) or min(visits) < 0 or not 0 <= place < 1:
            raise ValueError(f"visits {visits} at place {place} are no position of the sampler")
        self._generator.bit_generator.state = position["generator"]
        self._position, self._visits = place, list(visits)

    def _full(self) -> Visit:
        return Visit("full", self._sensitivities[0].search_space.full)

    def _least(self) -> Visit:
        return Visit("smallest", self._smallest)

    def _preset(self) -> Visit:
        return Visit("preset", self._presets[self._visits[KINDS.index("preset")] % len(self._presets)])

    def _random(self) -> Visit:
        self._position = (self._position + _GOLDEN) % 1
        if self._draw_visit is not None:
            return self._draw_visit(self._position, self._generator)
        share = self._lowest_share + (1 - self._lowest_share) * self._position
        sensitivity = self._sensitivities[self._visits[KINDS.index("random")] % len(self._sensitivities)]
        noisy = {
            axis: tuple(tuple(np.array(row) * factor) for row, factor in zip(rows, self._noise(len(rows)), strict=True))
            for axis, rows in sensitivity.increases.items()
        }
        return Visit("random", replace(sensitivity, increases=noisy).allocate(share))

    def _noise(self, count: int) -> Any:
        """Return `count` random factors with median 1."""
        return np.exp(self._spread * self._generator.standard_normal(count))


def even_sensitivity(model: ElasticModel) -> Sensitivity:
    """Return made-up sensitivities for a model without measured ones; they lead to nearly equal widths.

    All layers are alike, and the loss rises with the square of the fraction left out. Per weight, attention costs
    ATTENTION_PRICE times as much as the MLP.
    """
    space = model.search_space
    widths, unit_weights = {axis: space[axis] for axis in AXES}, model.unit_weights
    increases = {
        axis: tuple(
            tuple(price * (1 - width / widths[axis][-1]) ** 2 * unit * widths[axis][-1] for width in widths[axis])
            for unit in unit_weights[axis]
        )
        for axis, price in zip(AXES, (1, ATTENTION_PRICE), strict=True)
    }
    return Sensitivity(space, widths, increases, unit_weights, tokens=0, text="")


def make_sampler(
    model: ElasticModel,
    options: VisitOptions,
    measured: Sensitivity | None,
    *,
    router: Router | None = None,
    tokens: TokenRouterInUse | None = None,
    seed: int,
) -> SubnetSampler:
    """Return the sampler for `options`, with measured sensitivities if there are any and with even ones.

    With `router`, random sub-networks are the router's answers. With `tokens`, each of their tokens is routed too.

    Raises:
        SubnetError: the model does not have the smallest sub-network or a preset.
        ValueError: as `SubnetSampler`.
    """
    even = even_sensitivity(model)
    return SubnetSampler(
        [even] if measured is None else [measured, even],
        smallest=choose(model, options.smallest, sensitivity=measured or even),
        presets=[choose(model, name, sensitivity=measured or even) for name in options.presets],
        weights=options.visits,
        spread=options.spread,
        draw_visit=None if router is None else partial(_visit_from_router, model, router, tokens, options.spread),
        seed=seed,
    )


def _visit_from_router(
    model: ElasticModel,
    router: Router,
    tokens: TokenRouterInUse | None,
    spread: float,
    position: float,
    generator: np.random.Generator,
) -> Visit:
    """Return a random answer of the router, or of the token router, for the budget at a position of its range."""
    if tokens is None:
        return Visit("random", sample_answer(router, position, spread, generator))
    budget = router.net.lowest + (1 - router.net.lowest) * position
    subnets = static_answers(router, tokens.table, [budget])
    return Visit("random", subnets[0], TokenRouting(model, tokens.router, [budget], subnets))
