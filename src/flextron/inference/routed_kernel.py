"""Triton kernels for NVIDIA GPUs: a gated MLP in which every token runs its own number of neurons.

Tokens are sorted by width, widest first, so that the tokens of a tile run similar numbers of neurons. A tile skips the
blocks of neurons that none of its tokens runs. Everything stays on the device: nothing waits for the host, and a CUDA
graph captured once serves all later widths. A tile has up to 128 tokens and costs as much as its widest token, so a few
tokens with very different widths save little.

Shapes: N tokens, D model, F neurons. In kernels, a tile's name ends in its shape, a pointer's in its tensor's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

try:
    import triton
    from triton import language as tl
except ImportError:  # only CUDA builds of torch bring it
    triton = None

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS_PER_GROUP = 8  # tiles of tokens that read all weights together, so that the L2 cache serves them
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def available(device: str | torch.device) -> bool:
    """Return whether `routed_mlp` runs on `device`: NVIDIA GPUs from Ampere on; any if TRITON_INTERPRET=1 at import."""
    if triton is None or _INTERPRETED:
        return triton is not None
    nvidia = torch.device(device).type == "cuda" and torch.cuda.is_available() and not torch.version.hip
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def routed_mlp(
    x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, widths_N: Tensor, *, activation: Activation = "silu"
) -> Tensor:
    """Return the sum over each token's first neurons f of act(x . gate_f) * (x . up_f) * down_f, [N, D].

    Sums are in fp32. Only the device reads the widths, so they are not checked: below 0 counts as 0 (a row of zeros),
    above F as F. All inputs but the widths get gradients; the backward pass computes the layer again at full width. A
    call needs memory for N * F numbers besides its output, a backward pass for several times as many. None of this is
    kept.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the device has no Triton.
    """
    _check(x_ND, gate_FD, up_FD, down_DF, widths_N, activation)
    if not available(x_ND.device):
        raise ValueError(
            f"routed_mlp needs Triton and an NVIDIA GPU of compute capability 8.0 or more; x_ND is on {x_ND.device}. "
            "Use routed_mlp_reference."
        )
    y_ND: torch.Tensor = _RoutedMLP.apply(x_ND, gate_FD, up_FD, down_DF, widths_N, activation)  # type: ignore[no-untyped-call]
    return y_ND


def routed_mlp_reference(
    x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, widths_N: Tensor, *, activation: Activation = "silu"
) -> Tensor:
    """Compute `routed_mlp` by masking, which is its definition: on any device, at the cost of the full width.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(x_ND, gate_FD, up_FD, down_DF, widths_N, activation)
    return functional.linear(_masked_neurons(x_ND, gate_FD, up_FD, widths_N, activation), down_DF)


def _masked_neurons(
    x_ND: torch.Tensor, gate_FD: torch.Tensor, up_FD: torch.Tensor, widths_N: torch.Tensor, activation: str
) -> torch.Tensor:
    h_NF = _ACTIVATIONS[activation](functional.linear(x_ND, gate_FD)) * functional.linear(x_ND, up_FD)
    beyond_NF = torch.arange(h_NF.shape[1], device=h_NF.device) >= widths_N[:, None]
    return h_NF.masked_fill(beyond_NF, 0)


class _RoutedMLP(torch.autograd.Function):
    """The kernels with the gradients of the definition; keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        ctx.save_for_backward(*inputs[:-1])
        ctx.activation = inputs[-1]
        return _launch(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, gate_FD, up_FD, down_DF, widths_N = ctx.saved_tensors
        with torch.autocast(dy_ND.device.type, enabled=False):
            with torch.enable_grad():
                needs = zip((x_ND, gate_FD, up_FD), ctx.needs_input_grad, strict=False)
                opening = [tensor.detach().requires_grad_(need) for tensor, need in needs]
                x_ND, gate_FD, up_FD = opening
                h_NF = _masked_neurons(x_ND, gate_FD, up_FD, widths_N, ctx.activation)
            down_gradient = dy_ND.t() @ h_NF.detach() if ctx.needs_input_grad[3] else None
            learnt = [tensor for tensor in opening if tensor.requires_grad]
            gradients = iter(torch.autograd.grad(h_NF, learnt, dy_ND @ down_DF) if learnt else ())
        return (*(next(gradients) if tensor.requires_grad else None for tensor in opening), down_gradient, None, None)


class _Tiles(NamedTuple):
    """Sizes of the tiles that one program computes. `depth`, the length of one step of its sums, divides `neurons`."""

    tokens: int
    neurons: int
    outputs: int
    depth: int
    warps: int
    stages: int


def _tiles(tokens: int, dtype: torch.dtype) -> _Tiles:
    """Return small tiles for few tokens, so that all processors read weights; for many, tiles that fill registers."""
    if dtype == torch.float32:  # runs without tensor cores
        return _Tiles(16 if tokens <= 16 else 64, 64, 64, 32, warps=4, stages=3)
    if tokens <= 16:
        return _Tiles(16, 64, 32, 64, warps=4, stages=6)
    if tokens <= 256:
        return _Tiles(64, 64, 64, 64, warps=4, stages=4)
    return _Tiles(128, 128, 128 if tokens <= 1024 else 256, 64, warps=8, stages=4)


def _launch(
    x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, widths_N: Tensor, activation: str
) -> torch.Tensor:
    (N, D), F = x_ND.shape, gate_FD.shape[0]
    y_ND = x_ND.new_empty(N, D)
    if not N:
        return y_ND
    tiles = _tiles(N, x_ND.dtype)
    sorted_N, order_N = torch.sort(widths_N.int(), descending=True, stable=True)
    rows, columns = _blocks(N, tiles.tokens), _blocks(F, tiles.neurons)
    h_NF = x_ND.new_empty(N, columns * tiles.neurons)  # rows in sorted order
    group = min(rows, _ROWS_PER_GROUP)
    with torch.cuda.device_of(x_ND):  # type: ignore[no-untyped-call]
        _open[group, columns, _blocks(rows, group)](
            *(x_ND, gate_FD, up_FD, h_NF, sorted_N, order_N, N, D, F),
            *(*x_ND.stride(), *gate_FD.stride(), *up_FD.stride(), h_NF.stride(0)),
            GELU=activation == "gelu_tanh",
            TOKENS=tiles.tokens,
            NEURONS=tiles.neurons,
            DEPTH=tiles.depth,
            num_warps=tiles.warps,
            num_stages=_stages(tiles, tiles.tokens + 2 * tiles.neurons, x_ND),
        )
        _close[_blocks(D, tiles.outputs), rows](
            *(h_NF, down_DF, y_ND, sorted_N, order_N, N, D, F),
            *(h_NF.stride(0), *down_DF.stride(), y_ND.stride(0)),
            TOKENS=tiles.tokens,
            OUTPUTS=tiles.outputs,
            DEPTH=tiles.depth,
            num_warps=tiles.warps,
            num_stages=_stages(tiles, tiles.tokens + tiles.outputs, x_ND),
        )
    return y_ND


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _stages(tiles: _Tiles, rows: int, like: torch.Tensor) -> int:
    """Return how many steps of a sum to load ahead: as many as fit into shared memory."""
    if not like.is_cuda:  # interpreted: nothing is loaded ahead
        return 1
    properties: Any = torch.cuda.get_device_properties(like.device)
    fitting = (properties.shared_memory_per_block_optin - 1024) // (rows * tiles.depth * like.itemsize)
    return int(max(1, min(tiles.stages, fitting)))


def _jit(kernel: Callable[..., None]) -> Any:
    """Compile a kernel with Triton, once for all N; returns it unchanged without Triton."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["N"])


@_jit
def _open(
    x_ND: tl.tensor,
    gate_FD: tl.tensor,
    up_FD: tl.tensor,
    h_NF: tl.tensor,
    widths_N: tl.tensor,
    order_N: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    F: tl.tensor,
    x_stride_N: tl.tensor,
    x_stride_D: tl.tensor,
    gate_stride_F: tl.tensor,
    gate_stride_D: tl.tensor,
    up_stride_F: tl.tensor,
    up_stride_D: tl.tensor,
    h_stride_N: tl.tensor,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Compute one tile of act(x . gate) * (x . up) for sorted tokens, with zeros beyond each token's width.

    Tiles beyond the widths of all their tokens are not written. The grid's first axis runs fastest: rows of a group,
    then columns, then groups.
    """
    row = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if row * TOKENS >= N:
        return
    if tl.load(widths_N + row * TOKENS) <= tl.program_id(1) * NEURONS:
        return
    place_N = row * TOKENS + tl.arange(0, TOKENS)
    width_N = tl.load(widths_N + place_N, mask=place_N < N, other=0)
    token_N = tl.load(order_N + place_N, mask=place_N < N, other=0)
    neuron_F = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    weight_F = tl.minimum(neuron_F, F - 1).to(tl.int64)
    step_D = tl.arange(0, DEPTH)
    x_at_ND = x_ND + token_N[:, None] * x_stride_N + step_D[None, :] * x_stride_D
    gate_at_DF = gate_FD + weight_F[None, :] * gate_stride_F + step_D[:, None] * gate_stride_D
    up_at_DF = up_FD + weight_F[None, :] * up_stride_F + step_D[:, None] * up_stride_D
    gated_NF = tl.full((TOKENS, NEURONS), 0.0, tl.float32)
    plain_NF = tl.full((TOKENS, NEURONS), 0.0, tl.float32)
    for start in range(0, D, DEPTH):
        inside_D = step_D < D - start
        part_ND = tl.load(x_at_ND, mask=inside_D[None, :], other=0.0)
        gate_DF = tl.load(gate_at_DF, mask=inside_D[:, None], other=0.0)
        up_DF = tl.load(up_at_DF, mask=inside_D[:, None], other=0.0)
        gated_NF = tl.dot(part_ND, gate_DF, gated_NF, input_precision="ieee")
        plain_NF = tl.dot(part_ND, up_DF, plain_NF, input_precision="ieee")
        x_at_ND += DEPTH * x_stride_D
        gate_at_DF += DEPTH * gate_stride_D
        up_at_DF += DEPTH * up_stride_D
    logit_NF = gated_NF
    if GELU:  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        logit_NF = 1.5957691216057308 * (gated_NF + 0.044715 * gated_NF * gated_NF * gated_NF)
    product_NF = gated_NF / (1.0 + tl.exp(-logit_NF)) * plain_NF
    product_NF = tl.where(neuron_F[None, :] < width_N[:, None], product_NF, 0.0)
    h_at_NF = h_NF + place_N.to(tl.int64)[:, None] * h_stride_N + neuron_F[None, :]
    tl.store(h_at_NF, product_NF.to(h_NF.dtype.element_ty), mask=(place_N < N)[:, None])


@_jit
def _close(
    h_NF: tl.tensor,
    down_DF: tl.tensor,
    y_ND: tl.tensor,
    widths_N: tl.tensor,
    order_N: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    F: tl.tensor,
    h_stride_N: tl.tensor,
    down_stride_D: tl.tensor,
    down_stride_F: tl.tensor,
    y_stride_N: tl.tensor,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Compute one tile of h . down over the neurons of its widest token, and write each row to its token's place.

    `_open` has written h for the same tiles of tokens, up to a multiple of its NEURONS and so of DEPTH. The grid's
    first axis runs fastest, so the programs of the widest tokens, which take longest, start first.
    """
    row = tl.program_id(1)
    width = tl.minimum(tl.load(widths_N + row * TOKENS), F)
    place_N = row * TOKENS + tl.arange(0, TOKENS)
    token_N = tl.load(order_N + place_N, mask=place_N < N, other=0)
    output_D = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_D = tl.minimum(output_D, D - 1).to(tl.int64)
    step_F = tl.arange(0, DEPTH)
    h_at_NF = h_NF + tl.minimum(place_N, N - 1).to(tl.int64)[:, None] * h_stride_N + step_F[None, :]
    down_at_FD = down_DF + weight_D[None, :] * down_stride_D + step_F[:, None] * down_stride_F
    sum_ND = tl.full((TOKENS, OUTPUTS), 0.0, tl.float32)
    for start in range(0, width, DEPTH):
        part_NF = tl.load(h_at_NF)
        down_FD = tl.load(down_at_FD, mask=(step_F < F - start)[:, None], other=0.0)
        sum_ND = tl.dot(part_NF, down_FD, sum_ND, input_precision="ieee")
        h_at_NF += DEPTH
        down_at_FD += DEPTH * down_stride_F
    y_at_ND = y_ND + token_N[:, None] * y_stride_N + output_D[None, :]
    inside_ND = (place_N < N)[:, None] & (output_D < D)[None, :]
    tl.store(y_at_ND, sum_ND.to(y_ND.dtype.element_ty), mask=inside_ND)


def _check(x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, widths_N: Tensor, activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(_ACTIVATIONS)}.")
    if x_ND.dim() != 2:
        raise ValueError(f"x_ND has shape {list(x_ND.shape)}, expected [N, D]. Flatten batch and time into N.")
    if x_ND.dtype not in _DTYPES:
        raise ValueError(f"x_ND is {x_ND.dtype}, expected {', '.join(map(str, _DTYPES))}.")
    if widths_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"widths_N is {widths_N.dtype}, expected torch.int32 or torch.int64.")
    if gate_FD.dim() != 2 or not gate_FD.numel():
        raise ValueError(f"gate_FD has shape {list(gate_FD.shape)}, expected [F, D] with neither 0.")
    (N, D), F = x_ND.shape, gate_FD.shape[0]
    weights = {"gate_FD": (gate_FD, [F, D]), "up_FD": (up_FD, [F, D]), "down_DF": (down_DF, [D, F])}
    for name, (tensor, shape) in {**weights, "widths_N": (widths_N, [N])}.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {shape}, as x_ND has {[N, D]} and F is {F}."
            )
        if tensor.device != x_ND.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x_ND.device}, as x_ND.")
        if name in weights and tensor.dtype != x_ND.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {x_ND.dtype}, as x_ND.")
