"""Second moments E[a a^T] of what projections read, and their roots.

Shapes: N tokens, C columns of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from flextron.data.blocks import BATCH_TOKENS, TokenBlocks
from flextron.elastic.layers import ElasticLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection
from flextron.elastic.walk import walking
from flextron.progress import progress

RIDGE = 1e-4
"""Added under the root, as a share of the mean, so that directions that never occur have a weight."""


def second_moments(
    model: ElasticModel,
    projections: Callable[[ElasticLayer], Sequence[Projection]],
    blocks: TokenBlocks,
    *,
    title: str | None = None,
) -> Generator[list[torch.Tensor], None, None]:
    """Yield, layer by layer, E[a a^T], [C, C] in float32, of the input of a layer's projections in the full model.

    The caller may change a layer's weights when it gets its moments: the layers above read what it gave before. Close
    the generator if you do not take all layers: until then the model runs layer by layer only.

    Args:
        projections: which ones to measure in a layer.
        title: of a progress bar; None shows none.
    """
    batches = list(blocks.batches(BATCH_TOKENS))
    hidden: list[torch.Tensor | None] = [None for _ in batches]
    with walking(model) as walk, model.use(model.search_space.full):
        for index, layer in enumerate(progress(model.layers, title) if title else model.layers):
            modules = projections(layer)
            sums = [torch.zeros(m.matrix().shape[1], m.matrix().shape[1], device=model.device) for m in modules]
            with _summed(modules, sums), torch.inference_mode():
                for place, tokens_BT in enumerate(batches):
                    hidden[place] = walk.through(index, tokens_BT, hidden[place])
            yield [total.div_(blocks.tokens.numel()) for total in sums]


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
