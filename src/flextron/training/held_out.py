"""Held-out losses of the watched sub-networks: before, in the course of, and after a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from flextron.choosing.choice import choose
from flextron.config import TrainConfig
from flextron.data.blocks import TokenBlocks, load_blocks
from flextron.elastic.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import Subnet
from flextron.training.distillation import Distiller
from flextron.training.sampling import even_sensitivity

BATCH_TOKENS = 2048
WORSE_NATS = 0.01
"""Rise of the full model's held-out loss that is worth a warning."""


class HeldOut:
    """The text and the sub-networks whose loss is watched, and their losses before training."""

    def __init__(self, model: ElasticModel, config: TrainConfig, sensitivity: Sensitivity | None) -> None:
        """Choose the sub-networks and read the text.

        Raises:
            FlextronError: a sub-network that the model does not have, or a text that cannot be read.
        """
        measured = sensitivity or even_sensitivity(model)
        self.model = model
        self.watched = {wish: choose(model, wish, sensitivity=measured) for wish in config.watch.evaluate_on}
        self.before: dict[str, float] = {}
        """Nats per token of each watched sub-network before training; empty until they are measured."""
        self._times = config.watch.evaluations
        self._text: list[Any] = [config.watch.evaluate_text, config.watch.evaluate_tokens]
        self._blocks = self._load(config)

    def _load(self, config: TrainConfig) -> TokenBlocks | None:
        watch = config.watch
        if not watch.evaluate_tokens or not self.watched:
            return None
        block_tokens = min(config.text.block_tokens, watch.evaluate_tokens)
        return load_blocks(
            self.model.tokenizer, watch.evaluate_text, tokens=watch.evaluate_tokens, block_tokens=block_tokens
        )

    def is_due(self, step: int, steps: int) -> bool:
        """Whether losses are measured after this step: as often as the config says, the last time at the end."""
        return step * self._times // steps > (step - 1) * self._times // steps

    @torch.no_grad()
    def measure(self, distiller: Distiller, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """Nats per token of each watched sub-network; empty where nothing is watched.

        Every process takes the same batches: sharded layers need all of them in every pass.
        """
        if self._blocks is None:
            return {}
        return {wish: self._loss(subnet, self._blocks, distiller, autocast) for wish, subnet in self.watched.items()}

    def _loss(
        self,
        subnet: Subnet,
        blocks: TokenBlocks,
        distiller: Distiller,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> float:
        sum_ = 0.0
        for tokens_BT in blocks.batches(BATCH_TOKENS):
            with self.model.use(subnet), autocast():
                losses = distiller(tokens_BT.to(self.model.device), held_out=True)
            sum_ += losses.cross_entropy.item()
        return sum_ / blocks.predicted_tokens

    def compare(self, losses: dict[str, float], *, step: int, steps: int) -> Iterator[str]:
        """Lines that tell the losses after a step and how they have changed."""
        changes = {wish: loss - self.before[wish] for wish, loss in losses.items() if wish in self.before}
        told = [
            f"{wish} {loss:.3f}" + (f" ({changes[wish]:+.3f})" if wish in changes else "")
            for wish, loss in losses.items()
        ]
        yield f"step {step} of {steps}, held-out nats per token (change): {', '.join(told)}"
        if changes.get("full", 0) > WORSE_NATS:
            yield (
                f"warning: the full model has become worse by {changes['full']:.3f}. It recovers in part as the "
                "learning rate falls; if not, lower --learning-rate or give the first of --visits more weight."
            )

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run needs, as JSON."""
        return {"before": self.before, "held_out": self._text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the losses before training, if they are of the same text."""
        self.before = state["before"] if state["held_out"] == self._text else {}


def summary(metrics: Sequence[dict[str, Any]], tokens: int, before: dict[str, float]) -> str:
    """What a run did, from its metrics: duration, and a table of held-out losses before and after."""
    seconds = sum(record.get("seconds", 0.0) for record in metrics)
    duration = f"{seconds / 60:.1f} minutes" if seconds > 100 else f"{seconds:.0f} s"
    lines = [f"trained on {tokens} tokens in {duration}"]
    rows = [record["held_out"] for record in metrics if "held_out" in record]
    if rows:
        lines.append(f"{'held-out nats per token':<28}{'before':>9}{'after':>9}{'change':>9}")
        for wish, after in rows[-1].items():
            first = before.get(wish, math.nan)
            lines.append(f"{wish:<28}{first:>9.3f}{after:>9.3f}{after - first:>+9.3f}")
    return "\n".join(lines)
