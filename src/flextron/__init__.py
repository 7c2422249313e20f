"""One checkpoint, every latency: nested sub-networks of any Hugging Face LLM (Flextron, ICML 2024).

The public nouns and verbs, loaded on first use, in the order in which data passes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "FlextronError": "errors",
    "Subnet": "subnet",
    "SearchSpace": "subnet",
    "ElasticModel": "elastic",
    "load_blocks": "data",
    "rank": "ranking",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(f"flextron.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
