"""A config's sizes against the weights beside it, before a model of these sizes is built and takes all memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from flextron.elastic.composite import text_options
from flextron.errors import CheckpointError
from flextron.records import RecordError, parse_object

_LAYERS = ("num_hidden_layers", "n_layer")
_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_embd", "n_inner", "n_head")
_LARGER = 4
"""A model of so many times the stored weights is an error of the config, not a few weights that are missing."""


def check_config(folder: Path) -> None:
    """Pass if the config.json of a local folder describes a model that the weights beside it can fill.

    Raises:
        CheckpointError: a number is negative or none, or there are far fewer weights.
    """
    file = folder / "config.json"
    try:
        raw = parse_object(file.read_bytes())
    except (OSError, RecordError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}. Get the checkpoint again.") from None
    _check_numbers(raw, file)
    shapes = [shape for weights in sorted(folder.glob("model*.safetensors")) for shape in _shapes(weights)]
    if shapes and "quantization_config" not in raw and "auto_map" not in raw:
        check_layers(max((raw.get(key) or 0 for key in _LAYERS), default=0), shapes, file)
        check_weights(AutoConfig.from_pretrained(folder), shapes, file)


def check_layers(layers: Any, shapes: Sequence[Sequence[int]], where: Path) -> None:
    """Pass if each layer can have a tensor, given the shapes of all tensors.

    Raises:
        CheckpointError: there are more layers.
    """
    if isinstance(layers, int) and layers > len(shapes):
        raise CheckpointError(f"{where} asks for {layers:.3g} layers; there are {len(shapes)} tensors. Correct it.")


def check_weights(config: Any, shapes: Sequence[Sequence[int]], where: Path) -> None:
    """Pass if the model of a config is at most a few times as large as the stored tensors, given their shapes.

    Raises:
        CheckpointError: it is larger.
    """
    config = text_options(config).get("config", config)
    with torch.device("meta"):
        wanted = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    found = sum(map(math.prod, shapes))
    if wanted > _LARGER * found:
        raise CheckpointError(f"{where} asks for {wanted:.3g} weights; there are {found:.3g}. Correct its sizes.")


def _shapes(file: Path) -> Iterator[Sequence[int]]:
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - not a dict
            yield stored.get_slice(name).get_shape()


def _check_numbers(value: Any, file: Path, key: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, file, name)
    elif isinstance(value, (int, float)):
        negative = value < 0 and (key.endswith(("eps", "epsilon")) or key in (*_LAYERS, *_SIZES, *_POSITIONS))
        if value != value or value == -math.inf or negative:
            raise CheckpointError(f"{file} has {json.dumps(value)} for {key}. Correct it.")
