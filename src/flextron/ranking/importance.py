"""Rank units: order the neurons, KV groups and query heads of each layer by importance, from forward passes alone.

Statistics are summed batch by batch, so their memory depends on the model, not on the number of tokens. They are
measured at the input of the closing projection. A unit u (a neuron or a query head) adds `y_u = W_u a_u` to the
residual stream, where a_u is its part of that input and W_u its columns of the weight.

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
from flextron.elastic.loss import body_of
from flextron.elastic.model import ElasticModel, SubLayer
from flextron.elastic.permutation import permute
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
    """
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
            model. In the second half each layer adds only the best three quarters of its neurons. Needs one fp32 matrix
            [C, C] per sub-layer, and a second one per MLP.

    Experts of a mixture are ordered by what they add to the residual stream, whatever the score: the sum over the
    tokens that are routed to an expert of the squared norm of its output, weighted by the router.

    Raises:
        ValueError: an unknown score.
        FlextronError: activations are not finite.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; the scores are {', '.join(SCORES)}.")
    model.check_tokens(blocks.tokens)
    mlps = [_statistic(layer.mlp, score) for layer in model.layers]
    attentions = [_statistic(layer.attention, score) for layer in model.layers]
    batches = list(blocks.batches(min(BATCH_TOKENS, blocks.tokens.numel() // 2)))
    second_round = len(batches) // 2 if score == "reconstruction" and len(batches) > 1 else len(batches)
    with _observed([*mlps, *attentions]), model.use(model.search_space.full), torch.inference_mode():
        for index, tokens_BT in enumerate(progress(batches, "rank") if show else batches):
            if index == second_round:
                for statistic in mlps:
                    statistic.start_second_round()
            body_of(model.lm)(tokens_BT.to(model.device), use_cache=False)
    return [_orders(mlp, attention) for mlp, attention in zip(mlps, attentions, strict=True)]


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
        self.first_gram = _normalised(gram_UU).astype(np.float32)
        seen = torch.zeros(self.units, dtype=self.closes.weight.dtype)
        seen[best_first[: int(self.units * SECOND_ROUND_SHARE)]] = 1
        self.seen_C = seen.repeat_interleave(len(self.sum) // self.units).to(self.sum.device)
        self.sum.zero_()

    def gram(self) -> NDArray[np.float64]:
        """Return the matrix [U, U] of scores.

        For `reconstruction` entry u, v is the sum over tokens of y_u . y_v; for other scores the matrix is diagonal.
        """
        weight_DC = self.closes.matrix().detach().float()
        weights_U = weight_DC.view(len(weight_DC), self.units, -1).square().sum((0, 2))
        if self.score == "reconstruction":
            gram_CC = self.sum * (weight_DC.T @ weight_DC)
            gram_UU = gram_CC.view(self.units, -1, self.units, len(gram_CC) // self.units).sum((1, 3))
        elif self.score == "absolute_weight":
            gram_UU = torch.diag(self.sum * weights_U.sqrt())
        else:
            gram_UU = torch.diag(self.sum * weights_U if self.score == "rms_weight" else self.sum)
        result: NDArray[np.float64] = gram_UU.double().cpu().numpy()
        if not np.isfinite(result).all():
            raise FlextronError(
                "the activations of a layer are not finite, so its units cannot be ordered. "
                "Check the checkpoint for NaN, or use float32 or bfloat16 instead of float16."
            )
        if self.first_gram is not None:  # both rounds count alike, whatever the size of their activations
            result = self.first_gram + _normalised(result)
        return result


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


def _normalised(gram_UU: NDArray[np.float64]) -> NDArray[np.float64]:
    return gram_UU / (gram_UU.trace() or 1.0)


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
