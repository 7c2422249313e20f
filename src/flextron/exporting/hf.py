"""One sub-network -> a checkpoint of its own, which appears only if it computes what the sub-network computes."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from flextron.atomic import check_new, new_folder
from flextron.elastic import per_layer
from flextron.elastic.checkpoint import METADATA_FILE, save_tokenizer
from flextron.elastic.families import Axis
from flextron.elastic.model import ElasticModel
from flextron.errors import CheckpointError, ExportError
from flextron.exporting.card import CARD, model_card
from flextron.exporting.checking import evaluating, real_text
from flextron.exporting.cutting import Sizes, axis_sizes, cut_state, layer_sizes, parameters_asked, refuse_odd_heads
from flextron.subnet import Subnet

REMOTE_CODE_FILE = "modeling_flextron.py"
LARGEST_FILE = "5GB"
"""Weights beyond it go to further files."""
_CHECK_TOKENS = 128  # of a real text, on which both models are compared
_CHECK_SHAPE = (2, 16)  # of random tokens, where there is no tokenizer
_CHECK_SEED = 0
_TOLERANCES = {torch.float16: 0.05, torch.bfloat16: 0.05}  # of the largest logit
_TOLERANCE = 1e-3  # the same, of wider types


@dataclass(frozen=True)
class ExportReport:
    """What was asked of an export, and what the reloaded checkpoint gave."""

    folder: str
    architecture: str
    """The `model_type` written: the original's own, or flextron_<original> where layers differ."""
    subnet: Subnet
    share: float
    """Share of the layers' weights that `subnet` keeps, 0 to 1."""
    parameters_asked: int
    """The full model's parameters less the units left out; a sub-layer of width 0 leaves out all it has."""
    parameters_got: int
    """Parameters of the reloaded checkpoint, tied ones once."""
    bytes_got: int
    """Size of the weight files."""
    largest_logit_difference: float | None
    """Between the elastic model as `subnet` and the reloaded checkpoint, on a real text; None where not verified."""

    def __str__(self) -> str:
        needs = ""
        if self.architecture.startswith(per_layer.PREFIX):
            needs = "\n  loads by AutoModelForCausalLM after `import flextron`"
            needs += ", or with its code beside it by trust_remote_code=True"
        checked = "not verified"
        if self.largest_logit_difference is not None:
            checked = f"loaded again: logits differ by at most {self.largest_logit_difference:.2g}"
        return (
            f"wrote {self.folder}: {self.architecture}, {self.subnet}\n"
            f"  {self.share:.1%} of the layers' weights; parameters asked {self.parameters_asked:,}, "
            f"got {self.parameters_got:,} ({self.bytes_got / 1e6:.1f} MB)\n"
            f"  {checked}{needs}"
        )


def check_not_elastic(folder: str | Path) -> None:
    """Pass unless an elastic checkpoint lies there, which no export replaces.

    Raises:
        CheckpointError: one does.
    """
    if (Path(folder) / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{folder} is an elastic checkpoint, which an export does not replace. Name another folder."
        )


def export(
    model: ElasticModel,
    subnet: Subnet,
    folder: str | Path,
    *,
    overwrite: bool = False,
    remote_code: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Write `subnet` as a checkpoint of its own, reload it, and compare; nothing appears unless both agree.

    Equal widths without 0 give the original's own architecture where its config can state them. Other widths give
    `flextron_<original>` with the standard `per_layer_config`, which `AutoModelForCausalLM` loads after
    `import flextron`; `remote_code=True` lays its code beside it, for `trust_remote_code=True` without flextron.
    `verify=False` leaves out the comparison.

    Raises:
        SubnetError: not in the search space of this model.
        ExportError: the architecture cannot state these sizes, or the reloaded checkpoint computes something else.
        CheckpointError: the folder exists and `overwrite` is false, no space, or a write that failed.
    """
    check_not_elastic(folder)
    check_new(folder, overwrite=overwrite)
    model.search_space.check(subnet)
    refuse_odd_heads(model, subnet)
    per_layer.register()
    exported = _build(model, subnet)
    needs_bytes = sum(p.numel() * p.element_size() for p in exported.parameters())
    with new_folder(folder, overwrite=overwrite, needs_bytes=needs_bytes) as partial:
        _write(exported, model, subnet, partial, remote_code=remote_code)
        reloaded = _reload(partial, model) if verify else exported
        return ExportReport(
            folder=str(folder),
            architecture=exported.config.model_type,
            subnet=subnet,
            share=model.share(subnet),
            parameters_asked=parameters_asked(model, subnet),
            parameters_got=reloaded.num_parameters(),
            bytes_got=sum(file.stat().st_size for file in partial.glob("*.safetensors")),
            largest_logit_difference=_compare(model, subnet, reloaded) if verify else None,
        )


def _build(model: ElasticModel, subnet: Subnet) -> PreTrainedModel:
    """The exported model; its weights are views of the elastic model's."""
    sizes = layer_sizes(model, subnet)
    state = cut_state(model, subnet)
    config = _plain_config(model, sizes) if subnet.is_uniform and all(sizes[0].values()) else None
    lm_class = type(model.lm)
    if config is None:
        config, lm_class = _per_layer_config(model, sizes), per_layer.CLASSES[model.config.model_type].causal_lm
    try:
        with torch.device("meta"):
            exported = lm_class(config)
        exported.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{config.model_type} cannot hold {subnet}. Keep the full width of the sub-layers named here: {error}"
        ) from error
    exported.tie_weights()
    exported.generation_config = copy.deepcopy(model.lm.generation_config)
    return exported


def _plain_config(model: ElasticModel, sizes: list[Sizes]) -> Any:
    """A config of the original's own class, or None where that class refuses these sizes."""
    stated = {**_stated(model, sizes), **sizes[0]}
    try:
        return type(model.config).from_dict(stated)
    except (StrictDataclassError, ValueError):
        return None


def _per_layer_config(model: ElasticModel, sizes: list[Sizes]) -> Any:
    """Each field is the largest of any layer, and `per_layer_config` lists the layers that differ."""
    config = model.config
    top = {key: max(layer[key] for layer in sizes) or getattr(config, key) for key in sizes[0]}
    axes = {"attention": model.family.attention, "mlp": model.family.mlp}
    overrides = {index: _overrides(layer, top, axes) for index, layer in enumerate(sizes)}
    stated = {
        **_stated(model, sizes),
        **top,
        "per_layer_config": {index: override for index, override in overrides.items() if override},
    }
    return per_layer.CLASSES[config.model_type].config.from_dict(stated)


def _overrides(layer: Sizes, top: Sizes, axes: dict[str, Axis]) -> dict[str, Any]:
    skip = [name for name, axis in axes.items() if not layer[axis.config_keys[0]]]
    sizes = {key: size for key, size in layer.items() if size not in (0, top[key])}
    return {**sizes, "skip": skip} if skip else dict(sizes)


def _stated(model: ElasticModel, sizes: list[Sizes]) -> dict[str, Any]:
    """What the original's config states, and the head size where it no longer follows from the number of heads."""
    stated: dict[str, Any] = model.config.to_dict()
    del stated["model_type"]  # of the config class; as a value it would hide that
    attention = model.layers[0].attention
    full = axis_sizes(attention, attention.width.full)
    if any(layer[key] not in (0, full[key]) for layer in sizes for key in full):
        stated["head_dim"] = attention.closing_size // (attention.width.full * attention.heads_per_unit)
    return stated


def _write(exported: PreTrainedModel, model: ElasticModel, subnet: Subnet, folder: Path, *, remote_code: bool) -> None:
    if remote_code and exported.config.model_type.startswith(per_layer.PREFIX):
        classes = per_layer.CLASSES[model.config.model_type]
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        module = REMOTE_CODE_FILE.removesuffix(".py")
        exported.config.auto_map = {auto: f"{module}.{cls.__name__}" for auto, cls in zip(autos, classes, strict=True)}
        shutil.copyfile(per_layer.__file__, folder / REMOTE_CODE_FILE)
    exported.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    save_tokenizer(model.tokenizer, folder)
    card = model_card(model, subnet, exported.num_parameters())
    (folder / CARD).write_text(card, encoding="utf8")


def _reload(folder: Path, model: ElasticModel) -> Any:
    try:
        reloaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            use_safetensors=True,
            attn_implementation=model.config._attn_implementation,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"the exported checkpoint does not load again: {error}") from error
    return reloaded.to(model.device).eval()


@torch.inference_mode()
def _compare(model: ElasticModel, subnet: Subnet, reloaded: PreTrainedModel) -> float:
    """The largest difference of any logit.

    Raises:
        ExportError: it is too large to be rounding.
    """
    tokens = _check_tokens(model).to(model.device)
    with model.use(subnet), evaluating(model.lm):
        wanted = model(tokens).logits.float()
    difference = float((reloaded(tokens).logits.float() - wanted).abs().max())
    limit = _TOLERANCES.get(model.dtype, _TOLERANCE) * float(wanted.abs().max())
    if not difference <= limit:
        raise ExportError(
            f"the exported checkpoint computes something else: its logits differ by up to {difference:.3g}, "
            f"more than the {limit:.3g} that rounding explains. Nothing was kept; please report it."
        )
    return difference


def _check_tokens(model: ElasticModel) -> torch.Tensor:
    """Tokens on which both models are compared, [B, T]."""
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    random = torch.randint(model.config.vocab_size, _CHECK_SHAPE, generator=generator)
    if model.tokenizer is None:
        return random
    most = min(_CHECK_TOKENS, getattr(model.config, "max_position_embeddings", None) or _CHECK_TOKENS)
    tokens = torch.tensor([real_text(model.tokenizer, most)[1]])
    return tokens if int(tokens.max()) < model.config.vocab_size else random
