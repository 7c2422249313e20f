"""Run a model layer by layer: all batches, or all sub-networks, pass one layer before any of them passes the next.

So a layer's weights, and statistics of what it reads, are needed only while its turn lasts. Between layers nothing but
hidden states is kept. The model's own forward pass runs once for each layer, and all other layers return the hidden
state instead of computing. So masks, positions and norms are the family's own.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flextron.elastic.loss import body_of
from flextron.elastic.model import ElasticModel

STATE_BYTES = 5e8
"""Memory for the hidden states of all sub-networks that wait between two layers, unless a single block needs more."""


class Walk:
    """Runs single layers of a model; `walking` makes one."""

    def __init__(self, model: ElasticModel) -> None:
        self._base = body_of(model.lm)
        self._device = model.device
        self._runs = 0
        self._hidden_BTD: torch.Tensor | None = None
        self._beside: tuple[Any, ...] | None = None
        """What layers return beside the hidden state; None if they return it alone."""

    def through(self, layer: int, tokens_BT: torch.Tensor, hidden_BTD: torch.Tensor | None) -> torch.Tensor:
        """Return the output of one layer, [B, T, D], with the sub-network in use.

        Args:
            hidden_BTD: output of the layer before; for layer 0 it is not read.
        """
        self._runs, self._hidden_BTD = layer, hidden_BTD
        self._base(tokens_BT.to(self._device), use_cache=False)
        output_BTD, self._hidden_BTD = self._hidden_BTD, None
        assert output_BTD is not None  # noqa: S101 - the layer has run
        return output_BTD

    def finish(self, tokens_BT: torch.Tensor, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return the input of the output projection, [B, T, D], from the output of the last layer."""
        self._runs, self._hidden_BTD = -1, hidden_BTD
        final_BTD: torch.Tensor = self._base(tokens_BT.to(self._device), use_cache=False).last_hidden_state
        self._hidden_BTD = None
        return final_BTD

    def _forward(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a layer's forward: run the one layer, and let all others give back the hidden state."""
        if layer == self._runs:
            output = forward(*args, **kwargs)
            self._hidden_BTD, self._beside = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        return self._hidden_BTD if self._beside is None else (self._hidden_BTD, *self._beside)


@contextmanager
def walking(model: ElasticModel) -> Iterator[Walk]:
    """Yield a `Walk`; inside the block the model runs one layer at a time, and afterwards as before."""
    walk = Walk(model)
    modules = [layer.module for layer in model.layers]
    own = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = _bound(walk, index, module.forward)
        yield walk
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is not None:
                module.forward = forward
            elif "forward" in vars(module):
                del module.forward


def _bound(walk: Walk, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: walk._forward(layer, forward, *args, **kwargs)


def batch_within(model: ElasticModel, *, states: int, most: int) -> int:
    """Return how many tokens, at most `most`, a batch may have so that `states` hidden states fit into STATE_BYTES."""
    of_token = states * model.config.hidden_size * model.dtype.itemsize
    return int(min(most, STATE_BYTES // of_token))
