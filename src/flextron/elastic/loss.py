"""The training loss, computed from hidden states in chunks, so that the logits of a whole batch never exist.

Shapes: B batch, T time, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

CHUNK_TOKENS = 256
"""Number of tokens whose logits exist at once: 50 MB in fp32 for a vocabulary of 49,152."""
_NEVER = -1e4
"""Logit of a word that the teacher does not have; its probability is 0, and 0 times the difference stays 0."""
CHUNK_TOKENS_OF_A_GPU = 2048
"""The same on a GPU, which small matrices leave idle."""


@dataclass(frozen=True)
class Losses:
    """Sums over the predicted tokens of a batch. Only `total` has a gradient; the others are for logging."""

    total: torch.Tensor
    """(1 - text_weight) x divergence + text_weight x cross_entropy, in nats."""
    divergence: torch.Tensor
    """Forward KL from the teacher's predictions, in nats."""
    cross_entropy: torch.Tensor
    """Cross-entropy to the text, in nats."""


def body_of(lm: PreTrainedModel) -> Any:
    """The model below the output projection. Llama 4's `base_model` is the whole model."""
    return lm.model if lm.base_model is lm else lm.base_model


def hidden_states(lm: PreTrainedModel, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
    """The input of the output projection, [B, T, D]. With `positions_BT`, attention stays inside documents."""
    hidden_BTD: torch.Tensor = body_of(lm)(
        input_ids=tokens_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTD


def logits_of(lm: PreTrainedModel, hidden: torch.Tensor, head: Callable[..., Any] | None = None) -> torch.Tensor:
    """Logits of hidden states, as the model's own forward pass computes them.

    Granite divides them, Cohere and HyperCLOVA X multiply them, Gemma 2 and nanochat cap them. The contract holds this
    against the model's own logits for every family.

    Args:
        head: computes the output projection; by default the model's own module.
    """
    config = lm.config
    scale = getattr(config, "logits_scaling", None) or 1
    scale = scale if config.model_type == "hyperclovax" else 1 / scale
    scale *= getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1
    logits: torch.Tensor = (head or lm.get_output_embeddings())(hidden)
    logits = logits if scale == 1 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
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
    """Compute distillation from a teacher, cross-entropy to the text, or a mix, summed over predicted tokens.

    Distillation is forward KL on logits, sum_v p_teacher log(p_teacher / p_student), without temperature. The forward
    pass computes gradients chunk by chunk, so the backward pass holds only hidden states.

    Args:
        hidden_BTD: from `hidden_states` of the student. All but the last of each row predict the next token.
        text_weight: share of cross-entropy, 0 to 1. 1 needs no teacher.
    """
    read = hidden_BTD[:, :-1].flatten(0, 1)
    taught = None if teacher_hidden_BTD is None else teacher_hidden_BTD[:, :-1].flatten(0, 1)
    head = [p for p in student.get_output_embeddings().parameters() if p.requires_grad]
    total, divergence, cross_entropy = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        read, tokens_BT[:, 1:].flatten(), student, teacher, taught, text_weight, *head
    )
    return Losses(total, divergence, cross_entropy)


class _ChunkedLoss(torch.autograd.Function):
    """Compute the gradient together with the loss, so that no chunk is computed twice and none is kept."""

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
        if wanted:  # the head's gradient is summed over all chunks; 16 bits are too coarse for that
            gradients += [torch.zeros_like(p, dtype=torch.float32) for p in head]
        sums = hidden_ND.new_zeros(3, dtype=torch.float32)
        for place in _chunks(labels_N):
            with torch.set_grad_enabled(wanted):
                hidden_CD = hidden_ND[place].detach().requires_grad_(wanted)
                logits_CV = logits_of(student, hidden_CD)
            taught_CV = None
            if teacher is not None and teacher_hidden_ND is not None:
                taught_CV = _in_rows(logits_of(teacher, teacher_hidden_ND[place]), logits_CV.shape[-1])
                taught_CV = taught_CV.float().log_softmax(-1)
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


def _in_rows(logits_CV: torch.Tensor, rows: int) -> torch.Tensor:
    """Logits of as many words as the student has; what one has more is padding, which no token points at."""
    if logits_CV.shape[-1] >= rows:
        return logits_CV[..., :rows]
    return F.pad(logits_CV, (0, rows - logits_CV.shape[-1]), value=_NEVER)


def _losses_and_slope(
    logits_CV: torch.Tensor, taught_CV: torch.Tensor | None, labels_C: torch.Tensor, text_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of total, divergence and cross-entropy, [3], and the gradient of the total by logits, [C, V].

    For both losses that gradient is p - target, where the target is the teacher's p, or 1 at the next token.
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
