"""Which units of a layer matter: orders of neurons, KV groups and query heads, from forward passes alone.

All statistics stream: their memory depends on the model, not on the number of tokens. They are taken where a
sub-layer closes: a unit u (a neuron, or a query head) adds `y_u = W_u a_u` to the residual stream, where a_u is its
part of the closing projection's input and W_u its columns of the weight.

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
from flextron.elastic.model import ElasticModel, SubLayer
from flextron.errors import FlextronError
from flextron.progress import progress

SCORES: tuple[Score, ...] = get_args(Score)
SECOND_ROUND_SHARE = 0.75
"""Share of each layer's neurons that the layers above see in the second round of `reconstruction`."""


@dataclass(frozen=True)
class Orders:
    """Units of one layer, best first, by their present indices."""

    neurons: torch.Tensor  # [N]
    kv_groups: torch.Tensor  # [G]
    query_heads: torch.Tensor  # [G, Q], row i for the group that comes i-th


def measure_importance(
    model: ElasticModel, blocks: TokenBlocks, *, score: Score = "reconstruction", show: bool = False
) -> list[Orders]:
    """The order of the units of every layer by one score; the model stays as it is.

    Scores, summed over all tokens:
        absolute: |a_u|, for a head the norm of a_u (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.2).
        absolute_weight: the same times the norm of W_u.
        rms, rms_weight: the square of a_u; the same times the squared norm of W_u.
        reconstruction (ours): starting from all units, the next to go is the one without which the output of the
            sub-layer, with all that went before left out too, stays nearest to the full output in squared error. So
            every prefix is chosen for its own output, and units that repeat or cancel each other are seen. The first
            half of the tokens is read in the full model, the second in one in which each layer adds the best three
            quarters of its neurons only. Needs one fp32 matrix [C, C] per sub-layer, and
            for MLPs a second one.

    Raises:
        ValueError: an unknown score.
        FlextronError: activations that are not finite.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; the scores are {', '.join(SCORES)}.")
    mlps = [_Statistic(layer.mlp, score) for layer in model.layers]
    attentions = [_Statistic(layer.attention, score) for layer in model.layers]
    batches = list(blocks.batches(min(BATCH_TOKENS, blocks.tokens.numel() // 2)))
    second_round = len(batches) // 2 if score == "reconstruction" and len(batches) > 1 else len(batches)
    with _observed([*mlps, *attentions]), model.use(model.search_space.full), torch.inference_mode():
        for index, tokens_BT in enumerate(progress(batches, "rank") if show else batches):
            if index == second_round:
                for statistic in mlps:
                    statistic.start_second_round()
            model.lm.base_model(tokens_BT.to(model.device), use_cache=False)
    return [_orders(mlp, attention) for mlp, attention in zip(mlps, attentions, strict=True)]


class _Statistic:
    """What a score needs to know of one sub-layer: a sum over tokens, per unit or per pair of columns."""

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
        """Add the closing projection's input; in the second round, pass on only what the layers above may see."""
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
        self.seen_C = seen.to(self.sum.device)
        self.sum.zero_()

    def gram(self) -> NDArray[np.float64]:
        """[U, U]; entry u, v is the sum over tokens of y_u . y_v, and for additive scores a diagonal of them."""
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
                "the activations of a layer are not finite, so there is no order of its units. "
                "Check the checkpoint for NaN, or use float32 or bfloat16 instead of float16."
            )
        if self.first_gram is not None:  # rounds count alike, whatever the size of their activations
            result = self.first_gram + _normalised(result)
        return result


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
    """Units, best first: the last is the one whose loss costs least, the next to last costs least once that is gone.

    The squared error of leaving out a set R is the sum of `gram` over R x R, so dropping u as well adds
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
