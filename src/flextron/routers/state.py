"""Weights of a router's networks, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load weights from a file into a module of the right sizes.

    Raises:
        ValueError: a tensor is missing or unknown, has another shape or dtype, or numbers that are not finite.
    """
    wanted = module.state_dict()
    check_state(state, {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()})
    module.load_state_dict(state)


def check_state(state: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Pass if tensors from a file have these shapes and dtypes, and finite numbers only.

    Raises:
        ValueError: they have not; the message names one.
    """
    if differ := sorted(state.keys() ^ wanted.keys()):
        raise ValueError(f"the tensor {differ[0][:60]} {'is unknown' if differ[0] in state else 'is missing'}")
    for name, (shape, dtype) in wanted.items():
        found = state[name]
        if (found.shape, found.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {found.dtype} of {tuple(found.shape)} instead of {dtype} of {tuple(shape)}")
        if not found.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
