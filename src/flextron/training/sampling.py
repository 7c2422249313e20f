"""Which sub-networks a training step visits: a sandwich of the full model, the smallest, presets, and random ones.

Flextron (Cai et al., ICML 2024), section 3.3, samples at random; the sandwich rule is from slimmable networks (Yu and
Huang, 2019); random ones spread evenly over cost, and widths per layer near the greedy choice, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flextron.choosing.choice import choose
from flextron.config import VisitOptions
from flextron.costs.table import CostTable
from flextron.elastic.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static.learning import sample_answer
from flextron.routers.static.router import Router
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.learning import TokenRouterAbout, static_answers
from flextron.routers.token.net import TokenRouter
from flextron.subnet import AXES, Subnet

KINDS = ("full", "smallest", "preset", "random")
ATTENTION_PRICE = 4
"""In SmolLM2, a third of all KV groups (8% of the weights) costs 0.9 nats, a quarter of all neurons (19%) 0.4."""
_GOLDEN = (5**0.5 - 1) / 2


class TokenRouterInUse(NamedTuple):
    """A token router, and the cost table that its budgets are parts of."""

    router: TokenRouter
    table: CostTable
    about: TokenRouterAbout


@dataclass(frozen=True)
class Visit:
    """One sub-network that a step trains, and why it was taken."""

    kind: str
    """One of KINDS."""
    subnet: Subnet
    routing: TokenRouting | None = None
    """Gives every token widths of its own, around the sub-network."""

    def use(self, model: ElasticModel) -> AbstractContextManager[ElasticModel]:
        """Run the model so inside the block."""
        return model.use(self.subnet) if self.routing is None else self.routing.use()


class SubnetSampler:
    """An endless sequence of sub-networks in fixed proportions, from one seeded generator; `state_dict` takes it up.

    Kinds come in turn, each the one whose share of the visits so far lags most behind its weight, so that proportions
    hold exactly at any length. A random sub-network's share of the layers' weights runs evenly over [smallest, full]
    (steps of the golden ratio from a random start, so that a short run covers it evenly too); its widths are the greedy
    allocation for that share under sensitivities of which each sub-layer's is multiplied by exp(N(0, spread)). The
    sensitivities take turns: measured ones give widths like the best choices, even ones widths that are nearly equal.
    """

    def __init__(
        self,
        sensitivities: Sequence[Sensitivity],
        *,
        smallest: Subnet,
        presets: Sequence[Subnet] = (),
        weights: Sequence[float] = (1, 1, 0, 2),
        spread: float = 0.5,
        routed: Callable[[float, np.random.Generator], Visit] | None = None,
        seed: int = 0,
    ) -> None:
        """Make a sampler.

        Args:
            sensitivities: what each part costs, measured or even (`even_sensitivity`); random ones take them in turn.
            smallest: the least that is trained.
            weights: how often each of KINDS is visited, relative to one another; presets take turns.
            spread: standard deviation of the logarithm of the noise on sensitivities; 0 gives greedy choices only.
            routed: gives a random visit from a place in [0, 1) and a generator, in place of the sensitivities, such
                as of a router's answer to the budget there.

        Raises:
            ValueError: weights that are not four numbers from 0 up, or that ask for presets where there are none, or
                a smallest sub-network that is the full model.
        """
        if len(weights) != len(KINDS) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"visits must be four weights from 0 up, for {', '.join(KINDS)}; got {list(weights)}.")
        if weights[2] and not presets:
            raise ValueError(f"presets are visited with weight {weights[2]}, but none is named. Name some, or weigh 0.")
        if presets and not weights[2]:
            raise ValueError(f"presets are named, but visited with weight 0 of {list(weights)}. Pass such as 1 1 1 2.")
        self._sensitivities = tuple(sensitivities)
        self._smallest = smallest
        self._presets = tuple(presets)
        self._weights = np.array(weights, dtype=float) / sum(weights)
        self._spread = spread
        self._routed = routed
        self._lowest_share = self._sensitivities[0].share(smallest)
        if self._lowest_share >= 1:
            raise ValueError(
                "the smallest sub-network is the full model: there is nothing between them to train. "
                "Name a smaller one, or load a search space with more than one size."
            )
        self._draw = np.random.default_rng(seed)
        self._place = self._draw.random()
        self._visits = [0] * len(KINDS)

    def next(self) -> Visit:
        """The sub-network to train next."""
        lag = self._weights * (sum(self._visits) + 1) - self._visits
        kind = KINDS[int(lag.argmax())]
        visit = {"full": self._full, "smallest": self._least, "preset": self._preset, "random": self._random}[kind]()
        self._visits[KINDS.index(kind)] += 1
        return visit

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands, as JSON."""
        return {"generator": self._draw.bit_generator.state, "place": self._place, "visits": list(self._visits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._draw.bit_generator.state = state["generator"]
        self._place = state["place"]
        self._visits = list(state["visits"])

    def _full(self) -> Visit:
        return Visit("full", self._sensitivities[0].search_space.full)

    def _least(self) -> Visit:
        return Visit("smallest", self._smallest)

    def _preset(self) -> Visit:
        return Visit("preset", self._presets[self._visits[KINDS.index("preset")] % len(self._presets)])

    def _random(self) -> Visit:
        self._place = (self._place + _GOLDEN) % 1
        if self._routed is not None:
            return self._routed(self._place, self._draw)
        share = self._lowest_share + (1 - self._lowest_share) * self._place
        sensitivity = self._sensitivities[self._visits[KINDS.index("random")] % len(self._sensitivities)]
        noisy = {
            axis: tuple(
                tuple(np.array(row) * factor)
                for row, factor in zip(rows, np.exp(self._spread * self._draw.standard_normal(len(rows))), strict=True)
            )
            for axis, rows in sensitivity.increases.items()
        }
        return Visit("random", replace(sensitivity, increases=noisy).allocate(share))


def even_sensitivity(model: ElasticModel) -> Sensitivity:
    """Sensitivities of a model of which none were measured: all layers alike, quadratic in the part left out.

    They lead to nearly equal widths. Attention costs ATTENTION_PRICE times as much as the MLP, weight by weight.
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
    """The sampler that `options` ask for, from measured sensitivities, if there are any, and from even ones.

    Random ones come from `router` instead, if there is one, and with `tokens` every token of theirs is routed.

    Raises:
        SubnetError: a smallest sub-network or a preset that the model does not have.
        ValueError: as `SubnetSampler`.
    """
    even = even_sensitivity(model)
    return SubnetSampler(
        [even] if measured is None else [measured, even],
        smallest=choose(model, options.smallest, sensitivity=measured or even),
        presets=[choose(model, wish, sensitivity=measured or even) for wish in options.presets],
        weights=options.visits,
        spread=options.spread,
        routed=None if router is None else partial(_routed, model, router, tokens, options.spread),
        seed=seed,
    )


def _routed(
    model: ElasticModel,
    router: Router,
    tokens: TokenRouterInUse | None,
    spread: float,
    place: float,
    draw: np.random.Generator,
) -> Visit:
    """What a router, or with it a token router, may answer to the budget at a place of its range."""
    if tokens is None:
        return Visit("random", sample_answer(router, place, spread, draw))
    budget = router.net.lowest + (1 - router.net.lowest) * place
    subnets = static_answers(router, tokens.table, [budget])
    return Visit("random", subnets[0], TokenRouting(model, tokens.router, [budget], subnets))
