"""Held-out losses of the watched sub-networks before, during and after a training run."""

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
"""A warning is printed when the full model's held-out loss rises by more than this."""


class HeldOut:
    """The watched sub-networks, the held-out text, and the losses before training."""

    def __init__(self, model: ElasticModel, config: TrainConfig, sensitivity: Sensitivity | None) -> None:
        """Choose the sub-networks and read the text.

        Raises:
            FlextronError: the model does not have a sub-network, or the text cannot be read.
        """
        measured = sensitivity or even_sensitivity(model)
        self.model = model
        self.watched = {name: choose(model, name, sensitivity=measured) for name in config.watch.evaluate_on}
        self.before: dict[str, float] = {}
        """Nats per token of each watched sub-network before training; empty until measured."""
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
        """Return whether to measure after this step: `evaluations` times, spread evenly, the last at the end."""
        return step * self._times // steps > (step - 1) * self._times // steps

    @torch.no_grad()
    def measure(self, distiller: Distiller, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """Return nats per token of each watched sub-network; empty if nothing is watched.

        Every process runs the same batches, because sharded layers need all processes in every pass.
        """
        if self._blocks is None:
            return {}
        return {name: self._loss(subnet, self._blocks, distiller, autocast) for name, subnet in self.watched.items()}

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
        """Yield lines with the losses after a step and their change since before training."""
        changes = {name: loss - self.before[name] for name, loss in losses.items() if name in self.before}
        told = [
            f"{name} {loss:.3f}" + (f" ({changes[name]:+.3f})" if name in changes else "")
            for name, loss in losses.items()
        ]
        yield f"step {step} of {steps}, held-out nats per token (change): {', '.join(told)}"
        if changes.get("full", 0) > WORSE_NATS:
            yield (
                f"warning: the full model's loss has risen by {changes['full']:.3f}. It should recover in part as the "
                "learning rate falls. If not, lower --learning-rate or give the first of --visits more weight."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an interrupted run needs, as JSON values."""
        return {"before": self.before, "held_out": self._text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the losses before training, if they were measured on the same text."""
        self.before = state["before"] if state["held_out"] == self._text else {}


def summary(metrics: Sequence[dict[str, Any]], tokens: int, before: dict[str, float]) -> str:
    """Return the summary of a run: its duration, and a table of held-out losses before and after."""
    seconds = sum(record.get("seconds", 0.0) for record in metrics)
    duration = f"{seconds / 60:.1f} minutes" if seconds > 100 else f"{seconds:.0f} s"
    lines = [f"trained on {tokens} tokens in {duration}"]
    rows = [record["held_out"] for record in metrics if "held_out" in record]
    if rows:
        lines.append(f"{'held-out nats per token':<28}{'before':>9}{'after':>9}{'change':>9}")
        for name, after in rows[-1].items():
            first = before.get(name, math.nan)
            lines.append(f"{name:<28}{first:>9.3f}{after:>9.3f}{after - first:>+9.3f}")
    return "\n".join(lines)
