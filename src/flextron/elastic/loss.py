"""The training loss, from hidden states, in chunks: the logits of a whole batch never exist.

Shapes: B batch, T time, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once: 50 MB in fp32 for a vocabulary of 49,152."""
CHUNK_TOKENS_OF_A_GPU = 2048
"""The same on a GPU, which small products leave idle."""


@dataclass(frozen=True)
class Losses:
    """Sums over the predicted tokens of a batch; `total` carries the gradient, the others are for the record."""

    total: torch.Tensor
    """(1 - text_weight) x divergence + text_weight x cross_entropy, in nats, summed."""
    divergence: torch.Tensor
    """Forward KL from the teacher's predictions, in nats, summed."""
    cross_entropy: torch.Tensor
    """To the text, in nats, summed."""


def hidden_states(lm: PreTrainedModel, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
    """What the output projection reads, [B, T, D]; attention stays inside documents where their positions are given."""
    hidden_BTD: torch.Tensor = lm.base_model(
        input_ids=tokens_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTD


def logits_of(lm: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states, as the model's own forward pass computes them: Granite scales, Gemma 2 caps."""
    logits: torch.Tensor = lm.get_output_embeddings()(hidden) / getattr(lm.config, "logits_scaling", 1)
    cap = getattr(lm.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def losses(
    student: PreTrainedModel,
    hidden_BTD: torch.Tensor,
    tokens_BT: torch.Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    teacher_hidden_BTD: torch.Tensor | None = None,
    text_weight: float = 0.0,
) -> Losses:
    """Distillation from a teacher, cross-entropy to the text, or a mix, summed over predicted tokens.

    Forward KL on logits, sum_v p_teacher log(p_teacher / p_student); no temperature. Gradients are computed chunk by
    chunk in the forward pass, so that the backward pass holds hidden states only.

    Args:
        hidden_BTD: from `hidden_states` of the student; all but each row's last predict the token that follows.
        text_weight: share of cross-entropy; 1 needs no teacher.
    """
    read = hidden_BTD[:, :-1].flatten(0, 1)
    taught = None if teacher_hidden_BTD is None else teacher_hidden_BTD[:, :-1].flatten(0, 1)
    head = [p for p in student.get_output_embeddings().parameters() if p.requires_grad]
    total, divergence, cross_entropy = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        read, tokens_BT[:, 1:].flatten(), student, teacher, taught, text_weight, *head
    )
    return Losses(total, divergence, cross_entropy)


class _ChunkedLoss(torch.autograd.Function):
    """The gradient is computed beside the loss, so that no chunk is computed twice and none is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        labels_N: torch.Tensor,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        teacher_hidden_ND: torch.Tensor | None,
        text_weight: float,
        *head: nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        gradients = [torch.zeros_like(hidden_ND)] if wanted else []
        if wanted:  # a head's is summed over all chunks, which 16 bits are too coarse for
            gradients += [torch.zeros_like(p, dtype=torch.float32) for p in head]
        sums = hidden_ND.new_zeros(3, dtype=torch.float32)
        for place in _chunks(labels_N):
            with torch.set_grad_enabled(wanted):
                hidden_CD = hidden_ND[place].detach().requires_grad_(wanted)
                logits_CV = logits_of(student, hidden_CD)
            taught_CV = None
            if teacher is not None and teacher_hidden_ND is not None:
                taught_CV = logits_of(teacher, teacher_hidden_ND[place]).float().log_softmax(-1)
            chunk_sums, slope_CV = _losses_and_slope(logits_CV.detach(), taught_CV, labels_N[place], text_weight)
            sums += chunk_sums
            if not wanted:
                continue
            of_chunk = torch.autograd.grad(logits_CV, [hidden_CD, *head], slope_CV.to(logits_CV.dtype))
            gradients[0][place] = of_chunk[0]
            for gradient, more in zip(gradients[1:], of_chunk[1:], strict=True):
                gradient += more
        ctx.save_for_backward(*gradients)
        total, divergence, cross_entropy = (sum_.clone() for sum_ in sums)
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return total, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, *head = (gradient * of_outputs[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (hidden, None, None, None, None, None, *head)


def _losses_and_slope(
    logits_CV: torch.Tensor, taught_CV: torch.Tensor | None, labels_C: torch.Tensor, text_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of total, divergence and cross-entropy, [3], and the slope of the total in each logit, [C, V].

    Of both losses it is p - target: the teacher's probabilities, or 1 at the token that follows.
    """
    log_p_CV = logits_CV.float().log_softmax(-1)
    cross_entropy = F.nll_loss(log_p_CV, labels_C, reduction="sum")
    divergence = torch.zeros_like(cross_entropy)
    if taught_CV is None:
        text_weight = 1.0
    else:
        target_CV = taught_CV.exp()
        divergence = torch.linalg.vecdot(target_CV, taught_CV - log_p_CV).sum()
    slope_CV = log_p_CV.exp_()
    if taught_CV is not None:
        slope_CV -= target_CV.mul_(1 - text_weight)
    slope_CV[torch.arange(len(labels_C)), labels_C] -= text_weight
    total = (1 - text_weight) * divergence + text_weight * cross_entropy
    return torch.stack([total, divergence, cross_entropy]), slope_CV


def _chunks(labels_N: torch.Tensor) -> Iterator[slice]:
    size = CHUNK_TOKENS_OF_A_GPU if labels_N.is_cuda else CHUNK_TOKENS
    return (slice(start, min(start + size, len(labels_N))) for start in range(0, len(labels_N), size))
