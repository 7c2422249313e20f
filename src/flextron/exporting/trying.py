"""Which exports an architecture has, found by exporting small random copies of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from flextron.elastic.families import Family
from flextron.elastic.model import ElasticModel
from flextron.elastic.shrinking import quiet, small_copy
from flextron.errors import FlextronError
from flextron.exporting.gguf.dialects import has_dialect
from flextron.exporting.hf import export
from flextron.subnet import SearchSpace, Subnet


def exports_of(config: Any, family: Family) -> tuple[str, ...]:
    """Return the exports that the architecture of a config has, each tried and reloaded.

    hf: its own architecture, with fewer neurons in all layers; hf per layer: unequal layers, some left out;
    gguf: a file for llama.cpp.
    """
    found = [name for name, subnet_of in _TRIED.items() if _works(config, family, subnet_of)]
    return (*found, *(["gguf"] if has_dialect(config.model_type) else []))


def _equal(space: SearchSpace) -> Subnet:
    return space.uniform(neurons=space.neurons[len(space.neurons) // 2])


def _unequal(space: SearchSpace) -> Subnet:
    uneven = _equal(space).with_width("neurons", 0, 0)
    return uneven.with_width("kv_groups", space.layers - 1, 0)


_TRIED = {"hf": _equal, "hf per layer": _unequal}


def _works(config: Any, family: Family, subnet_of: Any) -> bool:
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            model = ElasticModel(small_copy(config), family=family)
            export(model, subnet_of(model.search_space), Path(folder) / "out")
    except (FlextronError, TypeError, ValueError, AttributeError, KeyError, StopIteration, RuntimeError):
        return False  # the stock classes refuse what they cannot be built with in many ways
    return True
