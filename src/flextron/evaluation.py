"""Measure the loss of sub-networks on a text, in nats per token and bits per byte, paired on the same tokens.

Shapes: S sub-networks, N blocks, T tokens per block, B blocks in a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from flextron.data.blocks import TokenBlocks, batch_tokens
from flextron.elastic.model import ElasticModel
from flextron.progress import progress
from flextron.subnet import Subnet


class TokenRun(Protocol):
    """A run with a sub-network for every token, for example `routers.token.batch.TokenRouting`."""

    def use(self) -> AbstractContextManager[Any]:
        """Return a context in which the model chooses a sub-network for every token."""

    @property
    def share(self) -> float:
        """Mean share of the layers' weights that tokens have used, 0 to 1."""


@dataclass(frozen=True)
class Evaluation:
    """Loss of one sub-network on one text; standard errors treat blocks, not tokens, as independent."""

    subnet: Subnet | None
    """The sub-network, or None if every token had its own."""
    share: float
    """Share of the layers' weights that it keeps, or that its tokens used on average, 0 to 1."""
    nats_per_token: float
    standard_error: float
    bits_per_byte: float
    difference: float
    """Nats per token above the first run of the same call, paired by block."""
    difference_standard_error: float
    tokens: int
    """Number of predicted tokens."""
    text: str
    blocks: tuple[float, ...]
    """Nats per token of every block, for pairing with another checkpoint on the same text."""


def evaluate(
    model: ElasticModel, runs: Sequence[Subnet | TokenRun], blocks: TokenBlocks, *, show: bool = False
) -> list[Evaluation]:
    """Return the loss of each run on the same tokens, compared with the first run.

    A run is a sub-network, or a `TokenRun` with one for every token. `show` prints a progress bar.

    Raises:
        SubnetError: a sub-network is not in the model's search space; raised before anything is computed.
    """
    for run in runs:
        if isinstance(run, Subnet):
            model.search_space.check(run)
    tokens_per_byte = blocks.predicted_tokens / blocks.predicted_bytes if blocks.predicted_bytes else math.nan
    work = [(run, tokens_BT) for run in runs for tokens_BT in blocks.batches(batch_tokens(model.device))]
    losses = [_losses(model, *item) for item in (progress(work, "evaluate") if show else work)]
    losses_SN = torch.cat(losses).view(len(runs), -1)
    return [
        Evaluation(
            subnet=run if isinstance(run, Subnet) else None,
            share=model.share(run) if isinstance(run, Subnet) else run.share,
            nats_per_token=loss_N.mean().item(),
            standard_error=_standard_error(loss_N),
            bits_per_byte=loss_N.mean().item() / math.log(2) * tokens_per_byte,
            difference=(loss_N - losses_SN[0]).mean().item(),
            difference_standard_error=_standard_error(loss_N - losses_SN[0]),
            tokens=blocks.predicted_tokens,
            text=blocks.text,
            blocks=tuple(loss_N.tolist()),
        )
        for run, loss_N in zip(runs, losses_SN, strict=True)
    ]


@torch.inference_mode()
def _losses(model: ElasticModel, run: Subnet | TokenRun, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of every row in nats per token, [B] in float64."""
    tokens_BT = tokens_BT.to(model.device)
    with model.use(run) if isinstance(run, Subnet) else run.use():
        logits_BTV = model(tokens_BT, use_cache=False).logits
    rows = [
        F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:])
        for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True)
    ]
    return torch.stack(rows).double().cpu()


def _standard_error(values_N: torch.Tensor) -> float:
    return float(values_N.std() / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan
