"""Running each token with its own widths, in time that follows the widths.

Flextron (Cai et al., ICML 2024), section 4: input-adaptive widths. The definition is by masks: a token of width d uses
the first d neurons of a layer; a token with g KV groups and h query heads uses the first h query heads of each of the
first g groups. K and V of all groups that a row uses are written for each of its tokens, so its KV cache has no holes.
Width 0 skips the sub-layer for that token, closing bias included.

An MLP is a sum over blocks of neurons. Tokens are sorted by width, widest first, and block k runs on the first n_k
tokens, by the family's own code (docs/decisions/0010-per-token.md).

Shapes: L layers, B batch, T time, N tokens, D model, U parts of a sub-layer (neurons or query heads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import RowGroups
from flextron.errors import FlextronError
from flextron.inference.routed_kernel import Activation, available, routed_mlp
from flextron.subnet import AXES, Subnet

Forward = Callable[..., Any]
"""Runs a sub-layer; called with the sub-layer's own forward, the hidden states [B, T, D], and its other arguments."""
FEW_TOKENS = 64
"""Up to this many tokens are masked. With 16 tokens (SmolLM2, 2 threads of an AMD EPYC) masks take as long as blocks in
fp32, and half as long in bf16."""
_KERNEL_ACTIVATIONS: dict[str, Activation] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}


@dataclass(frozen=True)
class TokenWidths:
    """Widths of every token in every layer, each [L, B, T]; B or T may be 1 if widths do not differ along it.

    `query_heads` is the number of query heads in each KV group.
    """

    neurons: torch.Tensor
    kv_groups: torch.Tensor
    query_heads: torch.Tensor

    @classmethod
    def of_rows(cls, model: ElasticModel, subnets: Sequence[Subnet]) -> TokenWidths:
        """Return widths that run each row of a batch as one sub-network, for requests with different budgets.

        Raises:
            SubnetError: a sub-network is not in the model's search space.
        """
        for subnet in subnets:
            model.search_space.check(subnet)
        neurons, kv_groups = (torch.tensor([subnet[axis] for subnet in subnets]).T[..., None] for axis in AXES)
        return cls(neurons, kv_groups, torch.full_like(kv_groups, model.layers[0].attention.heads_per_unit))

    def check(self, model: ElasticModel) -> None:
        """Check that these are widths of this model.

        Raises:
            ValueError: the number of layers differs, or a width is below 0 or above the full model's.
        """
        first = model.layers[0]
        most = {
            "neurons": first.mlp.width.full,
            "kv_groups": first.attention.width.full,
            "query_heads": first.attention.heads_per_unit,
        }
        for name, limit in most.items():
            widths: torch.Tensor = getattr(self, name)
            if widths.dim() != 3 or len(widths) != len(model.layers):
                raise ValueError(f"{name} has the shape {list(widths.shape)}; it must be [{len(model.layers)}, B, T].")
            if widths.numel() and not 0 <= int(widths.min()) <= int(widths.max()) <= limit:
                raise ValueError(
                    f"{name} are {int(widths.min())} to {int(widths.max())}; for this model they must be 0 to {limit}."
                )


@contextmanager
def use_token_widths(model: ElasticModel, widths: TokenWidths, *, masked: bool = False) -> Iterator[ElasticModel]:
    """Run every token with its own widths inside the block.

    Args:
        masked: compute by the definition, at the full model's cost; results are equal up to rounding.

    Raises:
        ValueError: `widths` do not fit this model.
    """
    widths.check(model)
    runs = [
        (
            _with_widths(layer.mlp, neurons_BT, masked=masked),
            rows_of_attention(layer.attention, groups_BT, heads_BT, masked=masked),
        )
        for layer, neurons_BT, groups_BT, heads_BT in zip(
            model.layers, widths.neurons, widths.kv_groups, widths.query_heads, strict=True
        )
    ]
    with running(model, runs):
        yield model


@contextmanager
def running(model: ElasticModel, runs: Sequence[tuple[Forward, Forward]]) -> Iterator[None]:
    """Let `runs`, one pair (MLP, attention) for each layer, run the sub-layers inside the block.

    Raises:
        FlextronError: an MLP is a mixture of experts, or no module of its own, as OPT's.
    """
    if not all(sub.axis.module and not sub.axis.experts for _, _, sub in model.sub_layers()):
        raise FlextronError(
            f"the MLPs of {model.config.model_type} are mixtures of experts or not modules of their own, so tokens "
            "cannot have widths of their own. Use one sub-network for all tokens."
        )
    widths = [sub.width for _, _, sub in model.sub_layers()]
    with model.holder.held():
        before = [width.run for width in widths]
        try:  # Ctrl-C may come while they are set
            for width, run in zip(widths, (run for pair in runs for run in pair), strict=True):
                width.run = run
            yield
        finally:
            for width, run_before in zip(widths, before, strict=True):
                width.run = run_before


def _with_widths(sub: SubLayer, widths_BT: torch.Tensor, *, masked: bool) -> Forward:
    compute = masked_mlp if masked else mlp

    def run(forward: Forward, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return compute(sub, forward, hidden_BTD, widths_BT.to(hidden_BTD.device).expand(hidden_BTD.shape[:2]))

    return run


def masked_mlp(sub: SubLayer, forward: Forward, hidden_BTD: torch.Tensor, widths_BT: torch.Tensor) -> torch.Tensor:
    """Run an MLP by the definition: all neurons run, and those beyond a token's width are masked."""
    neurons_U = torch.arange(sub.width.full, device=widths_BT.device)
    with _span_kept(sub):
        sub.keep(sub.width.full)
        output_BTD: torch.Tensor = masked_parts(sub, forward, neurons_U < widths_BT[..., None], hidden_BTD)
    return output_BTD


def masked_parts(sub: SubLayer, forward: Forward, mask_BTU: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a sub-layer with its parts multiplied by a mask, soft or hard, before the closing projection."""
    sub.width.mask = mask_BTU
    try:
        result = forward(*args, **kwargs)
    finally:
        sub.width.mask = None
    if sub.closes.bias is None:
        return result
    used_BT1 = (mask_BTU != 0).any(-1, keepdim=True)
    return (result[0] * used_BT1, *result[1:]) if isinstance(result, tuple) else result * used_BT1


def mlp(sub: SubLayer, forward: Forward, hidden_BTD: torch.Tensor, widths_BT: torch.Tensor) -> torch.Tensor:
    """Compute `masked_mlp` in time that follows the widths, by the first implementation that fits.

    - The kernel, if it runs on this device and computes this MLP.
    - For few tokens: the MLP at the largest width, masked, because reading weights takes longer than computing.
    - If all tokens have one width: the MLP narrowed to it.
    - Else: blocks of neurons.
    """
    activation = _activation_of_kernel(sub, forward, hidden_BTD)
    if activation is not None:
        gate_FD, up_FD, down_DF = (projection.weight for projection in (*sub.opens, sub.closes))
        tokens_ND, widths_N = hidden_BTD.flatten(0, 1), widths_BT.flatten()
        y_ND = routed_mlp(tokens_ND, gate_FD, up_FD, down_DF, widths_N, activation=activation)
        return y_ND.view(hidden_BTD.shape)
    widths_N = widths_BT.flatten()
    with _span_kept(sub):
        if 1 < len(widths_N) <= FEW_TOKENS:
            sub.width.kept = int(widths_N.max())
            if not sub.width.kept:
                return forward(hidden_BTD)  # type: ignore[no-any-return]
            neurons_U = torch.arange(sub.width.kept, device=widths_N.device)
            return masked_parts(sub, forward, neurons_U < widths_BT[..., None], hidden_BTD)  # type: ignore[no-any-return]
        blocks = _blocks(widths_N)
        if not blocks or (len(blocks) == 1 and blocks[0][1] == len(widths_N)):
            sub.width.kept = blocks[0][0] if blocks else 0
            return forward(hidden_BTD)  # type: ignore[no-any-return]
        order_N = widths_N.argsort(descending=True)[: blocks[0][1]]
        summed_ND = _sum_of_blocks(sub, forward, hidden_BTD.flatten(0, 1)[order_N], blocks)
    output_ND = torch.zeros_like(hidden_BTD).flatten(0, 1)
    return output_ND.index_copy(0, order_N, summed_ND.to(output_ND.dtype)).view(hidden_BTD.shape)


def _activation_of_kernel(sub: SubLayer, forward: Forward, hidden_BTD: torch.Tensor) -> Activation | None:
    """Return the activation of an MLP that `routed_kernel` can compute on this device; None if it cannot."""
    projections = (*sub.opens, sub.closes)
    if not available(hidden_BTD.device) or torch.is_autocast_enabled(hidden_BTD.device.type) or len(projections) != 3:
        return None
    plain = all(isinstance(p, nn.Linear) and p.bias is None and p.weight.dtype == hidden_BTD.dtype for p in projections)
    module = getattr(forward, "__self__", None)
    return _KERNEL_ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__) if plain else None


def _blocks(widths_N: torch.Tensor) -> list[tuple[int, int]]:
    """Return for each block of units its end and how many tokens need it."""
    if len(widths_N) == 1:  # one token needs no sorting and waits for the device once
        width = int(widths_N)
        return [(width, 1)] if width else []
    counts = torch.bincount(widths_N)
    ends = counts.nonzero()[:, 0]
    needing = counts[ends].flip(0).cumsum(0).flip(0)
    return [(end, tokens) for end, tokens in zip(ends.tolist(), needing.tolist(), strict=True) if end]


def _sum_of_blocks(
    sub: SubLayer, forward: Forward, sorted_ND: torch.Tensor, blocks: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Return the output of the tokens that need the first block; further blocks add to fewer and fewer of them."""
    summed_ND = sorted_ND
    in_place = not torch.is_grad_enabled() and not torch.is_autocast_enabled(sorted_ND.device.type)
    for end, tokens in blocks:
        sub.width.kept = end
        if not sub.width.first:
            summed_ND = forward(sorted_ND[None, :tokens])[0]
        elif in_place:
            sub.width.sums = summed_ND[:tokens]
            forward(sorted_ND[None, :tokens])
        else:
            summed_ND[:tokens] += forward(sorted_ND[None, :tokens])[0]
        sub.width.first = end
    return summed_ND


@contextmanager
def _span_kept(sub: SubLayer) -> Iterator[None]:
    """Restore the sub-layer's span of units after the block."""
    first, kept = sub.width.first, sub.width.kept
    try:
        yield
    finally:
        sub.width.first, sub.width.sums, sub.width.rows = first, None, None
        sub.keep(kept)


def rows_of_attention(
    sub: SubLayer, groups_BT: torch.Tensor, heads_BT: torch.Tensor, *, masked: bool = False
) -> Forward:
    """Return what runs an attention whose tokens use different groups and heads, at the largest number of groups.

    If only whole rows of the batch differ, and only in groups, each row's projections are narrowed to its groups. If
    single tokens or heads differ, or tokens are few, what a token does not use is masked.

    Args:
        masked: always mask, which is the definition.
    """
    most = int(groups_BT.max()) if groups_BT.numel() else 0
    heads = sub.heads_per_unit
    groups_mask = torch.arange(most, device=groups_BT.device) < groups_BT[..., None]
    heads_mask = torch.arange(heads, device=heads_BT.device) < heads_BT[..., None]
    mask_BTU = (groups_mask[..., :, None] & heads_mask[..., None, :]).flatten(-2)
    same = bool(mask_BTU.all())
    by_rows = not masked and bool(heads_mask.all()) and groups_BT.shape[-1] == 1

    def run(forward: Forward, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _span_kept(sub):
            sub.keep(most)
            if same:
                return forward(hidden_BTD, *args, **kwargs)
            rows, time = hidden_BTD.shape[:2]
            beams = rows // len(mask_BTU) if len(mask_BTU) > 1 else 1
            if by_rows and rows * time > FEW_TOKENS:
                sub.width.rows = _by_width(groups_BT[:, 0].repeat_interleave(beams))
                return forward(hidden_BTD, *args, **kwargs)
            mask = mask_BTU.to(hidden_BTD.device).repeat_interleave(beams, 0)
            return masked_parts(sub, forward, mask, hidden_BTD, *args, **kwargs)

    return run


def _by_width(widths_B: torch.Tensor) -> RowGroups:
    """Group rows by width, widest first."""
    widths = sorted(set(widths_B.tolist()), reverse=True)
    indices = [(widths_B == width).nonzero()[:, 0] for width in widths]
    return RowGroups(tuple(zip(indices, widths, strict=True)), torch.cat(indices).argsort())
