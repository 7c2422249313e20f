"""Training a static router: measure pairs, fit the surrogate to them, train the router on the surrogate.

Flextron (Cai et al., ICML 2024), section 4.3 and figure 3: only the surrogate learns while its error is above a
threshold; below it, the router is updated on `surrogate loss + |cost - budget|`. The LLM is frozen. Our threshold is on
rank correlation, because errors in nats grow with smaller sizes, most of all before training
(docs/decisions/0008-router.md).

Shapes: B budgets, S sub-layers, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from flextron.costs.pricing import Ceiling
from flextron.costs.table import CostTable
from flextron.environment import one_thread
from flextron.errors import RouterError
from flextron.progress import bar
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.choices import Floats, Indices, choice_counts, to_indices, to_subnet
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.pairs import LossMeter, Pairs
from flextron.routers.static.router import Check, Router, RouterAbout, route_along
from flextron.routers.static.surrogate import Surrogate, SurrogateError, cross_validated
from flextron.subnet import Subnet

FIRST_PAIRS = 96
"""Number of pairs around the greedy choices, measured before the surrogate's first fit."""
ROUND_PAIRS = 48
"""Number of pairs measured around the router's answers between two trainings of the router."""
CHECKED_BUDGETS = 8
LEAST_EVALUATIONS = FIRST_PAIRS + ROUND_PAIRS + 2 * CHECKED_BUDGETS
ATTEMPTS = 20
"""Rounds without a new sub-network before exploration draws at random; after as many again it ends."""
LARGEST_ERROR = 0.1
"""Mean absolute error of the surrogate, in nats, above which a router must beat the greedy choice when measured."""
LOWEST_RANK = 0.8
"""Least rank correlation of a surrogate that a router is trained on."""
STEPS = 1000
LAST_STEPS = 3
"""The last training, which gives the answers, takes this many times STEPS."""
BATCH = 64
LEARNING_RATE = 0.003
"""About 10 times the LLM's; 10 times higher loses 0.02 nats to sampling noise."""
COST_WEIGHT = 30.0
"""Penalty in nats for missing the budget by the full model's cost."""
SPREADS = (0.0, 0.3, 0.6, 1.0)
"""Noise on the utilities when exploring: standard deviations of the logarithm."""


def train_router(
    sensitivity: Sensitivity,
    table: CostTable,
    meter: LossMeter,
    pairs: Pairs,
    *,
    evaluations: int = 256,
    lowest: float = 0.45,
    start: Router | None = None,
    seed: int = 0,
    show: bool = False,
) -> Router:
    """Train a router for one cost table.

        blocks = load_blocks(model.tokenizer, "sample/train", tokens=2048)
        pairs = Pairs("pairs.jsonl", {"text": blocks.text})
        router = train_router(sensitivity, table, LossMeter(model, blocks), pairs)

    `make_router` does this for the folder of a checkpoint, and saves the router there.

    Args:
        sensitivity: of the model that `meter` measures (`measure_sensitivity`).
        table: what sub-networks cost, such as from `measure_latency`.
        meter: measures the loss of a sub-network.
        pairs: where measurements are kept; a run resumes from the pairs of an earlier one.
        evaluations: number of measured sub-networks at most, pairs of earlier runs included. At least one round of new
            pairs is always measured, because the error needs sub-networks that the surrogate has not seen.
        lowest: lowest budget to train for, as a share of the full model's cost.
        start: router to continue from, for instance the one for the weights before training; by default the greedy
            choice.

    Raises:
        RouterError: the surrogate cannot order sub-networks by loss, or its predictions are far off and the router's
            measured answers do not beat the greedy choice.
        ValueError: too few evaluations, or `lowest` is not below 1.
    """
    if evaluations < LEAST_EVALUATIONS:
        raise ValueError(f"evaluations is {evaluations}; a router needs at least {LEAST_EVALUATIONS}.")
    router, greedy = (StaticRouter.of(sensitivity, table, lowest=_lowest(lowest, table)) for _ in range(2))
    if start is not None:
        router.continue_from(start.net)
    run = _Run(table, router, Surrogate.of(sensitivity), meter, pairs, seed)
    with bar(evaluations, description="router", show=show) as advance:
        for _ in range(min(len(pairs), evaluations - 1)):
            advance()
        error = run.learn(evaluations - 2 * CHECKED_BUDGETS, advance)
        if not _orders(error):
            asked = f"the rank correlation must be at least {LOWEST_RANK}"
            raise RouterError(_inaccurate(error, len(pairs), asked))
        validated = run.fit()
        router.continue_from(greedy if start is None else start.net)  # forget what poorer surrogates taught
        with one_thread():
            optimise(router, run.surrogate.counted, seed=seed, steps=LAST_STEPS * STEPS)
        checks = check_answers(router, greedy, table, lambda subnets: run.measure(subnets, advance))
    check_gain(error, checks, len(pairs))
    about = RouterAbout(
        metric=table.metric,
        conditions=dict(table.conditions),
        text=meter.blocks.text,
        tokens=meter.blocks.predicted_tokens,
        pairs=len(pairs),
        error=error,
        cross_validated=validated,
        checks=checks,
    )
    return Router(table.search_space, router, run.surrogate, about)


def fit_router(
    sensitivity: Sensitivity,
    table: CostTable,
    pairs: Pairs,
    *,
    text: str,
    tokens: int,
    lowest: float = 0.45,
    seed: int = 0,
) -> Router:
    """Train a router for one cost table on pairs that are measured already; needs no model.

    Losses belong to weights and not to a machine: pairs that were measured elsewhere serve here, too.

    Args:
        text, tokens: what the pairs were measured on.
        lowest: lowest budget to train for, as a share of the full model's cost.

    Raises:
        RouterError: the surrogate cannot order sub-networks by loss.
        ValueError: `lowest` is not below 1, or there are fewer than FIRST_PAIRS pairs.
    """
    if len(pairs) < FIRST_PAIRS:
        raise ValueError(f"there are {len(pairs)} measured pairs; a router needs at least {FIRST_PAIRS}.")
    router = StaticRouter.of(sensitivity, table, lowest=_lowest(lowest, table))
    surrogate = Surrogate.of(sensitivity)
    data = to_indices(table.search_space, pairs.subnets), np.array(pairs.losses)
    error = cross_validated(surrogate, *data, seed=seed)
    if not _orders(error):
        raise RouterError(_inaccurate(error, len(pairs), f"the rank correlation must be at least {LOWEST_RANK}"))
    surrogate.fit(*data)
    with one_thread():
        optimise(router, surrogate.counted, seed=seed, steps=LAST_STEPS * STEPS)
    about = RouterAbout(
        metric=table.metric,
        conditions=dict(table.conditions),
        text=text,
        tokens=tokens,
        pairs=len(pairs),
        error=error,
        cross_validated=error,
        checks=(),
    )
    return Router(table.search_space, router, surrogate, about)


def _lowest(lowest: float, table: CostTable) -> float:
    """The lowest budget of a router: not below what the smallest sub-network costs."""
    lowest = max(lowest, 1.05 * table.smallest / table.full)
    if not lowest < 1:
        raise ValueError(f"lowest is {lowest}; it must be below 1, the full model's cost.")
    return lowest


@dataclass(frozen=True)
class _Run:
    """State that the parts of one training share."""

    table: CostTable
    router: StaticRouter
    surrogate: Surrogate
    meter: Callable[[Subnet], float]
    pairs: Pairs
    seed: int

    def learn(self, pairs: int, advance: Callable[[], None]) -> SurrogateError:
        """Measure, fit and optimise in turn until there are `pairs` pairs; returns the error on the last new ones."""
        draw = np.random.default_rng([self.seed, len(self.pairs)])
        predicted: list[float] = []
        while len(self.pairs) < pairs or not predicted:
            fitted = len(self.pairs) >= FIRST_PAIRS
            if fitted and _orders(self.fit()):
                with one_thread():
                    optimise(self.router, self.surrogate.counted, seed=self.seed + len(self.pairs), steps=STEPS)
            missing = pairs - len(self.pairs)
            explored = self._explore(draw)[: missing if missing > 0 else ROUND_PAIRS]
            if not explored:  # a small search space, measured completely
                break
            self.measure(explored, advance)
            if fitted:
                predicted += self.surrogate.predict(self._indices(explored)).tolist()
        last = min(len(predicted), ROUND_PAIRS)
        return (
            SurrogateError.of(np.array(predicted[-last:]), np.array(self.pairs.losses[-last:])) if last else self.fit()
        )

    def fit(self) -> SurrogateError:
        """Fit the surrogate to all pairs; returns its cross-validated error."""
        data = self._indices(self.pairs.subnets), np.array(self.pairs.losses)
        validated = cross_validated(self.surrogate, *data, seed=self.seed)
        self.surrogate.fit(*data)
        return validated

    def _indices(self, subnets: list[Subnet]) -> Indices:
        return to_indices(self.table.search_space, subnets)

    def _explore(self, draw: np.random.Generator) -> list[Subnet]:
        """Return one round of new sub-networks near the router's present answers; empty when there are none left."""
        known, space = set(self.pairs.subnets), self.table.search_space
        counts_S = choice_counts(space)
        for attempt in range(2 * ATTEMPTS):
            positions = (np.arange(ROUND_PAIRS) + draw.random()) / ROUND_PAIRS
            rows = _near_answers(self.router, positions, np.resize(SPREADS, ROUND_PAIRS), draw)
            if attempt >= ATTEMPTS:  # the table prices few choices apart: take any sub-network
                rows = (draw.random((ROUND_PAIRS, len(counts_S))) * counts_S).astype(np.int64)
            distinct = {to_subnet(space, row): None for row in rows}
            if new := [subnet for subnet in distinct if subnet not in known]:
                return [new[index] for index in draw.permutation(len(new))]
        return []

    def measure(self, subnets: list[Subnet], advance: Callable[[], None]) -> list[float]:
        """Return losses of sub-networks, measuring only those not measured before."""
        known = self.pairs.measured()
        for subnet in subnets:
            if subnet not in known:
                known[subnet] = self.meter(subnet)
                self.pairs.add(subnet, known[subnet])
                advance()
        return [known[subnet] for subnet in subnets]


def check_answers(
    router: StaticRouter, greedy: StaticRouter, table: CostTable, measure: Callable[[list[Subnet]], list[float]]
) -> tuple[Check, ...]:
    """Measure the answers of the trained and the untrained router to budgets over the router's range."""
    budgets = [float(budget) for budget in np.linspace(router.lowest, 1, CHECKED_BUDGETS + 1)[:-1]]

    def answers(net: StaticRouter) -> list[Subnet]:
        limits = [Ceiling(table, budget * table.full, "") for budget in budgets]
        return [route_along(net, table.search_space, [limit]) for limit in limits]

    own, others = answers(router), answers(greedy)
    return tuple(map(Check, budgets, own, measure(own), measure(others)))


def check_gain(error: SurrogateError, checks: Sequence[Check], pairs: int) -> None:
    """Check that the surrogate is accurate, or that the router's measured answers beat the greedy choice's.

    Raises:
        RouterError: the error is above LARGEST_ERROR, and the mean gain over budgets is below two standard errors.
    """
    gains = np.array([check.greedy_loss - check.loss for check in checks])
    gain, doubt = gains.mean(), gains.std(ddof=1) / np.sqrt(len(gains))
    if error.mean_absolute > LARGEST_ERROR and not gain > 2 * doubt:
        asked = (
            f"above {LARGEST_ERROR} nats the router's answers must beat the greedy choice's; "
            f"measured, they gain {gain:.3f} ± {doubt:.3f} nats"
        )
        raise RouterError(_inaccurate(error, pairs, asked))


def _orders(error: SurrogateError) -> bool:
    return error.rank_correlation >= LOWEST_RANK


def _inaccurate(error: SurrogateError, pairs: int, asked: str) -> str:
    return (
        f"the surrogate does not predict losses well enough from {pairs} pairs: {error}; {asked}. Measure more "
        "sub-networks (--evaluations), use more tokens (--tokens), or narrow the range of budgets (--lowest)."
    )


@torch.no_grad()
def _near_answers(router: StaticRouter, positions_B: Floats, spreads_B: Floats, draw: np.random.Generator) -> Indices:
    """Return the router's answers with noise on its utilities, [B, S].

    Args:
        positions_B: budgets as positions in the router's range, 0 (lowest) to 1 (full).
        spreads_B: standard deviations of the logarithm of the noise.
    """
    budgets_B = torch.tensor(router.lowest + (1 - router.lowest) * positions_B, dtype=torch.float32)
    noise_BS = np.exp(spreads_B[:, None] * draw.standard_normal((len(positions_B), len(router.costs_SK))))
    logits_BSK = router(budgets_B)
    costs = logits_BSK - router.utilities_SK
    noisy_BSK = router.utilities_SK * torch.tensor(noise_BS, dtype=torch.float32)[..., None] + costs
    return np.asarray(noisy_BSK.argmax(-1))


def optimise(
    router: StaticRouter,
    losses_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    seed: int,
    steps: int = STEPS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train the router in place on the loss of its choices plus their distance to the budget.

    Choices are drawn by Gumbel-softmax, hard in the forward pass. The temperature falls from 1 to 0.05, and the scale
    of the logits grows from 1 to 10.

    Args:
        losses_of: returns losses [B] of choices [B, S, K], differentiable: a surrogate's, or the LLM's.
        batch: number of budgets per step.
    """
    optimizer = torch.optim.Adam(router.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(steps):
            done = step / steps
            positions_B = (torch.arange(batch) + torch.rand(batch)) / batch
            budgets_B = router.lowest + (1 - router.lowest) * positions_B
            choices_BSK = F.gumbel_softmax(router(budgets_B) * 10**done, tau=0.05**done, hard=True)
            missed_B = (router.cost(choices_BSK) - budgets_B).abs()
            loss = (losses_of(choices_BSK) + COST_WEIGHT * missed_B).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def sample_answer(router: Router, place: float, spread: float, draw: np.random.Generator) -> Subnet:
    """Return a router's answer to one budget, with noise on its utilities.

    Args:
        place: the budget as a position in the router's range, 0 (lowest) to 1 (full).
        spread: standard deviation of the logarithm of the noise; 0 gives the answer itself.
    """
    return to_subnet(router.search_space, _near_answers(router.net, np.array([place]), np.array([spread]), draw)[0])
