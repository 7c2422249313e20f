"""One checkpoint, every latency: nested sub-networks of any Hugging Face LLM (Flextron, ICML 2024).

The public nouns and verbs, loaded on first use, in the order in which data passes them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextron.budget import Budget, Limit
    from flextron.choosing.choice import choose
    from flextron.choosing.routing import Routed, route, route_tokens
    from flextron.config import OptimizerOptions, QuickstartConfig, TextOptions, TrainConfig, VisitOptions, WatchOptions
    from flextron.costs.latency import measure_latency
    from flextron.costs.pricing import Ceiling
    from flextron.costs.saved import save_table
    from flextron.costs.table import CostTable
    from flextron.costs.timing import Runner
    from flextron.data.blocks import TokenBlocks, load_blocks
    from flextron.demo.quickstart import quickstart
    from flextron.elastic.checkpoint import Ranking
    from flextron.elastic.families import Axis, Family
    from flextron.elastic.layers import SubLayer
    from flextron.elastic.pack import Pack
    from flextron.errors import FlextronError
    from flextron.evaluation import Evaluation, TokenRun, evaluate
    from flextron.exporting.gguf.file import GgufReport, export_gguf
    from flextron.exporting.hf import ExportReport, export
    from flextron.exporting.pack import make_pack, save_pack
    from flextron.generation import generate, stream
    from flextron.inference.per_token import TokenWidths, use_token_widths
    from flextron.inference.speculative import Draft, draft_model
    from flextron.model import ElasticModel
    from flextron.ranking.curvature import estimate_sensitivity
    from flextron.ranking.importance import rank
    from flextron.ranking.refit import refit
    from flextron.ranking.sensitivity import Sensitivity, measure_sensitivity
    from flextron.routers.static.learning import train_router
    from flextron.routers.static.making import make_router
    from flextron.routers.static.pairs import LossMeter, Pairs
    from flextron.routers.static.router import Router
    from flextron.routers.token.batch import TokenRouting
    from flextron.routers.token.learning import TokenRouterAbout
    from flextron.routers.token.making import make_token_router
    from flextron.routers.token.net import TokenRouter
    from flextron.subnet import SearchSpace, Subnet
    from flextron.tasks.harness import evaluate_tasks
    from flextron.tasks.results import TaskResult
    from flextron.training.run import train

__version__ = "0.1.0"
__all__ = [
    "Axis",
    "Budget",
    "Ceiling",
    "CostTable",
    "Draft",
    "ElasticModel",
    "Evaluation",
    "ExportReport",
    "Family",
    "FlextronError",
    "GgufReport",
    "Limit",
    "LossMeter",
    "OptimizerOptions",
    "Pack",
    "Pairs",
    "QuickstartConfig",
    "Ranking",
    "Routed",
    "Router",
    "Runner",
    "SearchSpace",
    "Sensitivity",
    "SubLayer",
    "Subnet",
    "TaskResult",
    "TextOptions",
    "TokenBlocks",
    "TokenRouter",
    "TokenRouterAbout",
    "TokenRouting",
    "TokenRun",
    "TokenWidths",
    "TrainConfig",
    "VisitOptions",
    "WatchOptions",
    "choose",
    "draft_model",
    "estimate_sensitivity",
    "evaluate",
    "evaluate_tasks",
    "export",
    "export_gguf",
    "generate",
    "load_blocks",
    "make_pack",
    "make_router",
    "make_token_router",
    "measure_latency",
    "measure_sensitivity",
    "quickstart",
    "rank",
    "refit",
    "route",
    "route_tokens",
    "save_pack",
    "save_table",
    "stream",
    "train",
    "train_router",
    "use_token_widths",
]

_HOMES = {
    "FlextronError": "errors",
    "Subnet": "subnet",
    "SearchSpace": "subnet",
    "ElasticModel": "model",
    "SubLayer": "elastic.layers",
    "Family": "elastic.families",
    "Axis": "elastic.families",
    "TokenBlocks": "data.blocks",
    "load_blocks": "data.blocks",
    "Ranking": "elastic.checkpoint",
    "rank": "ranking.importance",
    "refit": "ranking.refit",
    "TrainConfig": "config",
    "TextOptions": "config",
    "VisitOptions": "config",
    "OptimizerOptions": "config",
    "WatchOptions": "config",
    "train": "training.run",
    "TokenRun": "evaluation",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Sensitivity": "ranking.sensitivity",
    "measure_sensitivity": "ranking.sensitivity",
    "estimate_sensitivity": "ranking.curvature",
    "CostTable": "costs.table",
    "Runner": "costs.timing",
    "measure_latency": "costs.latency",
    "save_table": "costs.saved",
    "Budget": "budget",
    "Limit": "budget",
    "Ceiling": "costs.pricing",
    "Router": "routers.static.router",
    "LossMeter": "routers.static.pairs",
    "Pairs": "routers.static.pairs",
    "train_router": "routers.static.learning",
    "make_router": "routers.static.making",
    "Routed": "choosing.routing",
    "route": "choosing.routing",
    "TokenWidths": "inference.per_token",
    "use_token_widths": "inference.per_token",
    "TokenRouter": "routers.token.net",
    "TokenRouterAbout": "routers.token.learning",
    "make_token_router": "routers.token.making",
    "TokenRouting": "routers.token.batch",
    "route_tokens": "choosing.routing",
    "choose": "choosing.choice",
    "Draft": "inference.speculative",
    "draft_model": "inference.speculative",
    "generate": "generation",
    "stream": "generation",
    "ExportReport": "exporting.hf",
    "GgufReport": "exporting.gguf.file",
    "export": "exporting.hf",
    "export_gguf": "exporting.gguf.file",
    "Pack": "elastic.pack",
    "make_pack": "exporting.pack",
    "save_pack": "exporting.pack",
    "TaskResult": "tasks.results",
    "evaluate_tasks": "tasks.harness",
    "QuickstartConfig": "config",
    "quickstart": "demo.quickstart",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(f"flextron.{_HOMES[name]}"), name)


def _is_command_line() -> bool:
    """Whether this process is `flextron` or `python -m flextron.cli`, whose help must not wait seconds for torch."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what sys.argv holds while Python still looks for the module to run
        return any("flextron.cli" in argument for argument in sys.orig_argv)
    return Path(program).stem == "flextron"


if not _is_command_line():  # so that transformers' Auto classes load exported checkpoints after `import flextron`
    import_module("flextron.elastic.per_layer").register()
