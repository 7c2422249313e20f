"""The routed kernels against their definition: interpreted on the CPU, compiled where there is a GPU."""

import importlib.util

import pytest
import torch

from flextron.inference import routed_kernel
from flextron.inference.routed_kernel import routed_mlp, routed_mlp_reference

D, F = 40, 150  # not multiples of any block
DTYPES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
INTERPRETED = routed_kernel._INTERPRETED  # true if TRITON_INTERPRET is set for the whole run
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU and a compiler")


@pytest.fixture(scope="module")
def interpreted():
    """Load a second copy of the module that runs in Triton's interpreter.

    Triton reads TRITON_INTERPRET when a kernel is defined, even if Triton was imported earlier.
    """
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("interpreted_routed_kernel", routed_kernel.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.routed_mlp


def layer(tokens: int, *, model: int = D, neurons: int = F, dtype=torch.float32, device="cpu", seed: int = 0) -> list:
    """x, gate, up and down, scaled so that outputs are near 1."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((tokens, model), (neurons, model), (neurons, model), (model, neurons))
    scales = (1, model**-0.5, model**-0.5, 2 * neurons**-0.5)
    tensors = [torch.randn(shape, generator=draw) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [tensor.to(device, dtype) for tensor in tensors]


def random_widths(tokens: int, neurons: int = F, *, device="cpu", seed: int = 0) -> torch.Tensor:
    """Return random widths, with 0 and all neurons among them."""
    widths_N = torch.randint(neurons + 1, (tokens,), generator=torch.Generator().manual_seed(seed))
    widths_N[: tokens // 4] = 0
    widths_N[tokens - tokens // 4 :] = neurons
    return widths_N[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))].to(device)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == expected.dtype
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, largest))


@pytest.mark.parametrize("tokens", [0, 1, 16, 37, 257, 2049], ids="N={}".format)
def test_random_widths(interpreted, tokens):
    inputs = (*layer(tokens), random_widths(tokens))
    assert_close(interpreted(*inputs), routed_mlp_reference(*inputs))


@pytest.mark.parametrize("width", [0, 1, 64, 65, F])
def test_one_width_for_all(interpreted, width):
    x_ND, gate_FD, up_FD, down_DF = layer(5)
    y_ND = interpreted(x_ND, gate_FD, up_FD, down_DF, torch.full((5,), width))
    narrowed = [gate_FD[:width], up_FD[:width], down_DF[:, :width]]
    expected = routed_mlp_reference(x_ND, *narrowed, torch.full((5,), width)) if width else torch.zeros(5, D)
    assert_close(y_ND, expected)
    assert width or not y_ND.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_and_types(interpreted, activation, dtype):
    """Without bfloat16, which Triton's interpreter does not support."""
    inputs = (*layer(20, dtype=dtype), random_widths(20))
    expected = routed_mlp_reference(*inputs, activation=activation)
    assert_close(interpreted(*inputs, activation=activation), expected, DTYPES[dtype])


@pytest.mark.parametrize(("tokens", "model", "neurons"), [(9, 64, 128), (9, 1, 1), (9, 65, 3), (600, 1100, 3)])
def test_sizes(interpreted, tokens, model, neurons):
    inputs = (*layer(tokens, model=model, neurons=neurons), random_widths(tokens, neurons))
    assert_close(interpreted(*inputs), routed_mlp_reference(*inputs))


def test_views_and_32_bit_widths(interpreted):
    """Inputs may be transposed, or views of larger tensors."""
    x_ND, gate_FD, up_FD, down_DF = layer(20, neurons=F + 30)
    parts = (x_ND.t().contiguous().t()[::2], gate_FD[:F], up_FD.t().contiguous().t()[:F], down_DF[:, :F])
    widths_N = random_widths(20).int()[::2]
    assert_close(interpreted(*parts, widths_N), routed_mlp_reference(*parts, widths_N))


def test_widths_out_of_range_count_as_none_and_all(interpreted):
    """Reading beyond a row of neurons would reach the third token's, which is NaN."""
    weights = layer(3)
    weights[0][2] = float("nan")
    y_ND = interpreted(*weights, torch.tensor([-7, F + 100, 9]))
    assert_close(y_ND[:2], routed_mlp_reference(*weights, torch.tensor([0, F, 9]))[:2])


def test_what_lies_beyond_a_width_is_never_read(interpreted):
    x_ND, gate_FD, up_FD, down_DF = layer(4)
    gate_FD[128:], up_FD[128:], down_DF[:, 128:] = (float("nan"),) * 3
    assert interpreted(x_ND, gate_FD, up_FD, down_DF, torch.tensor([128, 3, 0, 70])).isfinite().all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("learnt", [(0, 1, 2, 3), (0,), (3,), (1, 3)])
def test_gradients(interpreted, learnt, activation):
    widths_N = random_widths(19)
    gradients = [_gradients(run, 19, widths_N, learnt, activation) for run in (interpreted, routed_mlp_reference)]
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)


def _gradients(run, tokens, widths_N, learnt, activation="silu", **kind):
    inputs = layer(tokens, **kind)
    for place in learnt:
        inputs[place].requires_grad_()
    y_ND = run(*inputs, widths_N, activation=activation)
    y_ND.backward(torch.linspace(-1, 1, y_ND.numel(), device=y_ND.device, dtype=y_ND.dtype).view_as(y_ND))
    assert all((tensor.grad is not None) == (place in learnt) for place, tensor in enumerate(inputs))
    return [inputs[place].grad for place in learnt]


def test_no_tokens_have_gradients_of_zero(interpreted):
    for gradient in _gradients(interpreted, 0, random_widths(0), (0, 1, 2, 3)):
        assert not gradient.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(interpreted, mode):
    inputs = [tensor.requires_grad_() for tensor in layer(6)]
    with mode():
        y_ND = interpreted(*inputs, random_widths(6))
        assert_close(y_ND, routed_mlp_reference(*inputs, random_widths(6)))
    assert not y_ND.requires_grad


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[None], r"x_ND has shape \[1, 5, 40\], expected \[N, D\]. Flatten"),
        (0, lambda x: x.double(), "x_ND is torch.float64, expected torch.float32"),
        (1, lambda x: x[:0], r"gate_FD has shape \[0, 40\], expected \[F, D\]"),
        (1, lambda x: x[:, 1:], r"gate_FD has shape \[150, 39\], expected \[150, 40\]"),
        (2, lambda x: x[1:], r"up_FD has shape \[149, 40\], expected \[150, 40\]"),
        (2, lambda x: x.half(), "up_FD is torch.float16, expected torch.float32"),
        (3, lambda x: x.t(), r"down_DF has shape \[150, 40\], expected \[40, 150\]"),
        (3, lambda x: x.to("meta"), "down_DF is on meta, expected cpu"),
        (4, lambda x: x[1:], r"widths_N has shape \[4\], expected \[5\]"),
        (4, lambda x: x.float(), "widths_N is torch.float32, expected torch.int32 or"),
    ],
)
def test_wrong_inputs(place, change, message):
    inputs = [*layer(5), random_widths(5)]
    inputs[place] = change(inputs[place])
    for run in (routed_mlp, routed_mlp_reference):
        with pytest.raises(ValueError, match=message):
            run(*inputs)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'relu', expected one of silu, gelu_tanh"):
        routed_mlp_reference(*layer(5), random_widths(5), activation="relu")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_no_gpu():
    assert not routed_kernel.available("cpu")
    assert not routed_kernel.available("cuda")


def test_a_device_without_triton(monkeypatch):
    """As if Triton were not installed."""
    monkeypatch.setattr(routed_kernel, "triton", None)
    assert not routed_kernel.available("cpu")
    with pytest.raises(ValueError, match=r"needs Triton and an NVIDIA GPU .* x_ND is on cpu. Use routed_mlp_reference"):
        routed_mlp(*layer(5), random_widths(5))


@pytest.mark.skipif(INTERPRETED, reason="needs a compiler")
@pytest.mark.parametrize("tokens", [1, 256, 4096], ids="N={}".format)
def test_compiles_for_an_h100_without_one(tokens, monkeypatch, tmp_path):
    """Run the compiler too: it refuses some code that the interpreter accepts."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = routed_kernel._tiles(tokens, torch.bfloat16)
    sizes = {"TOKENS": tiles.tokens, "DEPTH": tiles.depth}
    strides = {"x_stride_D": 1, "gate_stride_D": 1, "up_stride_D": 1, "down_stride_F": 1}
    for kernel, own in (
        (routed_kernel._open, {"NEURONS": tiles.neurons, "GELU": True}),
        (routed_kernel._close, {"OUTPUTS": tiles.outputs}),
    ):
        fixed = {name: value for name, value in {**sizes, **strides, **own}.items() if name in kernel.arg_names}
        ptx = _ptx(kernel, fixed, num_warps=tiles.warps, num_stages=3)
        assert ("wgmma.mma_async" if tokens > 16 else "mma.sync") in ptx
        assert "cp.async.cg" in ptx  # 16 bytes at a time


def _ptx(kernel, fixed, **options):
    """Compile a kernel in bf16, with all variable sizes and strides divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"widths_N": "*i32", "order_N": "*i64", **dict.fromkeys(("N", "D", "F"), "i32")}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[place,] = "constexpr", fixed[name]
        else:
            signature[name] = types.get(name, "i32" if "stride" in name else "*bf16")
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 256, 257, 2048, 2049, 16384], ids="N={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled(tokens, dtype):
    assert routed_kernel.available("cuda")
    for model, neurons in ((576, 1536), (D, F)):
        inputs = layer(tokens, model=model, neurons=neurons, dtype=dtype, device="cuda")
        widths_N = random_widths(tokens, neurons, device="cuda")
        for activation in ("silu", "gelu_tanh"):
            exact = routed_mlp_reference(*(tensor.float() for tensor in inputs), widths_N, activation=activation)
            found = routed_mlp(*inputs, widths_N, activation=activation)
            assert_close(found, exact.to(dtype), DTYPES[dtype])


@needs_gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # warned when autograd's thread starts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_gradients(dtype):
    widths_N = random_widths(300, device="cuda")
    kind = {"dtype": dtype, "device": "cuda"}
    runs = (routed_mlp, routed_mlp_reference)
    for found, expected in zip(*(_gradients(run, 300, widths_N, (0, 1, 2, 3), **kind) for run in runs), strict=True):
        assert_close(found, expected, DTYPES[dtype])


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 100, 3000], ids="N={}".format)
def test_a_cuda_graph_serves_other_widths(tokens):
    inputs = layer(tokens, dtype=torch.bfloat16, device="cuda")
    widths_N = random_widths(tokens, device="cuda")
    routed_mlp(*inputs, widths_N)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_ND = routed_mlp(*inputs, widths_N)
    for seed in range(1, 5):
        widths_N.copy_(random_widths(tokens, seed=seed))
        y_ND.fill_(float("nan"))
        graph.replay()
        assert_close(y_ND, routed_mlp_reference(*inputs, widths_N), DTYPES[torch.bfloat16])


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("tokens", [1, 100, 6000], ids="N={}".format)
def test_nothing_waits_for_the_device(tokens):
    inputs = [tensor.requires_grad_() for tensor in layer(tokens, dtype=torch.bfloat16, device="cuda")]
    widths_N = random_widths(tokens, device="cuda")
    routed_mlp(*inputs, widths_N).sum().backward()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed_mlp(*inputs, widths_N).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
