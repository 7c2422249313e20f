"""A model without its weights: modules, names and sizes on the meta device, built from the config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from flextron.elastic import checkpoint, per_layer
from flextron.elastic.accounting import check_accounted, check_shards_inside, check_unquantised
from flextron.elastic.composite import text_options
from flextron.elastic.discovery import family_for
from flextron.elastic.model import ElasticModel
from flextron.elastic.pack import Pack
from flextron.elastic.smollm2 import named
from flextron.elastic.source import PACK, source_of
from flextron.elastic.stored import check_config
from flextron.errors import CheckpointError, first_line, raised_as
from flextron.subnet import SearchSpace

_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer*", "model*.safetensors", "ranking.safetensors"]
"""What a model needs of a hub repository, without other copies of its weights."""
_RANKING = frozenset(checkpoint.ORDERS)


def skeleton(path: str, kind: type[ElasticModel] = ElasticModel) -> ElasticModel:
    """Return the elastic model of a checkpoint without its weights: parameters are on the meta device, buffers real.

    It has no tokenizer and no ranking. `Stored` tells where its weights lie.

    Args:
        path: a folder, hub id, GGUF file or pack; of a pack, the base is read.
        kind: class of the model.

    Raises:
        CheckpointError: the checkpoint does not exist, or its config cannot be read.
        UnknownFamilyError: the architecture has no spec.
    """
    per_layer.register()
    pack = Pack.load(Path(named(path))) if is_pack(path) else None
    source, gguf = source_of(named(path if pack is None else pack.base))
    with raised_as(CheckpointError, f"cannot read the config of {path}"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
    config = text_options(config).get("config", config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # its modules are those of the model in float
    family = family_for(config)
    dtype = config.dtype or _first_dtype(source) or torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        lm.tie_weights()
        for name, buffer in lm.named_buffers():  # as transformers does when it loads
            if any(part in name for part in getattr(lm, "_keep_in_fp32_modules_strict", None) or ()):
                buffer.data = buffer.data.float()
        if (Path(source) / GENERATION_CONFIG_NAME).is_file():
            lm.generation_config = GenerationConfig.from_pretrained(source)
        if pack is not None:
            search_space: SearchSpace | None = pack.search_space
        else:
            search_space = None if gguf else checkpoint.load_metadata(source, {})[0]
        return kind(lm.eval(), search_space=search_space, family=family)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make {path} elastic: {error}") from error


def is_pack(path: str) -> bool:
    """Whether a path is a pack, or the name of one that comes with flextron."""
    return (Path(named(path)) / PACK).is_file()


def _first_dtype(source: str) -> torch.dtype | None:
    """The type of the first weights in a local folder, which transformers takes where the config names none."""
    for file in sorted(Path(source).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                dtype: torch.dtype = opened.get_slice(name)[:0].dtype
                if dtype.is_floating_point:
                    return dtype
    return None


def in_shards(path: str, lm: PreTrainedModel) -> bool:
    """Whether each of several processes can read its shards alone, as far as can be told without a download.

    Raises:
        CheckpointError: a file cannot be read, or the weights are quantised.
    """
    if is_pack(path):
        return False
    source, gguf = source_of(named(path))
    if gguf:
        return False
    if not Path(source).is_dir():
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        names = None if index is None else json.loads(Path(index).read_text(encoding="utf8"))["weight_map"].keys()
        return names is None or weights_of(lm).keys() <= names
    stored = Stored.of(source)
    return stored is None or stored.fits(lm)


class Stored:
    """The weights in the safetensors files of a folder, which are read one by one, under the names of a model."""

    def __init__(self, folder: Path, of_model: set[str] | None = None) -> None:
        """Read the headers of all safetensors files in a folder.

        Args:
            of_model: names of the files that hold the model. The default is those that transformers reads.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self.folder = folder
        self.files: dict[str, Path] = {}
        """The file of each tensor of the model. Other files of the folder, such as another copy, are left out."""
        self.shapes: dict[str, list[int]] = {}
        self.doubles: set[str] = set()
        """Tensors that several files of the folder hold."""
        seen: set[str] = set()
        of_model = _files_of_model(folder) if of_model is None else of_model
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        self.doubles |= {name} & seen
                        seen.add(name)
                        if file.name in of_model:
                            self.files[name], self.shapes[name] = file, opened.get_slice(name).get_shape()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot load {folder}: {file.name}: {first_line(error)}") from error

    @classmethod
    def of(cls, path: str) -> Stored | None:
        """Return what lies in a folder, or a hub repository, which is downloaded; None where there are no weights.

        Raises:
            CheckpointError: a file cannot be read, or the weights are quantised.
        """
        if is_pack(path):
            return None
        source, gguf = source_of(named(path))
        if gguf:
            return None
        with raised_as(CheckpointError, f"cannot load {path}"):
            folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=_FILES))
            check_shards_inside(str(folder))
            check_config(folder)
            check_unquantised(path, AutoConfig.from_pretrained(folder, trust_remote_code=False))
        stored = cls(folder)
        return stored if stored.weights else None

    @property
    def weights(self) -> set[str]:
        """Names of all tensors but those of a ranking."""
        return self.files.keys() - _RANKING

    def skeleton(self, path: str | Path, kind: type[ElasticModel] = ElasticModel) -> ElasticModel:
        """Return the model of these weights without them, with its tokenizer and its ranking.

        Args:
            path: where they come from, which may be a hub repository.
            kind: class of the model.

        Raises:
            CheckpointError, UnknownFamilyError: as `skeleton`.
        """
        source = str(self.folder)
        model = skeleton(source, kind)
        with raised_as(CheckpointError, f"cannot load {path}"):
            model.tokenizer = checkpoint.load_tokenizer(source, {"trust_remote_code": False})
            model.ranking = checkpoint.load_metadata(source, {})[1]
            if model.ranking is not None:
                heads = model.layers[0].attention.heads_per_unit
                model.ranking.check(**model.search_space.sizes, query_heads=heads)
        model.folder = Path(path) if Path(path).is_dir() else None
        return model

    @property
    def usable(self) -> set[str]:
        """Names of the model's tensors that only one file of the folder holds."""
        return self.files.keys() - self.doubles

    def fits(self, lm: PreTrainedModel) -> bool:
        """Whether each weight of the model is in one file, under the name that the model gives it.

        Some checkpoints have other names, or an output projection that the config says is the embedding.
        """
        wanted = weights_of(lm).keys()
        tied = lm.state_dict().keys() - wanted  # of which files may hold another tensor
        return wanted <= self.usable and not (self.files.keys() & tied)

    def check(self, lm: PreTrainedModel) -> None:
        """Pass if every weight has its place in the model, of the right size.

        Raises:
            CheckpointError: one has not; the message names it.
        """
        wanted = weights_of(lm)
        mismatched = [
            (name, self.shapes[name], weight.shape)
            for name, weight in wanted.items()
            if list(weight.shape) != list(self.shapes[name])
        ]
        left = self.files.keys() - lm.state_dict().keys() - _RANKING
        info: dict[str, Any] = {"missing_keys": [], "mismatched_keys": mismatched, "unexpected_keys": left}
        check_accounted(self.folder, lm, info)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, whole."""
        with safe_open(self.files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def fingerprint(self, model: ElasticModel) -> str:
        """Return the fingerprint that the model has with these weights."""
        names = {id(weight): name for name, weight in model.lm.named_parameters()}
        return model.fingerprint(lambda weight: self.read(names[id(weight)]))


def _files_of_model(folder: Path) -> set[str]:
    """Names of the safetensors files that hold a folder's model: those that transformers reads, or else all."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return {SAFE_WEIGHTS_NAME}
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values())
    return {file.name for file in folder.glob("*.safetensors")}


def weights_of(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All tensors of a model that a checkpoint holds, by name, tied ones once."""
    stored = lm.state_dict().keys()
    buffers = {name: buffer for name, buffer in lm.named_buffers() if name in stored}
    return {**dict(lm.named_parameters()), **buffers}
