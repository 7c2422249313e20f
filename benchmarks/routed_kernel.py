r"""Check and time the routed MLP kernel on a GPU, against other ways to give every token its own width.

    python benchmarks/routed_kernel.py --out routed_kernel.json

It needs only torch and Triton. Widths are spread evenly from 0 to all neurons and shuffled, so their mean is one half.
These ways run in bf16 with silu, eagerly and in CUDA graphs:

  routed      the kernels, with sorting
  half        dense products with half of the neurons for all tokens, which takes equally many operations
  full        dense products with all neurons
  masked      the definition: all neurons, then zeros
  blocks      sorted tokens, neurons in 8 blocks, block k on the tokens that reach it; eager runs wait for the numbers
              of tokens, a graph has them built in and serves only these widths

Times are medians over interleaved rounds, from CUDA events around --calls calls in a row. Weights stay in the L2 cache
if they fit, and eager times include launches if these are slower than the work. Without a GPU, tiny sizes run in
Triton's interpreter, which checks the results and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined
from flextron.environment import describe_device, describe_environment
from flextron.inference import routed_kernel
from flextron.inference.routed_kernel import routed_mlp, routed_mlp_reference

TOKENS = (1, 16, 128, 1024, 4096, 16384)
SIZES = ("576x1536", "4096x11008")
BLOCKS = 8
Ways = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    settings = _settings()
    on_gpu = torch.cuda.is_available()
    if not routed_kernel.available("cuda" if on_gpu else "cpu"):
        raise SystemExit("This needs Triton, and on a GPU compute capability 8.0 or more. Run: pip install triton")
    if not on_gpu:
        print("No GPU: tiny sizes are interpreted on the CPU in fp32, and nothing is timed.\n")
    sizes = [tuple(map(int, size.split("x"))) for size in settings.sizes] if on_gpu else [(40, 72), (64, 128)]
    rows = []
    for model, neurons in sizes:
        for tokens in settings.tokens if on_gpu else (1, 16, 100):
            rows.append(_measure(tokens, model, neurons, settings, timed=on_gpu))
            print(_line(rows[-1]), flush=True)
    if settings.out is not None:
        settings.out.write_text(json.dumps(_conditions(settings, on_gpu) | {"rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} results are wrong.")


def _settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens per batch (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="hidden size x neurons (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="number of interleaved rounds (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=10, help="number of calls per timing (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def _conditions(settings: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "environment": describe_environment().splitlines(),
        "device": describe_device("cuda" if on_gpu else "cpu"),
        "triton": routed_kernel.triton.__version__,
        "cuda": torch.version.cuda,
        "dtype": "bfloat16" if on_gpu else "float32, interpreted",
        "activation": "silu",
        "widths": "spread evenly from 0 to F, shuffled, seed 0",
        "rounds": settings.rounds,
        "calls": settings.calls,
        "unit": "ms per call, median of rounds",
    }


@torch.inference_mode()
def _measure(tokens: int, model: int, neurons: int, settings: argparse.Namespace, *, timed: bool) -> dict[str, Any]:
    """Return one row of the table: errors, and with `timed` also times."""
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if timed else ("cpu", torch.float32)
    shapes = ((tokens, model), (neurons, model), (neurons, model), (model, neurons))
    inputs = [torch.randn(shape, device=device).mul_(shape[1] ** -0.5).to(dtype) for shape in shapes]
    inputs[0] *= model**0.5
    spread_N = ((torch.arange(tokens, device=device) + 0.5) * (neurons / tokens)).round().int()
    widths_N = spread_N[torch.randperm(tokens, device=device)]
    ways = _ways(inputs, widths_N)
    exact = routed_mlp_reference(*(tensor.float() for tensor in inputs), widths_N)
    errors = {name: _error(ways[name](), exact) for name in ("routed", "masked", "blocks")}
    row = {"tokens": tokens, "model": model, "neurons": neurons, "mean_width": widths_N.float().mean().item()}
    row |= {"errors": errors, "correct": errors["routed"] < (2e-2 if timed else 1e-5)}
    if timed:
        row["eager_ms"] = _times(ways, settings.rounds, settings.calls)
        graphs = {name: _graph(run) for name, run in _ways(inputs, widths_N, _counts(widths_N, neurons)).items()}
        replays = {name: graph.replay for name, graph in graphs.items()}
        row["graph_ms"] = _times(replays, settings.rounds, settings.calls)
        row["graph_tflops"] = 6 * model * widths_N.sum().item() / row["graph_ms"]["routed"] / 1e9
    return row


def _ways(inputs: list[torch.Tensor], widths_N: torch.Tensor, counts: list[int] | None = None) -> Ways:
    x_ND, gate_FD, up_FD, down_DF = inputs
    kept = gate_FD.shape[0] // 2
    half = (gate_FD[:kept], up_FD[:kept], down_DF[:, :kept].contiguous())
    return {
        "routed": lambda: routed_mlp(*inputs, widths_N),
        "half": lambda: _dense(x_ND, *half),
        "full": lambda: _dense(*inputs),
        "masked": lambda: routed_mlp_reference(*inputs, widths_N),
        "blocks": lambda: _blocks(*inputs, widths_N, counts),
    }


def _dense(x_ND: torch.Tensor, gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    h_NF = functional.silu(functional.linear(x_ND, gate_FD)) * functional.linear(x_ND, up_FD)
    return functional.linear(h_NF, down_DF)


def _starts(neurons: int) -> range:
    return range(0, neurons, -(-neurons // BLOCKS))


def _counts(widths_N: torch.Tensor, neurons: int) -> list[int]:
    """Return the number of tokens that reach each block of neurons; this waits for the device."""
    starts_K = torch.tensor(_starts(neurons), device=widths_N.device)
    return (widths_N[:, None] > starts_K).sum(0).tolist()


def _blocks(
    x_ND: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    widths_N: torch.Tensor,
    counts: list[int] | None,
) -> torch.Tensor:
    """Sum the outputs of blocks of neurons, each on the first of the sorted tokens."""
    neurons = gate_FD.shape[0]
    sorted_N, order_N = torch.sort(widths_N, descending=True)
    sorted_ND = x_ND[order_N]
    sum_ND = torch.zeros_like(x_ND)
    index_F = torch.arange(neurons, device=x_ND.device)
    for start, count in zip(_starts(neurons), counts or _counts(widths_N, neurons), strict=True):
        part = slice(start, start + _starts(neurons).step)
        h_NK = functional.silu(functional.linear(sorted_ND[:count], gate_FD[part]))
        h_NK *= functional.linear(sorted_ND[:count], up_FD[part])
        h_NK.masked_fill_(index_F[part] >= sorted_N[:count, None], 0)
        sum_ND[:count] += functional.linear(h_NK, down_DF[:, part])
    return torch.empty_like(x_ND).index_copy_(0, order_N, sum_ND)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the distance to the definition in fp32, relative to the norm of the definition."""
    return ((found.float() - exact).norm() / exact.norm()).item()


def _graph(run: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _times(runs: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Return median ms per call; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            if round_:
                times[name].append(start.elapsed_time(end) / calls)
    return {name: median(ms) for name, ms in times.items()}


def _line(row: dict[str, Any]) -> str:
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    lines = [f"{row['tokens']} tokens, {row['model']} x {row['neurons']}: errors {errors}"]
    if not row["correct"]:
        lines[0] += "  WRONG"
    for kind in ("eager_ms", "graph_ms"):
        for name, ms in row.get(kind, {}).items():
            lines.append(f"  {kind[:-3]:<6}{name:<8}{ms:10.4f} ms{ms / row[kind]['half']:8.2f} of half")
    if "graph_tflops" in row:
        lines.append(f"  routed, in a graph: {row['graph_tflops']:.0f} TFLOP/s, counting only needed operations")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
