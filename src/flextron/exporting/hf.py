"""Export one sub-network as a transformers checkpoint, and check that it computes the same."""

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
from flextron.elastic.checkpoint import LARGEST_FILE, save_tokenizer
from flextron.elastic.model import ElasticModel
from flextron.elastic.older_transformers import add_old_names
from flextron.elastic.source import METADATA_FILE
from flextron.errors import CheckpointError, ExportError
from flextron.exporting.card import CARD, model_card
from flextron.exporting.checking import evaluating, real_text
from flextron.exporting.cutting import Sizes, axis_sizes, cut_state, layer_sizes, parameters_asked, refuse_odd_heads
from flextron.subnet import Subnet

REMOTE_CODE_FILE = "modeling_flextron.py"
_CHECK_TOKENS = 128  # tokens of a real text, on which both models are compared
_CHECK_SHAPE = (2, 16)  # shape of random tokens, used without a tokenizer
_CHECK_SEED = 0
_TOLERANCES = {torch.float16: 0.05, torch.bfloat16: 0.05}  # relative to the largest logit
_TOLERANCE = 1e-3  # the same, for wider dtypes


@dataclass(frozen=True)
class ExportReport:
    """What an export was asked for, and what the reloaded checkpoint holds."""

    folder: str
    architecture: str
    """The exported `model_type`: the original's, or flextron_<original> if layers differ in width."""
    subnet: Subnet
    share: float
    """Share of the layers' weights that `subnet` keeps, 0 to 1."""
    parameters_asked: int
    """The full model's parameters minus those of dropped units; a sub-layer of width 0 drops all it has."""
    parameters_got: int
    """Number of parameters of the reloaded checkpoint, tied ones once."""
    bytes_got: int
    """Size of the weight files in bytes."""
    largest_logit_difference: float | None
    """Between the elastic model as `subnet` and the reloaded checkpoint, on a real text; None if not verified."""

    def __str__(self) -> str:
        needs = ""
        if self.architecture.startswith(per_layer.PREFIX):
            needs = "\n  load it with AutoModelForCausalLM after `import flextron`"
            needs += ", or with trust_remote_code=True if exported with its code"
        checked = "not verified"
        if self.largest_logit_difference is not None:
            checked = f"reloaded: logits differ by at most {self.largest_logit_difference:.2g}"
        return (
            f"wrote {self.folder}: {self.architecture}, {self.subnet}\n"
            f"  {self.share:.1%} of the layers' weights; {self.parameters_asked:,} parameters expected, "
            f"{self.parameters_got:,} written ({self.bytes_got / 1e6:.1f} MB)\n"
            f"  {checked}{needs}"
        )


def check_not_elastic(folder: str | Path) -> None:
    """Check that `folder` is not an elastic checkpoint, because no export replaces one.

    Raises:
        CheckpointError: it is one.
    """
    if (Path(folder) / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{folder} is an elastic checkpoint, which an export never replaces. Name another folder."
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
    """Write `subnet` as a standalone checkpoint, reload it, and compare; if they differ, nothing is kept.

    Equal widths without 0 give the original's own architecture if its config can express them. Other widths give
    `flextron_<original>` with the standard `per_layer_config`, which `AutoModelForCausalLM` loads after
    `import flextron`. `remote_code=True` adds the code to the folder, so that it loads without flextron by
    `trust_remote_code=True`. `verify=False` skips the comparison.

    Raises:
        SubnetError: `subnet` is not in the search space of this model.
        ExportError: the architecture cannot express these sizes, or the reloaded checkpoint computes something else.
        CheckpointError: the folder exists and `overwrite` is false, the disk is full, or a write failed.
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
    """Return the exported model; its weights are views of the elastic model's."""
    model.check_float("export")
    sizes = layer_sizes(model, subnet)
    state = cut_state(model, subnet)
    config = _plain_config(model, sizes) if subnet.is_uniform and not _skipped(subnet, 0) else None
    lm_class = type(model.lm)
    if config is None:
        config, lm_class = (
            _per_layer_config(model, subnet, sizes),
            per_layer.classes_of(model.config.model_type).causal_lm,
        )
    try:
        with torch.device("meta"):
            exported = lm_class(config)
        exported.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{config.model_type} cannot hold {subnet}. Keep the full width of the sub-layers in this message: {error}"
        ) from error
    exported.tie_weights()
    exported.generation_config = copy.deepcopy(model.lm.generation_config)
    return exported


def _plain_config(model: ElasticModel, sizes: list[Sizes]) -> Any:
    """Return a config of the original's own class, or None if that class refuses these sizes."""
    stated = {**_stated(model, sizes), **_largest(model, sizes)}
    try:
        return type(model.config).from_dict(stated)
    except (StrictDataclassError, ValueError):
        return None


def _per_layer_config(model: ElasticModel, subnet: Subnet, sizes: list[Sizes]) -> Any:
    """Return a config whose fields are the largest of any layer; `per_layer_config` lists the layers that differ."""
    config = model.config
    top = _largest(model, sizes)
    overrides = {index: _overrides(layer, top, _skipped(subnet, index)) for index, layer in enumerate(sizes)}
    stated = {
        **_stated(model, sizes),
        **top,
        "per_layer_config": {index: override for index, override in overrides.items() if override},
    }
    return per_layer.classes_of(config.model_type).config.from_dict(stated)


def _largest(model: ElasticModel, sizes: list[Sizes]) -> Sizes:
    """The largest value of each field in any layer; in mixtures, layers of unlike kinds have fields of their own."""
    keys = dict.fromkeys(key for layer in sizes for key in layer)
    return {key: max(layer.get(key, 0) for layer in sizes) or getattr(model.config, key) for key in keys}


def _skipped(subnet: Subnet, layer: int) -> list[str]:
    """What a layer leaves out, in the words of `per_layer`."""
    names = {"attention": subnet.kv_groups, "mlp": subnet.neurons}
    return [name for name, widths in names.items() if not widths[layer]]


def _overrides(layer: Sizes, top: Sizes, skip: list[str]) -> dict[str, Any]:
    sizes = {key: size for key, size in layer.items() if size not in (0, top[key])}
    return {**sizes, "skip": skip} if skip else dict(sizes)


def _stated(model: ElasticModel, sizes: list[Sizes]) -> dict[str, Any]:
    """Return the original's config, with the head size if it no longer follows from the number of heads."""
    stated: dict[str, Any] = model.config.to_dict()
    del stated["model_type"]  # an attribute of the config class; a value would hide it
    attention = model.layers[0].attention
    full = axis_sizes(attention, attention.width.full)
    if any(layer[key] not in (0, full[key]) for layer in sizes for key in full):
        stated["head_dim"] = attention.closing_size // (attention.width.full * attention.heads_per_unit)
    return stated


def _write(exported: PreTrainedModel, model: ElasticModel, subnet: Subnet, folder: Path, *, remote_code: bool) -> None:
    if remote_code and exported.config.model_type.startswith(per_layer.PREFIX):
        classes = per_layer.classes_of(model.config.model_type)
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        module = REMOTE_CODE_FILE.removesuffix(".py")
        exported.config.auto_map = {auto: f"{module}.{cls.__name__}" for auto, cls in zip(autos, classes, strict=True)}
        shutil.copyfile(per_layer.__file__, folder / REMOTE_CODE_FILE)
    exported.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    add_old_names(folder / "config.json")
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
        raise ExportError(f"the exported checkpoint does not load: {error}. Please report this.") from error
    return reloaded.to(model.device).eval()


@torch.inference_mode()
def _compare(model: ElasticModel, subnet: Subnet, reloaded: PreTrainedModel) -> float:
    """Return the largest difference of any logit.

    Raises:
        ExportError: it is larger than rounding explains.
    """
    tokens = _check_tokens(model).to(model.device)
    with model.use(subnet), evaluating(model.lm):
        expected = model(tokens).logits.float()
    difference = float((reloaded(tokens).logits.float() - expected).abs().max())
    limit = _TOLERANCES.get(model.dtype, _TOLERANCE) * float(expected.abs().max())
    if not difference <= limit:
        raise ExportError(
            f"the exported checkpoint computes something else: its logits differ by up to {difference:.3g}, "
            f"more than the {limit:.3g} that rounding explains. Nothing was kept; please report it."
        )
    return difference


def _check_tokens(model: ElasticModel) -> torch.Tensor:
    """Return the tokens on which both models are compared, [B, T]."""
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    random = torch.randint(model.config.vocab_size, _CHECK_SHAPE, generator=generator)
    if model.tokenizer is None:
        return random
    count = min(_CHECK_TOKENS, getattr(model.config, "max_position_embeddings", None) or _CHECK_TOKENS)
    tokens = torch.tensor([real_text(model.tokenizer, count)[1]])
    return tokens if int(tokens.max()) < model.config.vocab_size else random
