"""One checkpoint, every latency: nested sub-networks of any Hugging Face LLM (Flextron, ICML 2024).

The public nouns and verbs, loaded on first use, in the order in which data passes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextron.choice import choose
    from flextron.data import TokenBlocks, load_blocks
    from flextron.elastic import ElasticModel
    from flextron.errors import FlextronError
    from flextron.evaluation import Evaluation, evaluate
    from flextron.export import ExportReport, export
    from flextron.generation import generate
    from flextron.demo import quickstart
    from flextron.ranking import rank
    from flextron.sensitivity import Sensitivity, measure_sensitivity
    from flextron.subnet import SearchSpace, Subnet

__version__ = "0.1.0"
__all__ = [
    "ElasticModel",
    "Evaluation",
    "ExportReport",
    "FlextronError",
    "SearchSpace",
    "Sensitivity",
    "Subnet",
    "TokenBlocks",
    "choose",
    "evaluate",
    "export",
    "generate",
    "load_blocks",
    "measure_sensitivity",
    "quickstart",
    "rank",
]

_HOMES = {
    "FlextronError": "errors",
    "Subnet": "subnet",
    "SearchSpace": "subnet",
    "ElasticModel": "elastic",
    "TokenBlocks": "data",
    "load_blocks": "data",
    "rank": "ranking",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Sensitivity": "sensitivity",
    "measure_sensitivity": "sensitivity",
    "choose": "choice",
    "generate": "generation",
    "ExportReport": "export",
    "export": "export",
    "quickstart": "demo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(f"flextron.{_HOMES[name]}"), name)
