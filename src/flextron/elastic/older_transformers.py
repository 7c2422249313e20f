"""What transformers 4 reads in a config.json where transformers 5 writes other names: rotary embeddings.

transformers 4 ignores `rope_parameters` without a word and takes a theta of 10,000. Both versions read a config that
has the names of both (tools/check_transformers4.py compares logits).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def add_old_names(file: Path) -> None:
    """Let a config.json state its rotary embedding in the names of transformers 4, too."""
    config = json.loads(file.read_text(encoding="utf8"))
    config |= _old_names(config)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")


def _old_names(config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    main = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of layer
    if "rope_theta" not in main:
        return {}
    if config["model_type"] == "gpt_neox":
        return {"rotary_emb_base": main["rope_theta"], "rotary_pct": main.get("partial_rotary_factor", 1.0)}
    old = {"rope_theta": main["rope_theta"]}
    if main.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in main.items() if key not in _NOT_SCALING}
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in main:
        old["partial_rotary_factor"] = main["partial_rotary_factor"]
    return old
