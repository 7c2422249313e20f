"""All that a user can set: one frozen dataclass per command. The text below a field is its `--help`. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flextron.config.fields import Dtype, Phase, Score
from flextron.config.routing import LEAST_EVALUATIONS, MeasureLatencyConfig, RouteConfig, TrainRouterConfig
from flextron.config.training import OptimizerOptions, RankConfig, TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.config.using import EnvConfig, EvaluateConfig, ExportConfig, GenerateConfig, QuickstartConfig

COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": QuickstartConfig,
    "rank": RankConfig,
    "train": TrainConfig,
    "measure-latency": MeasureLatencyConfig,
    "train-router": TrainRouterConfig,
    "route": RouteConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "env": EnvConfig,
}

__all__ = [
    "COMMANDS",
    "LEAST_EVALUATIONS",
    "Dtype",
    "EnvConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "MeasureLatencyConfig",
    "OptimizerOptions",
    "Phase",
    "QuickstartConfig",
    "RankConfig",
    "RouteConfig",
    "Score",
    "TextOptions",
    "TrainConfig",
    "TrainRouterConfig",
    "VisitOptions",
    "WatchOptions",
]
