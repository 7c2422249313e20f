"""What a GGUF file holds beyond what transformers reads of it: projection biases, scaled rotary frequencies.

transformers builds a config from the file's metadata and takes the tensors that this config has a place for; it leaves
out the others without a word. Here the config is completed from the tensors, and a tensor left over is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flextron.elastic.sizes import gguf_reader
from flextron.elastic.stored import check_layers, check_weights
from flextron.errors import CheckpointError

ROPE_KEY = "flextron.rope_parameters"
"""Metadata in which our own files keep the config's rotary embedding, as JSON."""
ROPE_TENSOR = "rope_freqs.weight"
_BIASES = {"attention_bias": ".attn_output.bias", "mlp_bias": ".ffn_down.bias"}
_LLAMA3 = [
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0, 16.0, 4.0)
]
"""Settings of Llama 3.1 (8), 3.2 (32) and of models made from them; a GGUF file has only what follows from them."""


def complete_config(file: Path) -> Any:
    """Return the config of a GGUF file, with the biases and rotary frequencies that its tensors have.

    Raises:
        CheckpointError: rotary frequencies that belong to no known setting.
    """
    reader = gguf_reader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = [tensor.shape.tolist() for tensor in tensors.values()]
    layers = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.block_count")
    check_layers(None if layers is None else layers.contents(), shapes, file)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for field, ending in _BIASES.items():
        if hasattr(config, field):
            setattr(config, field, any(name.endswith(ending) for name in tensors))
    if ROPE_TENSOR in tensors:
        own = reader.fields.get(ROPE_KEY)
        if own is not None:
            config.rope_parameters = json.loads(own.contents())
        else:
            import gguf

            factors = torch.tensor(gguf.dequantize(tensors[ROPE_TENSOR].data, tensors[ROPE_TENSOR].tensor_type))
            config.rope_parameters = _rope_of(config, factors, file)
    check_weights(config, shapes, file)
    return config


def _rope_of(config: Any, factors: torch.Tensor, file: Path) -> dict[str, Any]:
    """The llama3 setting that divides the plain frequencies by these factors."""
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    for setting in _LLAMA3:
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, **setting}
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        if torch.allclose(plain / frequencies, factors, rtol=1e-3):
            return {"rope_type": "llama3", "rope_theta": theta, **setting}
    raise CheckpointError(
        f"{file} scales its rotary frequencies ({ROPE_TENSOR}) in a way that is not known here; known are those of "
        "Llama 3.1 and 3.2. Use the checkpoint in safetensors that it was made from."
    )


def check_all_used(file: Path, lm: PreTrainedModel) -> None:
    """Pass if the model has a place for every tensor of a GGUF file.

    Raises:
        CheckpointError: it has none for some; the message names one.
    """
    reader = gguf_reader(file)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=lm.config.to_dict())
    used = {*get_gguf_hf_weights_map(lm, processor), ROPE_TENSOR}
    left = sorted(tensor.name for tensor in reader.tensors if tensor.name not in used)
    if left:
        raise CheckpointError(
            f"{file} has {len(left)} tensors that transformers' {lm.config.model_type} has no place for, such as "
            f"{left[0]}. Use the checkpoint in safetensors that it was made from."
        )
