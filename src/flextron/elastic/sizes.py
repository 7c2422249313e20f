"""Sizes that a config names, checked before anything is built: one line of it can ask for any memory. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flextron.errors import CheckpointError

LONGEST_CONFIG = 10_000_000
"""Bytes that a config.json may have."""
MOST_LAYERS = 10_000
LARGEST_SIZE = 100_000_000
"""Largest width, or number of tokens or heads."""
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "block_count"),
    "hidden": ("hidden_size", "n_embd", "embedding_length"),
    "neurons": ("intermediate_size", "n_inner", "feed_forward_length"),
    "vocabulary": ("vocab_size",),
    "heads": ("num_attention_heads", "n_head", "attention.head_count"),
    "groups": ("num_key_value_heads", "attention.head_count_kv"),
    "head": ("head_dim", "attention.key_length"),
    "positions": ("n_positions",),
    "context": ("max_position_embeddings", "context_length"),
}
"""What a size is called in config.json and in GGUF files."""


def check_folder(folder: Path) -> None:
    """Pass if the weights in a folder can be what its config.json describes.

    Raises:
        CheckpointError: a size is no number of a model, or the files of weights are far too small for the sizes.
    """
    file = folder / "config.json"
    size = file.stat().st_size
    if size > LONGEST_CONFIG:
        raise CheckpointError(f"{file} has {size} bytes; a config has at most {LONGEST_CONFIG}. Get the file again.")
    try:
        config = json.loads(file.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}). Get the file again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__} instead of an object. Get the file again.")
    weights = [weights.stat().st_size for weights in folder.glob("model*.safetensors")]
    text = config.get("text_config")  # of a multimodal checkpoint
    check_sizes({**config, **text} if isinstance(text, dict) else config, file, sum(weights) or None)


def check_gguf(file: Path) -> None:
    """Pass if the tensors of a GGUF file can be what its metadata describes.

    Raises:
        CheckpointError: as `check_folder`, or the file cannot be read.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        return  # transformers says what to install
    try:
        fields = gguf_reader(file).fields
        architecture = fields["general.architecture"].contents()
        names = [name for names in _NAMES.values() for name in names]
        found = {name: fields.get(f"{architecture}.{name}") for name in names}
        config = {name: field.contents() for name, field in found.items() if field is not None}
    except Exception as error:  # damaged files make the reader raise errors of many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot load {file}: {reason}. Get the file again.") from None
    check_sizes(config, file, file.stat().st_size)


def gguf_reader(file: Path) -> Any:
    """Open a GGUF file. It takes seconds to read the metadata of a large vocabulary, so the last one is kept."""
    state = file.stat()
    return _gguf_reader(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _gguf_reader(file: Path, _changed: int, _size: int) -> Any:
    from gguf.gguf_reader import GGUFReader
    from numpy import ndarray

    class Reader(GGUFReader):
        """Reads a plain array in place of a memmap, each of whose million slices takes four times as long."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(ndarray)

    return Reader(file)


@contextmanager
def one_reading(path: str | Path) -> Iterator[None]:
    """Let a GGUF file be read once inside the block, by flextron and by transformers.

    transformers reads the metadata three times, and makes the table of all names of tensors again for every module:
    for SmolLM2, half a minute.
    """
    if not str(path).endswith(".gguf") or find_spec("gguf") is None:
        yield
        return
    package: Any = import_module("gguf")
    before = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader = lambda file: gguf_reader(Path(file))
    package.get_tensor_name_map = lru_cache(before[1])
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = before
        _gguf_reader.cache_clear()  # which holds as much memory as the weights


def check_sizes(config: Mapping[str, Any], file: Path, weights_bytes: int | None) -> None:
    """Pass if a config's sizes are possible, and `weights_bytes` can hold weights of these sizes, if it is known.

    Raises:
        CheckpointError: they are not, or cannot.
    """
    sizes: dict[str, int] = {}
    for kind, names in _NAMES.items():
        most = MOST_LAYERS if kind == "layers" else LARGEST_SIZE
        for name in names:
            value = config.get(name)
            if value is None or isinstance(value, list):  # a list has one for each layer
                continue
            if type(value) is not int or not 0 < value <= most:
                raise CheckpointError(
                    f"{file}: {name} is {str(value)[:40]!r}; it must be a whole number from 1 to {most}."
                )
            sizes[kind] = value
    least = _least_weights(sizes)
    if weights_bytes is not None and least > 8 * weights_bytes:
        raise CheckpointError(
            f"{file} describes at least {least} weights, but their files have {weights_bytes} bytes: they are cut "
            "off, or of another model. Get config and weights again."
        )


def _least_weights(sizes: Mapping[str, int]) -> int:
    """Weights that a model of these sizes has at least: embeddings, two projections of an MLP, one of an attention."""
    hidden = sizes.get("hidden", 1)
    heads = sizes.get("heads", 1)
    head = sizes.get("head", hidden // heads)
    layer = 2 * sizes.get("neurons", 0) + max(heads, sizes.get("groups", 1)) * head
    return hidden * (sizes.get("vocabulary", 0) + sizes.get("positions", 0) + sizes.get("layers", 0) * layer)
