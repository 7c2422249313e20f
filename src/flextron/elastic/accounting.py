"""Every weight of a checkpoint has its place in the model, and every place its weight; flags follow the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flextron.errors import CheckpointError

QUANT_METHOD = "flextron"
"""What the config.json of a folder with weights that flextron quantised says (`elastic.quantized_files`)."""
_HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")
"""Rotary tables and attention masks, which old checkpoints hold and models compute by themselves."""


def check_shards_inside(source: str) -> None:
    """Pass if the shards that a local folder's index names lie in that folder.

    Raises:
        CheckpointError: one lies elsewhere, or the index cannot be read.
    """
    for index in sorted(Path(source).glob("*.index.json")) if Path(source).is_dir() else ():
        try:
            names = set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values())
            outside = sorted(name for name in names if Path(name).name != name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"cannot read {index}: {error}.") from None
        if outside:
            raise CheckpointError(f"{index} names the shard {outside[0]}, which is not in {source}. It is not read.")


def check_accounted(path: str | Path, lm: PreTrainedModel, info: dict[str, Any]) -> None:
    """Pass if transformers found a place for every weight, and a weight of the right size for every place.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` told.

    Raises:
        CheckpointError: weights are missing, of another size, or left over; the message names one.
    """
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{path} is incomplete: {len(missing)} weights are missing, such as {missing[0]}.")
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{path} has {len(info['mismatched_keys'])} weights of another size than its config.json says: {name} is "
            f"{list(found)}, the config asks for {list(wanted)}. Correct the sizes in config.json."
        )
    left = sorted(key for key in info["unexpected_keys"] if not _HARMLESS.search(key) and not _is_tied(lm, key))
    if left:
        raise CheckpointError(
            f"{path} has {len(left)} weights that its architecture ({lm.config.model_type}) has no place for, such as "
            f"{left[0]}: without them it computes something else. Correct config.json, or load the model that it is of."
        )


def check_unquantised(path: str | Path, config: Any) -> None:
    """Pass if the weights of a checkpoint are plain numbers.

    Raises:
        CheckpointError: they are quantised; the message names the method.
    """
    record = getattr(config, "quantization_config", None)
    if record:
        fields = record if isinstance(record, dict) else record.to_dict()
        bits = [f"{n} bits" for n, key in ((4, "load_in_4bit"), (8, "load_in_8bit")) if fields.get(key)]
        if fields.get("quant_method") == QUANT_METHOD and not Path(path).is_dir():
            raise CheckpointError(
                f"{path} holds weights that `flextron quantize` wrote, which load from a folder only. Download them: "
                f"hf download {path} --local-dir FOLDER. Then name the folder."
            )
        if fields.get("quant_method") == QUANT_METHOD:
            raise CheckpointError(
                f"{path} holds weights that `flextron quantize` rounded to few bits, for running only. Name the "
                "checkpoint that they were made from."
            )
        method = " ".join([str(getattr(fields.get("quant_method"), "value", fields.get("quant_method"))), *bits])
        raise CheckpointError(
            f"{path} is quantised ({method}): its units cannot be left out one by one. Load the checkpoint that it was "
            "made from, in bfloat16, float16 or float32, and quantise exported sub-networks instead."
        )


def check_finite(path: str | Path, lm: PreTrainedModel) -> None:
    """Pass if all weights are numbers.

    Raises:
        CheckpointError: one is NaN or infinite; the message names its tensor.
    """
    for name, weight in lm.named_parameters():
        if not weight.is_meta and not bool(weight.detach().sum(dtype=_wide(weight.dtype)).isfinite()):
            raise damaged(path, name)


def damaged(path: str | Path, name: str) -> CheckpointError:
    """The error for a weight that is NaN or infinite."""
    return CheckpointError(f"{path} is damaged: {name} has values that are no numbers. Get it again.")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Where a sum of weights overflows only if one of them is infinite."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _is_tied(lm: PreTrainedModel, key: str) -> bool:
    """Whether a weight is the output projection of a model that has its embeddings there."""
    return key == "lm_head.weight" and are_tied(lm)


def are_tied(lm: PreTrainedModel) -> bool:
    """Whether the output projection is the embedding: one tensor, whatever the config says."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def untie_if_apart(lm: PreTrainedModel) -> None:
    """Let the config say that embedding and output projection are apart where they are, or saving would lose one.

    Checkpoints into which an adapter of the embeddings was merged have both, and a config that says they are tied.
    """
    if getattr(lm.config, "tie_word_embeddings", False) and lm.get_output_embeddings() is not None and not are_tied(lm):
        if torch.equal(lm.get_output_embeddings().weight, lm.get_input_embeddings().weight):
            lm.tie_weights()
        else:
            lm.config.tie_word_embeddings = False
