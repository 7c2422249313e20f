"""Refit the closing projections of a ranked model, so that all its prefixes answer better; in closed form, in minutes.

After ranking, a sub-network with k units computes W[:, :k] a[:k], as if the other units were zero. They are not: the
kept units tell much of what the others would have said. So W is replaced by the one matrix V that answers best for all
widths k, weighted by p_k, in ridge regression on the activations a of the full model:

    minimise  sum_k p_k E|W a - V[:, :k] a[:k]|^2 + ridge
    solution  V (G o M + R) = W G D + W R
    with      G = E[a a^T], M_ij = P(k > max(i, j)), D_jj = P(k > j), R = ridge diag(G)

V stays one shared matrix: sub-networks are views of it as before, and it costs nothing in use. For one width it is the
correction of SlimGPT (Ling et al., NeurIPS 2024, arXiv 2412.18110); for all widths at once it is ours.
docs/decisions/0013-refit.md has what was measured.

Shapes: T tokens, D model, C input columns of the closing projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import torch

from flextron.data.blocks import TokenBlocks
from flextron.elastic.layers import ElasticLayer, SubLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection
from flextron.errors import FlextronError
from flextron.ranking.moments import root_of, second_moments

WEIGHTS: Mapping[float, float] = {1.0: 0.88, 0.75: 0.04, 0.5: 0.08}
"""How much a width counts, by its share of the units. So little for narrow ones keeps the full model as it was."""
RIDGE = 0.01
"""Pull towards the old weights, as a share of the diagonal of G."""


@torch.no_grad()
def refit(
    model: ElasticModel,
    blocks: TokenBlocks,
    *,
    axes: tuple[str, ...] = ("neurons",),
    rank: int | None = None,
    show: bool = False,
) -> None:
    """Refit the closing projections of a ranked model in place, on a text.

    Args:
        axes: sub-layers to refit. Attentions gain on one text and lose on another, so they are left as they are.
        rank: give every weight a change of at most this rank, so that it fits into a small pack; None for no limit.

    Raises:
        FlextronError: the model is not ranked, or activations of a layer are not finite. Then the layers below are
            refitted already: load the model again.
    """
    if model.ranking is None:
        raise FlextronError("only a ranked model can be refitted: its first units must be its best. Rank it first.")

    def closing_projections(layer: ElasticLayer) -> list[Projection]:
        return [sub.closes for sub in subs_of(layer)]

    def subs_of(layer: ElasticLayer) -> list[SubLayer]:
        """The sub-layers that narrow."""
        return [layer[axis] for axis in axes if layer[axis].opens]

    moments = second_moments(model, closing_projections, blocks, title="refit" if show else None)
    with closing(moments):
        for index, grams in enumerate(moments):
            if not all(gram_CC.isfinite().all() for gram_CC in grams):
                raise FlextronError(
                    f"the activations of layer {index} are not finite, so it cannot be refitted. Use float32."
                )
            for sub, gram_CC in zip(subs_of(model.layers[index]), grams, strict=True):
                _refit(sub, gram_CC, rank)


def _refit(sub: SubLayer, gram_CC: torch.Tensor, rank: int | None) -> None:
    weight_DC = sub.closes.matrix()
    change_DC = _best(weight_DC.float(), gram_CC, sub) - weight_DC.float()
    weight_DC += (change_DC if rank is None else _of_rank(change_DC, gram_CC, rank)).to(weight_DC)


def _best(weight_DC: torch.Tensor, gram_CC: torch.Tensor, sub: SubLayer) -> torch.Tensor:
    """The matrix that answers best for all widths, [D, C]."""
    wider_C = _chance_of_wider(sub).to(gram_CC)
    ridge_C = RIDGE * gram_CC.diagonal() + 1e-12 * gram_CC.diagonal().mean() + torch.finfo(torch.float32).tiny
    right_DC = weight_DC @ gram_CC * wider_C + weight_DC * ridge_C
    left_CC = torch.minimum(wider_C[:, None], wider_C).mul_(gram_CC)  # P(k > max(i, j)): wider is less likely
    left_CC.diagonal().add_(ridge_C)
    root_CC, failed = torch.linalg.cholesky_ex(left_CC)  # positive definite, but for rounding
    solved_CD = torch.linalg.solve(left_CC, right_DC.T) if failed else torch.cholesky_solve(right_DC.T, root_CC)
    return solved_CD.T


def _chance_of_wider(sub: SubLayer) -> torch.Tensor:
    """P(width > column j) for every column, [C]."""
    chance_C = torch.zeros(sub.closing_size)
    for share, weight in WEIGHTS.items():
        units = max(1, round(share * sub.width.full))
        chance_C[: sub.closing_size // sub.width.full * units] += weight
    return chance_C


def _of_rank(change_DC: torch.Tensor, gram_CC: torch.Tensor, rank: int) -> torch.Tensor:
    """The change of lower rank that is nearest for inputs with these second moments."""
    root = root_of(gram_CC)
    u, sizes, v = torch.linalg.svd(change_DC @ root, full_matrices=False)
    part = u[:, :rank] * sizes[:rank] @ v[:rank]
    change: torch.Tensor = torch.linalg.solve_triangular(root, part, upper=False, left=False)
    return change
