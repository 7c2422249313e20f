"""Ablation without a surrogate: train the static router through the LLM, with the same compute.

    python benchmarks/no_surrogate.py out/trained --phase prefill --out no-surrogate/

The router, its start and the Gumbel-softmax are those of the usual training. But each step is a forward and a backward
pass of the frozen LLM, in which all parts run and each is multiplied by the router's choice, 1 or 0. A step costs about
four forward passes, so the number of steps is a quarter of the sub-networks that the usual router measures, on as many
tokens each. It writes the answer to each budget as a file for `flextron evaluate --subnet`.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from flextron import ElasticModel
from flextron.atomic import write_text
from flextron.costs.pricing import Ceiling
from flextron.costs.saved import find_table
from flextron.costs.timing import PHASES
from flextron.data.blocks import TokenBlocks
from flextron.elastic.checkpoint import quiet_transformers
from flextron.elastic.layers import SubLayer
from flextron.elastic.loss import hidden_states, losses
from flextron.environment import faster_dtype
from flextron.inference.per_token import Forward, masked_parts, running
from flextron.progress import bar
from flextron.routers.static.learning import BATCH, LAST_STEPS, LEARNING_RATE, STEPS, optimise
from flextron.routers.static.making import sensitivity_of, unused_blocks
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.router import route_along

PASSES_PER_STEP = 4
"""Cost of a step in forward passes: one of the teacher, one of the student, and two for the backward pass."""


@dataclass(frozen=True)
class Settings:
    """Train a router through the LLM."""

    model: Positional[str]
    """Folder of an elastic checkpoint with sensitivities and a latency table."""
    out: Path
    """Folder for the answers, one file for each budget."""
    phase: Literal["prefill", "decode"] = "decode"
    """Phase whose time the budgets limit."""
    budgets: tuple[float, ...] = (0.8, 0.6, 0.5)
    """Budgets, as fractions of the full model's time."""
    text: str = "sample/train"
    """Text to train on, without the documents that the model was ranked on."""
    tokens: int = 512
    """Number of tokens on which the usual router measures each sub-network."""
    evaluations: int = 256
    """Number of sub-networks that the usual router measures."""
    lowest: float = 0.45
    """Lowest budget to train for."""
    learning_rate: float | None = None
    """By default the usual router's, scaled up for the fewer steps so that their sum stays the same."""
    seed: int = 0
    """Seed of the budgets and the noise."""
    any_device: bool = False
    """Whether to use a latency table of another device or version."""
    device: str = "auto"
    """Device to run on; auto uses a GPU if there is one."""


class ThroughTheModel:
    """Computes losses of choices with the LLM: half against the text, half against the full model's predictions.

    Shapes: B rows of text, each with its own choices; S sub-layers, K choices, U units.
    """

    def __init__(self, model: ElasticModel, blocks: TokenBlocks, advance: Any) -> None:
        self.model, self.advance = model, advance
        self.rows = itertools.cycle(blocks.tokens)
        model.lm.requires_grad_(False).eval()

    def __call__(self, choices_BSK: torch.Tensor) -> torch.Tensor:
        """Return the mean nats per token of all rows, a scalar whose gradient reaches each row's choices."""
        lm = self.model.lm
        tokens_BT = torch.stack(list(itertools.islice(self.rows, len(choices_BSK)))).to(self.model.device)
        needed_BSK = choices_BSK.flip(-1).cumsum(-1).flip(-1)  # a block of units runs if the choice is at least as wide
        layers = self.model.search_space.layers
        runs = [
            (
                self._run(layer.mlp, "neurons", needed_BSK[:, i]),
                self._run(layer.attention, "kv_groups", needed_BSK[:, layers + i]),
            )
            for i, layer in enumerate(self.model.layers)
        ]
        arithmetic = faster_dtype(self.model.device)
        casts = torch.autocast(self.model.device.type, arithmetic, enabled=arithmetic != torch.float32)
        with casts:
            with torch.no_grad():
                taught_BTD = hidden_states(lm, tokens_BT, None)
            with running(self.model, runs):
                hidden_BTD = hidden_states(lm, tokens_BT, None)
            found = losses(lm, hidden_BTD, tokens_BT, teacher=lm, teacher_hidden_BTD=taught_BTD, text_weight=0.5)
        self.advance()
        return found.total / tokens_BT[:, 1:].numel()

    def _run(self, sub: SubLayer, axis: str, needed_BK: torch.Tensor) -> Forward:
        sizes = np.diff(getattr(self.model.search_space, axis), prepend=0)
        per_unit = sub.heads_per_unit if axis == "kv_groups" else 1
        repeats = torch.tensor(sizes * per_unit, device=self.model.device)
        mask_B1U = needed_BK.to(self.model.device)[:, : len(sizes)].repeat_interleave(repeats, -1)[:, None]

        def run(forward: Forward, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return masked_parts(sub, forward, mask_B1U.to(hidden_BTD.dtype), hidden_BTD, *args, **kwargs)

        return run


def main(settings: Settings) -> None:
    """Train the router, and write its answers."""
    quiet_transformers()
    model = ElasticModel.from_pretrained(settings.model, device=settings.device)
    table = find_table(model, settings.model, PHASES[settings.phase], foreign=settings.any_device)
    sensitivity = sensitivity_of(model, settings.model)
    steps = settings.evaluations // PASSES_PER_STEP
    blocks, _ = unused_blocks(model, sensitivity, settings.text, tokens=steps * settings.tokens)
    rows = max(1, settings.tokens // blocks.tokens.shape[1])
    router = StaticRouter.of(sensitivity, table, lowest=settings.lowest)
    rate = settings.learning_rate or LEARNING_RATE * LAST_STEPS * STEPS / steps
    start = time.monotonic()
    with bar(steps, description="router through the LLM", show=True) as advance:
        through = ThroughTheModel(model, blocks, advance)
        optimise(router, through, seed=settings.seed, steps=steps, batch=rows, learning_rate=rate)
    print(f"{steps} steps at {rate:.3f} in {time.monotonic() - start:.0f} s (with a surrogate: {STEPS} of {BATCH})")
    settings.out.mkdir(parents=True, exist_ok=True)
    for budget in settings.budgets:
        subnet = route_along(router, table.search_space, [Ceiling(table, budget * table.full, f"{budget}x")])
        write_text(settings.out / f"{budget}x.json", subnet.to_json() + "\n")
        print(f"{budget}x: {table.price(subnet) / table.full:.3f}x of the full model's time")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
