"""Measure the loss of sub-networks on a text, in nats per token and bits per byte, paired on the same tokens.

Every layer runs for all sub-networks before the next one, so its weights are read once for each batch of blocks.

Shapes: S sub-networks, N blocks, T tokens per block, B blocks in a batch, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from flextron.data.blocks import TokenBlocks, batch_tokens
from flextron.elastic.loss import hidden_states, logits_of
from flextron.elastic.model import ElasticModel
from flextron.elastic.walk import batch_within, walking
from flextron.progress import bar
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
    divergence: float | None = None
    """KL divergence from the original model's predictions, in nats per token; None without an original."""
    divergence_standard_error: float | None = None


def evaluate(
    model: ElasticModel,
    runs: Sequence[Subnet | TokenRun],
    blocks: TokenBlocks,
    *,
    original: ElasticModel | None = None,
    show: bool = False,
) -> list[Evaluation]:
    """Return the loss of each run on the same tokens, compared with the first run.

    A run is a sub-network, or a `TokenRun` with one for every token. `show` prints a progress bar.

    Args:
        original: also measure how far each run's predictions are from this model's. The loss of a trained model falls,
            too, when it gets used to a kind of text; its divergence from the model before training does not.

    Raises:
        SubnetError: a sub-network is not in the model's search space; raised before anything is computed.
        ValueError: `original` has another vocabulary.
    """
    model.check_tokens(blocks.tokens)
    for run in runs:
        if isinstance(run, Subnet):
            model.search_space.check(run)
    if original is not None and original.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the original model has {original.config.vocab_size} tokens, this one {model.config.vocab_size}: "
            "their predictions cannot be compared. Name the model that this one was ranked or trained from."
        )
    tokens_per_byte = blocks.predicted_tokens / blocks.predicted_bytes if blocks.predicted_bytes else math.nan
    losses_SN, divergences_SN = _measured(model, runs, blocks, original, show=show)
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
            divergence=None if original is None else divergence_N.mean().item(),
            divergence_standard_error=None if original is None else _standard_error(divergence_N),
        )
        for run, loss_N, divergence_N in zip(runs, losses_SN, divergences_SN, strict=True)
    ]


@torch.inference_mode()
def _measured(
    model: ElasticModel,
    runs: Sequence[Subnet | TokenRun],
    blocks: TokenBlocks,
    original: ElasticModel | None,
    *,
    show: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each run's loss and divergence from the original on each block, both [S, N] in float64."""
    batches = list(blocks.batches(batch_within(model, states=len(runs), most=batch_tokens(model.device))))
    losses: list[list[torch.Tensor]] = [[] for _ in runs]
    divergences: list[list[torch.Tensor]] = [[] for _ in runs]
    with bar(len(batches) * len(model.layers), description="evaluate", show=show) as advance:
        for tokens_BT in (batch.to(model.device) for batch in batches):
            original_BTD = None if original is None else _whole(original, tokens_BT)
            hidden = _layer_by_layer(model, runs, tokens_BT, advance)
            for row, tokens_T in enumerate(tokens_BT):
                original_TV = None if original_BTD is None else logits_of(original.lm, original_BTD[row])  # type: ignore[union-attr]
                for place, hidden_BTD in enumerate(hidden):
                    logits_TV = logits_of(model.lm, hidden_BTD[row])
                    losses[place].append(_loss(logits_TV, tokens_T))
                    divergences[place].append(_divergence(logits_TV, original_TV))
    return torch.stack([*map(torch.stack, losses)]), torch.stack([*map(torch.stack, divergences)])


def _layer_by_layer(
    model: ElasticModel, runs: Sequence[Subnet | TokenRun], tokens_BT: torch.Tensor, advance: Callable[[], None]
) -> list[torch.Tensor]:
    """Each run's input of the output projection, [B, T, D]; every layer runs for all before the next one."""
    hidden: list[Any] = [None for _ in runs]
    with walking(model) as walk:
        for layer in range(len(model.layers)):
            for place, run in enumerate(runs):
                with model.use(run) if isinstance(run, Subnet) else run.use():
                    hidden[place] = walk.through(layer, tokens_BT, hidden[place])
            advance()
        return [walk.finish(tokens_BT, hidden_BTD) for hidden_BTD in hidden]


def _whole(original: ElasticModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    with original.use(original.search_space.full):
        return hidden_states(original.lm, tokens_BT.to(original.device), None)


def _loss(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:]).double().cpu()


def _divergence(logits_TV: torch.Tensor, original_TV: torch.Tensor | None) -> torch.Tensor:
    """Mean over predicted tokens of KL(original || run), in nats; NaN without an original."""
    if original_TV is None:
        return torch.tensor(math.nan, dtype=torch.float64)
    own, teacher = (logits[:-1].float().log_softmax(-1) for logits in (logits_TV, original_TV.to(logits_TV.device)))
    return F.kl_div(own, teacher, log_target=True, reduction="sum").double().cpu() / len(own)


def _standard_error(values_N: torch.Tensor) -> float:
    return float(values_N.std() / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan
