"""Second moments E[a a^T] of what projections read, and their roots.

Shapes: N tokens, C columns of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from flextron.data.blocks import BATCH_TOKENS, TokenBlocks
from flextron.elastic.loss import body_of
from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection
from flextron.progress import progress

RIDGE = 1e-4
"""Added under the root, as a share of the mean, so that directions that never occur have a weight."""


@torch.inference_mode()
def second_moments(
    model: ElasticModel, modules: Sequence[Projection], blocks: TokenBlocks, *, title: str | None = None
) -> list[torch.Tensor]:
    """Return E[a a^T], [C, C] in float32, of the input of each projection in the full model.

    Args:
        title: of a progress bar; None shows none.
    """
    sums = [torch.zeros(columns, columns, device=model.device) for columns in (m.matrix().shape[1] for m in modules)]
    batches = list(blocks.batches(BATCH_TOKENS))
    with _summed(modules, sums), model.use(model.search_space.full):
        for tokens_BT in progress(batches, title) if title else batches:
            body_of(model.lm)(tokens_BT.to(model.device), use_cache=False)
    return [total / blocks.tokens.numel() for total in sums]


def root_of(moment_CC: torch.Tensor) -> torch.Tensor:
    """The lower triangular root, moment = root root^T, of a second moment with a little ridge."""
    eye = RIDGE * moment_CC.diagonal().mean() * torch.eye(len(moment_CC), device=moment_CC.device)
    root_CC: torch.Tensor = torch.linalg.cholesky((moment_CC + eye).double())
    return root_CC.float()


@contextmanager
def _summed(modules: Sequence[Projection], sums: Sequence[torch.Tensor]) -> Iterator[None]:
    def hook(total_CC: torch.Tensor) -> Any:
        def observe(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            a_NC = inputs[0].flatten(0, -2).float()
            total_CC.addmm_(a_NC.T, a_NC)

        return observe

    with ExitStack() as hooks:
        for module, total_CC in zip(modules, sums, strict=True):
            hooks.callback(module.register_forward_pre_hook(hook(total_CC)).remove)
        yield
