"""Student and teacher in one module, with the training loss of `elastic.loss`.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flextron.config import OptimizerOptions
from flextron.data.blocks import document_end
from flextron.data.corpus import positions
from flextron.elastic.adapters import adapters_from, add_adapters, without_adapters
from flextron.elastic.loss import Losses, hidden_states, losses
from flextron.elastic.model import ElasticModel, cast
from flextron.elastic.pack import LowRank
from flextron.errors import FlextronError
from flextron.model import ElasticModel as PublicModel


class Distiller(nn.Module):
    """Student and teacher in one module: a training step is one forward pass, and sharding handles one module.

    `teacher` is a separate model, or None. `original` is for adapters: a context in which the student computes as it
    did before training, so that it teaches itself without a second copy. If both are None, only the text's
    cross-entropy is trained.
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
        """Return the losses of the student as the sub-network in use; `held_out` gives cross-entropy alone.

        Held-out losses equal those of `evaluate`.
        """
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
        """Return positions inside documents, or None if every row is one document, because attention is faster then."""
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
    """A model without its output projection."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
        """Return the last hidden states, [B, T, D], as `hidden_states` does."""
        return hidden_states(self.lm, tokens_BT, positions_BT)


def make_distiller(
    model: ElasticModel,
    options: OptimizerOptions,
    dtype: torch.dtype,
    *,
    seed: int,
    open_teacher: Callable[[str], ElasticModel] | None = None,
    changes: Mapping[str, LowRank] | None = None,
) -> Distiller:
    """Return student and teacher; trained weights are fp32, all others are frozen.

    Args:
        dtype: dtype of the arithmetic and of the teacher's weights.
        seed: seed of the adapters' first weights.
        open_teacher: loads the teacher that `options` name; by default whole, onto the model's device.
        changes: of the pack that made the model, which become the adapters (`--train-pack`); None for new ones.

    Raises:
        FlextronError: the teacher has another vocabulary, or adapters are asked for and peft is not installed.
    """
    end = document_end(model.tokenizer) if model.tokenizer is not None else None
    teaches_itself = options.adapters and options.teacher is None
    open_teacher = open_teacher or (lambda path: PublicModel.from_pretrained(path, device=model.device))
    teacher = None if options.text_weight == 1 or teaches_itself else _teacher(model, options, dtype, open_teacher)
    original = None
    model.lm.eval()  # no dropout: the teacher has none, so it would only add noise
    if not options.adapters or dtype == torch.float32:
        cast(model.lm, torch.float32)
    if options.adapters:
        if changes is None:
            add_adapters(model, rank=options.lora_rank, seed=seed)
        else:
            adapters_from(model, changes)

        @contextmanager
        def original() -> Iterator[None]:
            with without_adapters(model), model.use(model.search_space.full):
                yield

    for embedding in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings()):
        embedding.requires_grad_(options.train_embeddings)
    if options.gradient_checkpointing:
        enable = getattr(model.lm, "activation_checkpointing_enable", model.lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        for layer in model.layers:  # transformers checkpoints only layers in training mode; dropouts stay off
            layer.module.training = True
    return Distiller(
        model.lm,
        teacher,
        text_weight=options.text_weight,
        document_end=end,
        original=original if teaches_itself and options.text_weight < 1 else None,
    )


def _teacher(
    model: ElasticModel, options: OptimizerOptions, dtype: torch.dtype, open_teacher: Callable[[str], ElasticModel]
) -> Any:
    """Return a frozen model in `dtype`: the one that `options` name, or a copy of this one at full width."""
    if options.teacher is None:
        with model.use(model.search_space.full):
            lm = copy.deepcopy(model.lm)
    else:
        teacher = open_teacher(options.teacher)
        check_teacher(teacher, model, options.teacher)
        lm = teacher.lm
    return cast(lm, dtype).eval().requires_grad_(False)


def check_teacher(teacher: ElasticModel, student: ElasticModel, name: str) -> None:
    """Pass if two models have the same tokens; one may have more rows of padding, which no token points at.

    Raises:
        FlextronError: they have other tokens, or other numbers of rows and no tokenizers that tell.
    """
    rows = teacher.config.vocab_size, student.config.vocab_size
    if rows[0] == rows[1]:
        return
    sizes = f"the teacher {name} has a vocabulary of {rows[0]}, the model one of {rows[1]}"
    if teacher.tokenizer is None or student.tokenizer is None:
        raise FlextronError(f"{sizes}, and no tokenizer tells whether their tokens are the same. Add the tokenizers.")
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise FlextronError(f"{sizes}, and their tokens differ. A teacher must share the model's tokenizer.")
