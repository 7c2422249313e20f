"""Loss of sub-networks on a text: nats per token and bits per byte, paired on the same tokens.

Shapes: N blocks, T tokens a block, B blocks in a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flextron.data import BATCH_TOKENS, TokenBlocks
from flextron.elastic import ElasticModel
from flextron.progress import progress
from flextron.subnet import Subnet


@dataclass(frozen=True)
class Evaluation:
    """Loss of one sub-network on one text; standard errors take blocks as independent, not tokens."""

    subnet: Subnet
    share: float
    """Share of the layers' weights that it keeps."""
    nats_per_token: float
    standard_error: float
    bits_per_byte: float
    difference: float
    """Nats per token above the first sub-network of the same call, paired block by block."""
    difference_standard_error: float
    tokens: int
    """Tokens predicted."""
    text: str


def evaluate(
    model: ElasticModel, subnets: Sequence[Subnet], blocks: TokenBlocks, *, show: bool = False
) -> list[Evaluation]:
    """Loss of each sub-network on the same tokens, compared with the first of them.

    Raises:
        SubnetError: a sub-network that is not in the model's search space; before anything is computed.
    """
    for subnet in subnets:
        model.search_space.check(subnet)
    tokens_per_byte = blocks.predicted_tokens / blocks.predicted_bytes if blocks.predicted_bytes else math.nan
    results: list[Evaluation] = []
    first_N: torch.Tensor | None = None
    for subnet in progress(subnets, "evaluate") if show else subnets:
        with model.use(subnet):
            loss_N = block_losses(model, blocks)
        first_N = loss_N if first_N is None else first_N
        loss = loss_N.mean().item()
        results.append(
            Evaluation(
                subnet=subnet,
                share=model.share(subnet),
                nats_per_token=loss,
                standard_error=_standard_error(loss_N),
                bits_per_byte=loss / math.log(2) * tokens_per_byte,
                difference=(loss_N - first_N).mean().item(),
                difference_standard_error=_standard_error(loss_N - first_N),
                tokens=blocks.predicted_tokens,
                text=blocks.text,
            )
        )
    return results


@torch.inference_mode()
def block_losses(model: ElasticModel, blocks: TokenBlocks) -> torch.Tensor:
    """Mean loss of every block in nats per token, [N] in float64, as the sub-network in use."""
    return torch.cat([_batch_losses(model, tokens_BT) for tokens_BT in blocks.batches(BATCH_TOKENS)])


def _batch_losses(model: ElasticModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean loss of every row in nats per token, [B] in float64."""
    tokens_BT = tokens_BT.to(model.device)
    logits_BTV = model(tokens_BT, use_cache=False).logits
    rows = [
        F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:])
        for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True)
    ]
    return torch.stack(rows).double().cpu()


def _standard_error(values_N: torch.Tensor) -> float:
    return float(values_N.std() / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan
