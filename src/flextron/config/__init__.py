"""The options of every command: one frozen dataclass for each. The text below a field is its `--help`. No torch here."""

from __future__ import annotations

from flextron.config.bench_serve import BenchServeConfig
from flextron.config.env import EnvConfig
from flextron.config.evaluate import EvaluateConfig
from flextron.config.export import ExportConfig
from flextron.config.fields import Dtype, Phase, Score
from flextron.config.generate import GenerateConfig
from flextron.config.inspect import InspectConfig
from flextron.config.measure_latency import MeasureLatencyConfig
from flextron.config.pack import PackConfig
from flextron.config.quantize import QuantizeConfig
from flextron.config.quickstart import QuickstartConfig
from flextron.config.rank import RankConfig
from flextron.config.route import RouteConfig
from flextron.config.serve import ServeConfig
from flextron.config.train import OptimizerOptions, TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.config.train_router import LEAST_EVALUATIONS, TrainRouterConfig

COMMANDS: dict[str, type] = {
    "quickstart": QuickstartConfig,
    "inspect": InspectConfig,
    "rank": RankConfig,
    "train": TrainConfig,
    "measure-latency": MeasureLatencyConfig,
    "train-router": TrainRouterConfig,
    "route": RouteConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "bench-serve": BenchServeConfig,
    "export": ExportConfig,
    "pack": PackConfig,
    "quantize": QuantizeConfig,
    "env": EnvConfig,
}

__all__ = [
    "COMMANDS",
    "LEAST_EVALUATIONS",
    "BenchServeConfig",
    "Dtype",
    "EnvConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "InspectConfig",
    "MeasureLatencyConfig",
    "OptimizerOptions",
    "PackConfig",
    "Phase",
    "QuantizeConfig",
    "QuickstartConfig",
    "RankConfig",
    "RouteConfig",
    "Score",
    "ServeConfig",
    "TextOptions",
    "TrainConfig",
    "TrainRouterConfig",
    "VisitOptions",
    "WatchOptions",
]
