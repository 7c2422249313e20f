"""Write docs/architectures.md: what of every decoder of the installed transformers narrows, found by trying each.

    python tools/architectures.py              # all, a few minutes on one core
    python tools/architectures.py olmo2 phi3   # prints these, writes nothing

Every type runs on a small random copy of its default config, against the contract; shares of weights are those of the
default config itself, which is built without memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flextron.elastic.composite import text_options
from flextron.elastic.contract import BrokenContractError, check_contract
from flextron.elastic.coverage import Coverage, check_coverage, coverage_of
from flextron.elastic.discovery import found_for
from flextron.elastic.families import FAMILIES, Axis, Family
from flextron.elastic.model import ElasticModel
from flextron.elastic.shrinking import quiet, small_copy
from flextron.errors import FlextronError
from flextron.exporting.trying import exports_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
_HEADS: dict[str, Any] = {"head_dim": 128}
USUAL: dict[str, dict[str, Any]] = {
    "ministral": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "nemotron": {"num_key_value_heads": 8},
    "bamba": {"attn_layer_indices": [2]},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 4},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4, "num_hidden_layers": 40},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
}
"""Fields of types whose default config cannot be run, as published models set them."""


@dataclass(frozen=True)
class Row:
    """What one type can do."""

    model_type: str
    how: str
    """"entry", "discovery", or empty if it does not work."""
    neurons: str
    attention: str
    coverage: Coverage | None
    exports: tuple[str, ...]
    reason: str
    """Why it does not work."""


def row_of(model_type: str) -> Row:
    """Try one type."""
    try:
        with quiet():
            config = _config(model_type)
            family = _family(config)
            coverage = _coverage(config, family)
    except (FlextronError, BrokenContractError) as error:
        return Row(model_type, "", "", "", None, (), _short(str(error)))
    except Exception as error:  # types that cannot be built by themselves fail in any way
        return Row(model_type, "", "", "", None, (), _short(f"cannot be built from its default config: {error}"))
    how = "entry" if config.model_type in FAMILIES else "discovery"
    neurons, attention = (_narrowing(axis) for axis in (family.mlp, family.attention))
    return Row(model_type, how, neurons, attention, coverage, exports_of(config, family), "")


def _config(model_type: str) -> Any:
    config = AutoConfig.for_model(model_type, **USUAL.get(model_type, {}))
    return text_options(config).get("config", config)


def _family(config: Any) -> Family:
    if config.model_type not in FAMILIES:
        return found_for(config).family
    check_contract(small_copy(config), FAMILIES[config.model_type])
    return FAMILIES[config.model_type]


def _coverage(config: Any, family: Family) -> Coverage:
    """Shares of the weights of the default config; of the small copy where that cannot be built."""
    try:
        with torch.device("meta"):
            model = ElasticModel(AutoModelForCausalLM.from_config(config), family=family)
    except Exception:  # types that cannot be built without memory fail in any way
        model = ElasticModel(small_copy(config), family=family)
    check_coverage(model)
    return coverage_of(model)


def _narrowing(axis: Axis) -> str:
    kinds = [f"`{kind.closes}`" for kind in axis.kinds()]
    return ", ".join(kinds) if axis.narrows else f"whole: {', '.join(kinds)}"


def _short(text: str) -> str:
    text = " ".join(text.split()).split(": ", 1)[-1].split(". If you know")[0]
    return text.replace("|", "/")[:120]


def page(rows: list[Row]) -> str:
    """The text of docs/architectures.md."""
    works = [_line(row, row.coverage) for row in rows if row.coverage]
    others = [f"| {row.model_type} | {row.reason} |" for row in rows if not row.coverage]
    head = _HEAD.format(version=transformers.__version__, works=len(works), all=len(rows))
    return "\n".join([head, *works, _OTHERS, *others, ""])


_HEAD = """\
# Architectures

This page lists which parts of each decoder of transformers {version} narrow. `python tools/architectures.py` writes
it: it makes a small random copy of every type in transformers' list of causal language models, and holds it against
the contract of
[contract.py](../src/flextron/elastic/contract.py): full width equals the original, narrowed equals masked, permuting
changes nothing, cached equals uncached. `flextron inspect MODEL` does the same for one checkpoint, and checks its own
weights too.

**{works} of {all} types work.** Shares are of the layers' weights of the default config. *Narrows*: units can be left
out one by one. *Whole*: sub-layers that can only be left out as a whole. Exports were tried: `hf` with fewer neurons in
all layers, `hf per layer` with unequal layers, some left out. A multimodal type stands for the text model inside it.

| type | how | MLP | attention | narrows | whole | exports |
|---|---|---|---|---:|---:|---|"""
_OTHERS = """
## What does not work

[Add a family](add_a_family.md) shows how to write an entry for what discovery cannot see.

| type | why |
|---|---|"""


def _line(row: Row, coverage: Coverage) -> str:
    shares = f"{coverage.narrows:.0%} | {coverage.whole:.0%}"
    exports = ", ".join(row.exports) or "-"
    return f"| {row.model_type} | {row.how} | {row.neurons} | {row.attention} | {shares} | {exports} |"


def rows_of(model_types: list[str]) -> Iterator[Row]:
    """Try types one after another, and say so."""
    for model_type in model_types:
        began = time.monotonic()
        row = row_of(model_type)
        said = f"{row.coverage}; {', '.join(row.exports)}" if row.coverage else f"no: {row.reason}"
        print(f"{model_type}: {said} ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
        yield row


def main(model_types: list[str]) -> None:
    """Print the types that are named, or write the page."""
    rows = list(rows_of(model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    if model_types:
        print("\n".join(_line(row, row.coverage) for row in rows if row.coverage))
    else:
        PAGE.write_text(page(rows), encoding="utf8")
        print(f"wrote {PAGE}: {sum(row.coverage is not None for row in rows)} of {len(rows)} types work.")


if __name__ == "__main__":
    main(sys.argv[1:])
