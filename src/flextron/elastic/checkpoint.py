"""Load and save elastic checkpoints: plain transformers folders plus flextron.json and ranking.safetensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from flextron.atomic import new_folder
from flextron.elastic import per_layer
from flextron.elastic.accounting import (
    QUANT_METHOD,
    check_accounted,
    check_finite,
    check_shards_inside,
    check_unquantised,
    untie_if_apart,
)
from flextron.elastic.composite import is_of_text, text_options
from flextron.elastic.gguf_source import check_all_used, complete_config
from flextron.elastic.older_transformers import add_old_names
from flextron.elastic.sizes import one_reading
from flextron.elastic.source import (
    COPY_AGAIN,
    METADATA_FILE,
    QUANTIZED_FILE,
    RANKING_FILE,
    VERSION,
    clear_metadata,
    read_metadata,
    source_of,
)
from flextron.elastic.stored import check_config
from flextron.environment import dtype_name
from flextron.errors import CheckpointError, raised_as
from flextron.records import check_version
from flextron.subnet import AXES, SearchSpace

ORDERS = (*AXES, "query_heads")
"""Tensors of a ranking: an order on each axis, and of the query heads inside each KV group."""
LARGEST_FILE = "5GB"
"""Of the weights. A file is put together in memory before it is written."""
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
"""Options of `from_pretrained` that concern the hub."""


@dataclass(frozen=True)
class Ranking:
    """The order into which units were sorted: L layers, N neurons, G KV groups, Q query heads in a group.

    `neurons[l, i]` is the original index of the neuron that is now number i in layer l. `kv_groups` works likewise.
    `query_heads[l, g, i]` belongs to query head i of the group that is now number g: it is the head's original index
    inside that group.
    """

    neurons: torch.Tensor  # [L, N] int32
    kv_groups: torch.Tensor  # [L, G] int32
    query_heads: torch.Tensor  # [L, G, Q] int32
    score: str
    tokens: int
    text: str

    def check(self, *, layers: int, neurons: int, kv_groups: int, query_heads: int) -> None:
        """Raise an error unless this permutes the units of a model of these sizes.

        Raises:
            ValueError: a size differs, or a unit is missing or named twice.
        """
        shapes = {
            "neurons": (layers, neurons),
            "kv_groups": (layers, kv_groups),
            "query_heads": (layers, kv_groups, query_heads),
        }
        for name, shape in shapes.items():
            order: torch.Tensor = getattr(self, name)
            if order.shape != shape:
                raise ValueError(f"a ranking of this model has {name} of shape {shape}, not {tuple(order.shape)}.")
            if order.dtype != torch.int32:
                raise ValueError(f"{name} of the ranking is {dtype_name(order.dtype)}, not int32.")
            if not torch.equal(order.sort().values, torch.arange(shape[-1], dtype=order.dtype).expand(shape)):
                raise ValueError(f"{name} of the ranking is no permutation: a unit is missing or named twice.")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a folder, hub id or GGUF file."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    search_space: SearchSpace | None
    ranking: Ranking | None


def load(path: str | Path, *, dtype: str | torch.dtype = "auto", **kwargs: Any) -> Checkpoint:
    """Read a plain or elastic checkpoint from a local folder, a hub id or a GGUF file, which is dequantised.

    `kwargs` go to transformers' `from_pretrained` (`revision`, `attn_implementation`, ...).

    Raises:
        CheckpointError: the checkpoint is missing, unreadable or incomplete, or is not safetensors or GGUF.
    """
    per_layer.register()
    with one_reading(path):
        return _load(path, dtype, kwargs)


def _load(path: str | Path, dtype: str | torch.dtype, kwargs: Mapping[str, Any]) -> Checkpoint:
    source, gguf = source_of(path)
    check_shards_inside(source)
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    read = {"trust_remote_code": False, **kwargs, **gguf}  # or transformers would ask, and take a "y" for True
    with raised_as(CheckpointError, f"cannot load {path}"):
        if gguf and "config" not in read:
            read["config"] = complete_config(Path(path))
        elif Path(source).is_dir() and not gguf:
            check_config(Path(source))
        composite = {} if gguf else _of_text(source, read)
        lm, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are told below
            **{**read, **composite},
        )
        tokenizer = load_tokenizer(source, {"trust_remote_code": False, **gguf, **hub})
    if composite:
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if is_of_text(key)]
        lm._weight_conversions = None  # or saving would give the weights their multimodal names back
    check_accounted(path, lm, info)
    check_finite(path, lm)
    if gguf:
        check_all_used(Path(path), lm)
    untie_if_apart(lm)
    lm.eval()
    if gguf:
        _forget_quantization(lm)
        return Checkpoint(lm, tokenizer, None, None)
    return Checkpoint(lm, tokenizer, *load_metadata(source, dict(kwargs)))


def _of_text(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that load the text model, if this is a multimodal checkpoint.

    Raises:
        CheckpointError: the weights are quantised.
    """
    known = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = options.get("config") or AutoConfig.from_pretrained(source, **known)
    check_unquantised(source, config)
    return text_options(config)


def save(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    beside: Mapping[str, str] | None = None,
    quantized: Mapping[str, torch.Tensor] | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the whole folder or nothing. transformers loads it as the plain full model.

    `weights`, by name, replace the model's own, if the model holds shards only. `beside` are further text files by
    name. `quantized` are tensors in place of weights, which only flextron loads (`elastic.quantized_files`), and
    `about` is what flextron.json says of them.

    Raises:
        CheckpointError: the folder exists and `overwrite` is false, the disk is full, or a write fails.
    """
    stored = list((quantized or weights or dict(checkpoint.lm.named_parameters())).values())
    needs_bytes = sum(weight.nbytes for weight in stored)
    with new_folder(folder, overwrite=overwrite, needs_bytes=needs_bytes) as partial:
        for name, text in (beside or {}).items():
            (partial / name).write_text(text, encoding="utf8")
        if quantized is None:
            checkpoint.lm.save_pretrained(partial, state_dict=weights, max_shard_size=LARGEST_FILE)
            _set_in_config(partial, dtype=dtype_name(stored[0].dtype))  # transformers writes the dtype of the shards
        else:
            checkpoint.lm.config.save_pretrained(partial)
            checkpoint.lm.generation_config.save_pretrained(partial)
            save_file(dict(quantized), partial / QUANTIZED_FILE)
            _set_in_config(partial, dtype="float32", quantization_config={"quant_method": QUANT_METHOD})
        add_old_names(partial / "config.json")
        save_tokenizer(checkpoint.tokenizer, partial)
        if checkpoint.ranking is not None:
            _save_ranking(checkpoint.ranking, partial / RANKING_FILE)
        metadata = {
            "version": VERSION,
            "search_space": None if checkpoint.search_space is None else asdict(checkpoint.search_space),
            **(about or {}),
            "files": sorted(file.name for file in partial.iterdir()),
        }
        (partial / METADATA_FILE).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf8")


def _set_in_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf8")), **values}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the tokenizer so that transformers 4, and tools built on it, can load it too."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 takes only names with tokens there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and notices. flextron shows its own."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder, hub id or GGUF file; None where a folder has none."""
    folder = Path(source)
    has_none = folder.is_dir() and not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists()
    if has_none and "gguf_file" not in options:
        return None
    return AutoTokenizer.from_pretrained(source, **options)


def _forget_quantization(lm: PreTrainedModel) -> None:
    """Let transformers save a model from a GGUF file: its weights are plain, but it is marked as quantised."""
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.hf_quantizer = None
    lm.is_quantized = False


def load_metadata(source: str, options: dict[str, Any]) -> tuple[SearchSpace | None, Ranking | None]:
    """Read the search space and the ranking of an elastic checkpoint. Each is None if the checkpoint has none."""
    file = _find(source, METADATA_FILE, options)
    if file is None:
        return None, None
    data = read_metadata(file)
    ranking_file = _find(source, RANKING_FILE, options)
    if ranking_file is None:
        if RANKING_FILE in data.get("files", ()):
            raise CheckpointError(f"{source} is not whole: it lacks {RANKING_FILE}. {COPY_AGAIN}.")
        return data["search_space"], None
    with clear_metadata(ranking_file, SafetensorError):
        return data["search_space"], _load_ranking(ranking_file)


def _save_ranking(ranking: Ranking, file: Path) -> None:
    orders = {name: getattr(ranking, name).contiguous() for name in ORDERS}
    record = {"version": str(VERSION), "score": ranking.score, "tokens": str(ranking.tokens), "text": ranking.text}
    save_file(orders, file, metadata=record)


def _find(source: str, name: str, options: dict[str, Any]) -> Path | None:
    """Find a file in a local folder, or download it from a hub repository. Returns None if it does not exist."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    hub = {key: options[key] for key in HUB_OPTIONS if key in options and key != "trust_remote_code"}
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _load_ranking(file: Path) -> Ranking:
    with safe_open(file, framework="pt") as stored:
        record = stored.metadata()
        check_version(record["version"], str(VERSION))
        orders = {name: stored.get_tensor(name) for name in ORDERS}
    return Ranking(**orders, score=record["score"], tokens=int(record["tokens"]), text=record["text"])
