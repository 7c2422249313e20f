"""What the modules of a model's layers read and write in one forward pass. Shapes: B batch, T time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Call:
    """One call of a module in the forward pass."""

    reads: torch.Tensor
    writes: torch.Tensor
    outputs: int
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)


Calls = dict[str, Call]
"""Calls of a layer's modules by their paths; of a module that is called more than once, the last."""


def observed(lm: PreTrainedModel, layers: Sequence[nn.Module], tokens_BT: torch.Tensor) -> list[Calls]:
    """Run the model once, and return the calls inside each layer."""
    calls: list[Calls] = [{} for _ in layers]

    def hook(layer: int, path: str) -> Any:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            reads = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if reads is not None and isinstance(values[0], torch.Tensor):
                calls[layer][path] = Call(reads, values[0], len(values), args, kwargs)

        return observe

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(layers):
            for path, module in layer.named_modules():
                hooks.callback(module.register_forward_hook(hook(index, path), with_kwargs=True).remove)
        lm(tokens_BT, use_cache=False)
    return calls


def mixes_tokens(module: nn.Module, call: Call) -> bool:
    """Whether a token's output depends on tokens before it."""
    changed = call.reads.clone()
    changed.flatten(0, -2)[0] += 1.0
    before, after = (_again(module, call, reads).flatten(0, -2) for reads in (call.reads, changed))
    return bool((before[1:] - after[1:]).abs().max() > 1e-4 * before.abs().max())


@torch.no_grad()
def _again(module: nn.Module, call: Call, reads: torch.Tensor) -> torch.Tensor:
    """Call a module as before, with another input. Its first output is no more what it was if the layer added to it."""
    args = tuple(reads if value is call.reads else value for value in call.args)
    kwargs = {name: reads if value is call.reads else value for name, value in call.kwargs.items()}
    output = module(*args, **kwargs)
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are views of the same numbers."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
