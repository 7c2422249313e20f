"""Rank units: order the neurons, KV groups and query heads of each layer by importance, from forward passes alone.

All tokens pass one layer before the next, so statistics of one layer at a time are held, and between layers one hidden
state for each token. Statistics are measured at the input of the closing projection. A unit u (a neuron or a query
head) adds `y_u = W_u a_u` to the residual stream: a_u is its part of that input, W_u its columns of the weight.

Shapes: T tokens, D model, C input columns of the closing projection, U units, N neurons, G KV groups, Q query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flextron.config import Score
from flextron.data.blocks import BATCH_TOKENS, TokenBlocks
from flextron.elastic.checkpoint import Ranking
from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.permutation import permute
from flextron.elastic.walk import walking
from flextron.errors import FlextronError
from flextron.progress import progress

SCORES: tuple[Score, ...] = get_args(Score)
SECOND_ROUND_SHARE = 0.75
"""Share of each layer's neurons whose output reaches the layers above in the second round of `reconstruction`."""


@dataclass(frozen=True)
class Orders:
    """Present indices of one layer's units, best first."""

    neurons: torch.Tensor  # [N]
    kv_groups: torch.Tensor  # [G]
    query_heads: torch.Tensor  # [G, Q], row i for the group at place i of kv_groups


def rank(model: ElasticModel, blocks: TokenBlocks, *, score: Score = "reconstruction", show: bool = False) -> Ranking:
    """Rank the units of `model` on a text and permute them in place, best first; returns the permutation.

    `measure_importance` explains the scores. The paper ranks by summed |activation|: `absolute`.

    Raises:
        ValueError: an unknown score.
        CheckpointError: the weights are quantised.
    """
    model.check_float("rank")
    orders = measure_importance(model, blocks, score=score, show=show)
    ranking = Ranking(
        neurons=torch.stack([order.neurons for order in orders]),
        kv_groups=torch.stack([order.kv_groups for order in orders]),
        query_heads=torch.stack([order.query_heads for order in orders]),
        score=score,
        tokens=blocks.tokens.numel(),
        text=blocks.text,
    )
    permute(model, ranking)
    return ranking


def measure_importance(
    model: ElasticModel, blocks: TokenBlocks, *, score: Score = "reconstruction", show: bool = False
) -> list[Orders]:
    """Order the units of every layer by one score; the model does not change.

    Scores, summed over all tokens:
        absolute: |a_u|, for a head the norm of a_u (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.2).
        absolute_weight: `absolute` times the norm of W_u.
        rms: the square of a_u.
        rms_weight: `rms` times the squared norm of W_u.
        reconstruction (ours): removes units one by one, each time the one whose removal keeps the output of the
            sub-layer nearest to the full output in squared error. So every prefix is chosen for its own output, and
            units that repeat or cancel each other are recognised. The first half of the tokens runs through the full
            model. In the second half each layer adds only the best three quarters of its neurons. Needs a few fp32
            matrices [C, C], of one layer at a time.

    Experts of a mixture are ordered by what they add to the residual stream, whatever the score: the sum over the
    tokens that are routed to an expert of the squared norm of its output, weighted by the router.

    Raises:
        ValueError: an unknown score.
        FlextronError: activations are not finite.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; the scores are {', '.join(SCORES)}.")
    model.check_tokens(blocks.tokens)
    batches = list(blocks.batches(min(BATCH_TOKENS, blocks.tokens.numel() // 2)))
    second_round = len(batches) // 2 if score == "reconstruction" and len(batches) > 1 else len(batches)
    hidden: list[torch.Tensor | None] = [None for _ in batches]
    orders = []
    with walking(model) as walk, model.use(model.search_space.full), torch.inference_mode():
        for index, layer in enumerate(progress(model.layers, "rank") if show else model.layers):
            mlp, attention = _statistic(layer.mlp, score), _statistic(layer.attention, score)
            with _observed([mlp, attention]):
                for place, tokens_BT in enumerate(batches):
                    if place == second_round:
                        mlp.start_second_round()
                    hidden[place] = walk.through(index, tokens_BT, hidden[place])
            orders.append(_orders(mlp, attention))
    return orders


def _statistic(sub: SubLayer, score: Score) -> _Statistic:
    return _ExpertStatistic(sub, score) if sub.axis.experts else _Statistic(sub, score)


class _Statistic:
    """The statistic behind one sub-layer's score: a sum over tokens, per unit or per pair of columns."""

    def __init__(self, sub: SubLayer, score: Score) -> None:
        self.closes = sub.closes
        self.score = score
        self.groups = sub.width.full
        self.units = sub.width.full * sub.heads_per_unit
        columns = sub.closing_size
        size = (columns, columns) if score == "reconstruction" else (self.units,)
        self.sum = torch.zeros(size, dtype=torch.float32, device=sub.closes.weight.device)
        self.weights_CC: torch.Tensor | None = None
        """Inner products of the weight's columns; kept from the first round for the second."""
        self.first_gram: NDArray[np.float32] | None = None
        self.seen_C: torch.Tensor | None = None

    def observe(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Add the closing projection's input to the sum; in the second round also mask its least important units."""
        a_TC = inputs[0].flatten(0, -2).float()
        if self.score == "reconstruction":
            self.sum.addmm_(a_TC.T, a_TC)
        elif self.score.startswith("absolute"):
            self.sum += a_TC.view(len(a_TC), self.units, -1).norm(dim=-1).sum(0)
        else:
            self.sum += a_TC.view(len(a_TC), self.units, -1).square().sum((0, 2))
        return None if self.seen_C is None else (inputs[0] * self.seen_C,)

    def start_second_round(self) -> None:
        gram_UU = self.gram()
        best_first = _eliminate(gram_UU)
        self.first_gram = _normalise(gram_UU).astype(np.float32)
        seen = torch.zeros(self.units, dtype=self.closes.weight.dtype)
        seen[best_first[: int(self.units * SECOND_ROUND_SHARE)]] = 1
        self.seen_C = seen.repeat_interleave(len(self.sum) // self.units).to(self.sum.device)
        self.sum.zero_()

    def gram(self) -> NDArray[np.float64]:
        """Return the matrix [U, U] of scores. Call it once at the end of a round: it uses up the sum.

        For `reconstruction` entry u, v is the sum over tokens of y_u . y_v; for other scores the matrix is diagonal.
        """
        gram_UU = self._of_pairs() if self.score == "reconstruction" else torch.diag(self._of_units())
        result: NDArray[np.float64] = gram_UU.cpu().double().numpy()
        if not np.isfinite(result).all():
            raise FlextronError(
                "the activations of a layer are not finite, so its units cannot be ordered. "
                "Check the checkpoint for NaN, or use float32 or bfloat16 instead of float16."
            )
        if self.first_gram is not None:  # both rounds count alike, whatever the size of their activations
            result = _normalise(result)
            result += self.first_gram
        return result

    def _of_pairs(self) -> torch.Tensor:
        """The sum over tokens of y_u . y_v, [U, U]."""
        if self.weights_CC is None:
            weight_DC = self.closes.matrix().detach().float()
            self.weights_CC = weight_DC.T @ weight_DC
        gram_CC = self.sum.mul_(self.weights_CC)
        if self.first_gram is not None:  # the last round
            self.weights_CC = None
        if self.units == len(gram_CC):
            return gram_CC
        return gram_CC.view(self.units, -1, self.units, len(gram_CC) // self.units).sum((1, 3))

    def _of_units(self) -> torch.Tensor:
        """The score of every unit, [U]."""
        if not self.score.endswith("weight"):
            return self.sum
        weight_DC = self.closes.matrix().detach().float()
        weights_U = weight_DC.view(len(weight_DC), self.units, -1).square().sum((0, 2))
        return self.sum * (weights_U.sqrt() if self.score == "absolute_weight" else weights_U)


class _ExpertStatistic(_Statistic):
    """What each expert of a mixture adds: squared norms of its weighted output, summed over its tokens."""

    def __init__(self, sub: SubLayer, score: Score) -> None:
        self.closes = sub.closes
        self.score = score
        self.groups = self.units = sub.width.full
        self.sum = torch.zeros(self.units, dtype=torch.float32, device=next(sub.parameters()).device)
        self.first_gram = self.seen_C = None

    def observe(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Run each token's experts one by one, and add the squared norms of what they give."""
        hidden_TD, experts_TK, weights_TK = _routed(module, inputs)
        for place in range(experts_TK.shape[1]):
            one = slice(place, place + 1)
            output_TD = module.forward(hidden_TD, experts_TK[:, one], weights_TK[:, one])
            self.sum.index_add_(0, experts_TK[:, place], output_TD.float().square().sum(-1))
        return None

    def start_second_round(self) -> None:
        """Go on: experts have one round."""

    def gram(self) -> NDArray[np.float64]:
        """Return the diagonal matrix [U, U] of scores."""
        result: NDArray[np.float64] = torch.diag(self.sum).double().cpu().numpy()
        return result


def _routed(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of a mixture's experts: hidden states, and for each token its experts and their weights.

    Raises:
        FlextronError: they are others.
    """
    fits = len(inputs) >= 3 and all(isinstance(value, torch.Tensor) for value in inputs[:3])
    if not fits or inputs[1].is_floating_point() or inputs[1].shape != inputs[2].shape or inputs[1].ndim != 2:
        raise FlextronError(f"{type(module).__name__} takes its tokens in a way in which experts cannot be ranked.")
    return inputs[0], inputs[1], inputs[2]


def _normalise(gram_UU: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by the trace, in place."""
    gram_UU /= gram_UU.trace() or 1.0
    return gram_UU


@contextmanager
def _observed(statistics: list[_Statistic]) -> Iterator[None]:
    with ExitStack() as hooks:
        for statistic in statistics:
            hooks.callback(statistic.closes.register_forward_pre_hook(statistic.observe).remove)
        yield


def _orders(mlp: _Statistic, attention: _Statistic) -> Orders:
    gram = attention.gram()
    groups, heads = attention.groups, attention.units // attention.groups
    gram_GQGQ = gram.reshape(groups, heads, groups, heads)
    kv_groups = _eliminate(gram_GQGQ.sum((1, 3)))
    query_heads = np.stack([_eliminate(gram_GQGQ[group, :, group]) for group in kv_groups])
    return Orders(torch.tensor(_eliminate(mlp.gram())), torch.tensor(kv_groups), torch.tensor(query_heads))


def _eliminate(gram_UU: NDArray[np.float64]) -> NDArray[np.int32]:
    """Order units best first, by removing one after another the unit that adds least squared error.

    Removing a set R costs the sum of `gram` over R x R, so removing u as well adds
    gram[u, u] + 2 * (sum of gram[u, v] over v in R).
    """
    cost_U = gram_UU.diagonal().copy()
    worst_first = np.empty(len(cost_U), dtype=np.int32)
    for place in range(len(cost_U)):
        unit = int(cost_U.argmin())
        worst_first[place] = unit
        cost_U += 2 * gram_UU[unit]
        cost_U[unit] = np.inf
    return worst_first[::-1].copy()
