"""Student and teacher as one module, with the training loss of `elastic.loss`.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flextron.config import OptimizerOptions
from flextron.data.blocks import document_end
from flextron.data.corpus import positions
from flextron.elastic.adapters import add_adapters, without_adapters
from flextron.elastic.loss import Losses, hidden_states, losses
from flextron.elastic.model import ElasticModel
from flextron.errors import FlextronError


class Distiller(nn.Module):
    """Student and teacher as one module, so that one forward pass is all that a training step or sharding sees.

    `teacher` is a model of its own, or None where the loss is the text's alone. `original`, for adapters, is a context
    in which the student computes as it did before training: then it teaches itself, without a second copy.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        text_weight: float = 0.0,
        document_end: int | None = None,
        original: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else Reader(teacher)
        self.text_weight = text_weight
        self.document_end = document_end
        self.original = original

    def forward(self, tokens_BT: torch.Tensor, *, held_out: bool = False) -> Losses:
        """Losses of the student, as the sub-network in use; `held_out` gives cross-entropy alone, as `evaluate`."""
        if held_out:
            return losses(self.student, hidden_states(self.student, tokens_BT, None), tokens_BT, text_weight=1.0)
        positions_BT = self._positions(tokens_BT)
        teacher, taught_BTD = self._taught(tokens_BT, positions_BT)
        return losses(
            self.student,
            hidden_states(self.student, tokens_BT, positions_BT),
            tokens_BT,
            teacher=teacher,
            teacher_hidden_BTD=taught_BTD,
            text_weight=self.text_weight,
        )

    def _positions(self, tokens_BT: torch.Tensor) -> torch.Tensor | None:
        """Positions inside documents; None where every row is one document, which attention computes faster."""
        if self.document_end is None or not (tokens_BT[:, :-1] == self.document_end).any():
            return None
        return positions(tokens_BT, self.document_end)

    @torch.no_grad()
    def _taught(
        self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None
    ) -> tuple[PreTrainedModel | None, torch.Tensor | None]:
        if self.teacher is not None:
            return self.teacher.lm, self.teacher(tokens_BT, positions_BT)
        if self.original is None:
            return None, None
        with self.original():
            return self.student, hidden_states(self.student, tokens_BT, positions_BT)


class Reader(nn.Module):
    """A model up to its output projection."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
        """As `hidden_states`."""
        return hidden_states(self.lm, tokens_BT, positions_BT)


def make_distiller(model: ElasticModel, options: OptimizerOptions, dtype: torch.dtype, *, seed: int) -> Distiller:
    """Student and teacher, with gradients where they are asked for; what is trained is fp32.

    Args:
        dtype: type of the arithmetic, in which a teacher's weights are kept.
        seed: of adapters.

    Raises:
        FlextronError: a teacher with another vocabulary, or adapters without peft.
    """
    end = document_end(model.tokenizer) if model.tokenizer is not None else None
    teaches_itself = options.lora_rank > 0 and options.teacher is None
    teacher = None if options.text_weight == 1 or teaches_itself else _teacher(model, options, dtype)
    original = None
    model.lm.eval()  # no dropout: it would add noise to a comparison with a teacher that has none
    if not options.lora_rank or dtype == torch.float32:
        model.lm.float()
    if options.lora_rank:
        torch.manual_seed(seed)
        add_adapters(model, rank=options.lora_rank)

        @contextmanager
        def original() -> Iterator[None]:
            with without_adapters(model), model.use(model.search_space.full):
                yield

    for embedding in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings()):
        embedding.requires_grad_(options.train_embeddings)
    if options.gradient_checkpointing:
        enable = getattr(model.lm, "activation_checkpointing_enable", model.lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        for layer in model.layers:  # transformers checkpoints a layer only where it trains; its dropouts stay off
            layer.module.training = True
    return Distiller(
        model.lm,
        teacher,
        text_weight=options.text_weight,
        document_end=end,
        original=original if teaches_itself and options.text_weight < 1 else None,
    )


def _teacher(model: ElasticModel, options: OptimizerOptions, dtype: torch.dtype) -> Any:
    """A frozen model in the type of the arithmetic: the one named, or a copy of this one at full width."""
    if options.teacher is None:
        with model.use(model.search_space.full):
            lm = copy.deepcopy(model.lm)
    else:
        lm = ElasticModel.from_pretrained(options.teacher, device=model.device).lm
        check_teacher(lm.config, model.config, options.teacher)
    return lm.to(dtype).eval().requires_grad_(False)


def check_teacher(teacher: Any, student: Any, name: str) -> None:
    """Pass if two configs have vocabularies of one size.

    Raises:
        FlextronError: they have not.
    """
    if teacher.vocab_size != student.vocab_size:
        raise FlextronError(
            f"the teacher {name} has a vocabulary of {teacher.vocab_size}, the model one of {student.vocab_size}. "
            "A teacher must share the model's tokenizer."
        )
