"""One sub-network -> a checkpoint of its own, which appears only if it computes what the sub-network computes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flextron import per_layer
from flextron.atomic import check_new, new_folder
from flextron.checkpoint import save_tokenizer
from flextron.elastic import ElasticLayer, ElasticModel, SubLayer
from flextron.errors import ExportError
from flextron.families import Axis
from flextron.subnet import Subnet

REMOTE_CODE_FILE = "modeling_flextron.py"
_CHECK_SHAPE = (2, 16)  # of the tokens on which both models are compared
_CHECK_SEED = 0
_TOLERANCES = {torch.float16: 0.05, torch.bfloat16: 0.05}  # of the largest logit
_TOLERANCE = 1e-3  # the same, of wider types

_Sizes = dict[str, int]
"""Config field -> value, of one layer."""


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
    largest_logit_difference: float
    """Between the elastic model as `subnet` and the reloaded checkpoint, on seeded random tokens."""

    def __str__(self) -> str:
        needs = ""
        if self.architecture.startswith(per_layer.PREFIX):
            needs = "\n  loads by AutoModelForCausalLM after `import flextron`"
            needs += ", or with its code beside it by trust_remote_code=True"
        return (
            f"wrote {self.folder}: {self.architecture}, {self.subnet}\n"
            f"  {self.share:.1%} of the layers' weights; parameters asked {self.parameters_asked:,}, "
            f"got {self.parameters_got:,} ({self.bytes_got / 1e6:.1f} MB)\n"
            f"  loaded again: logits differ by at most {self.largest_logit_difference:.2g}{needs}"
        )


def export(
    model: ElasticModel, subnet: Subnet, folder: str | Path, *, overwrite: bool = False, remote_code: bool = False
) -> ExportReport:
    """Write `subnet` as a checkpoint of its own, reload it, and compare; nothing appears unless both agree.

    Equal widths without 0 give the original's own architecture where its config can state them. Other widths give
    `flextron_<original>` with the standard `per_layer_config`, which `AutoModelForCausalLM` loads after
    `import flextron`; `remote_code=True` lays its code beside it, for `trust_remote_code=True` without flextron.

    Raises:
        SubnetError: not in the search space of this model.
        ExportError: the architecture cannot state these sizes, or the reloaded checkpoint computes something else.
        CheckpointError: the folder exists and `overwrite` is false, no space, or a write that failed.
    """
    check_new(folder, overwrite=overwrite)
    model.search_space.check(subnet)
    _refuse_odd_heads(model, subnet)
    per_layer.register()
    exported = _build(model, subnet)
    needs_bytes = sum(p.numel() * p.element_size() for p in exported.parameters())
    with new_folder(folder, overwrite=overwrite, needs_bytes=needs_bytes) as partial:
        _write(exported, model, partial, remote_code=remote_code)
        reloaded = _reload(partial, model)
        return ExportReport(
            folder=str(folder),
            architecture=exported.config.model_type,
            subnet=subnet,
            share=model.share(subnet),
            parameters_asked=_parameters_asked(model, subnet),
            parameters_got=reloaded.num_parameters(),
            bytes_got=sum(file.stat().st_size for file in partial.glob("*.safetensors")),
            largest_logit_difference=_compare(model, subnet, reloaded),
        )


def _refuse_odd_heads(model: ElasticModel, subnet: Subnet) -> None:
    full = model.search_space.kv_groups[-1]
    for layer, heads in enumerate(subnet.kv_groups):
        if 0 < heads < full and not model.family.exports_fewer_heads:
            raise ExportError(
                f"layer {layer} keeps {heads} of {full} attention heads, which {model.config.model_type} cannot state: "
                f"its head size is always hidden size / heads. Keep {full} or 0 heads in each layer; "
                "the MLP widths are free."
            )


def _build(model: ElasticModel, subnet: Subnet) -> PreTrainedModel:
    """The exported model; its weights are views of the elastic model's."""
    sizes = [
        _sizes(layer, neurons, kv_groups)
        for layer, neurons, kv_groups in zip(model.layers, subnet.neurons, subnet.kv_groups, strict=True)
    ]
    state = _state(model, subnet)
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


def _sizes(layer: ElasticLayer, neurons: int, kv_groups: int) -> _Sizes:
    return {**_axis_sizes(layer.mlp, neurons), **_axis_sizes(layer.attention, kv_groups)}


def _axis_sizes(sub_layer: SubLayer, units: int) -> _Sizes:
    counts, *shrinks = sub_layer.axis.config_keys
    return {counts: units, **dict.fromkeys(shrinks, units * sub_layer.heads_per_unit)}


def _plain_config(model: ElasticModel, sizes: list[_Sizes]) -> Any:
    """A config of the original's own class, or None where that class refuses these sizes."""
    stated = {**_stated(model, sizes), **sizes[0]}
    try:
        return type(model.config).from_dict(stated)
    except (StrictDataclassError, ValueError):
        return None


def _per_layer_config(model: ElasticModel, sizes: list[_Sizes]) -> Any:
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


def _overrides(layer: _Sizes, top: _Sizes, axes: dict[str, Axis]) -> dict[str, Any]:
    skip = [name for name, axis in axes.items() if not layer[axis.config_keys[0]]]
    sizes = {key: size for key, size in layer.items() if size not in (0, top[key])}
    return {**sizes, "skip": skip} if skip else dict(sizes)


def _stated(model: ElasticModel, sizes: list[_Sizes]) -> dict[str, Any]:
    """What the original's config states, and the head size where it no longer follows from the number of heads."""
    stated: dict[str, Any] = model.config.to_dict()
    del stated["model_type"]  # of the config class; as a value it would hide that
    attention = model.layers[0].attention
    full = _axis_sizes(attention, attention.width.full)
    if any(layer[key] not in (0, full[key]) for layer in sizes for key in full):
        stated["head_dim"] = attention.closing_size // (attention.width.full * attention.heads_per_unit)
    return stated


def _state(model: ElasticModel, subnet: Subnet) -> dict[str, torch.Tensor]:
    """The state dict of the full model, cut to `subnet`."""
    state: dict[str, torch.Tensor] = model.lm.state_dict()
    with model.use(subnet):
        for index, layer in enumerate(model.layers):
            for sub_layer in (layer.mlp, layer.attention):
                _cut(state, f"{model.family.layers}.{index}.", sub_layer)
    return state


def _cut(state: dict[str, torch.Tensor], prefix: str, sub_layer: SubLayer) -> None:
    axis = sub_layer.axis
    if not sub_layer.width.kept:
        for key in [key for key in state if key.startswith(f"{prefix}{axis.module}.")]:
            del state[key]
        return
    for path, module in zip(axis.opens, sub_layer.opens, strict=True):
        for name, dim in ((f"{prefix}{path}.weight", _rows(module)), (f"{prefix}{path}.bias", 0)):
            if name in state:
                state[name] = _first(state[name], sub_layer, dim=dim)
    weight = f"{prefix}{axis.closes}.weight"
    state[weight] = _first(state[weight], sub_layer, dim=1 - _rows(sub_layer.closes))


def _first(weight: torch.Tensor, sub_layer: SubLayer, *, dim: int) -> torch.Tensor:
    """What the kept units own; of GPT-2's stacked Q, K, V that is the whole, for it exports all heads or none."""
    return weight.narrow(dim, 0, sub_layer.width.of(weight.shape[dim]))


def _rows(projection: nn.Module) -> int:
    """The dimension of a weight that counts outputs; GPT-2's Conv1D is [in, out]."""
    return 0 if isinstance(projection, nn.Linear) else 1


def _write(exported: PreTrainedModel, model: ElasticModel, folder: Path, *, remote_code: bool) -> None:
    if remote_code and exported.config.model_type.startswith(per_layer.PREFIX):
        classes = per_layer.CLASSES[model.config.model_type]
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        module = REMOTE_CODE_FILE.removesuffix(".py")
        exported.config.auto_map = {auto: f"{module}.{cls.__name__}" for auto, cls in zip(autos, classes, strict=True)}
        shutil.copyfile(per_layer.__file__, folder / REMOTE_CODE_FILE)
    exported.save_pretrained(folder)
    save_tokenizer(model.tokenizer, folder)


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


def _parameters_asked(model: ElasticModel, subnet: Subnet) -> int:
    dropped = model.layer_weights(model.search_space.full) - model.layer_weights(subnet)
    for layer, neurons, kv_groups in zip(model.layers, subnet.neurons, subnet.kv_groups, strict=True):
        for sub_layer, units in ((layer.mlp, neurons), (layer.attention, kv_groups)):
            if not units:
                module = layer.module.get_submodule(sub_layer.axis.module)
                dropped += sum(p.numel() for p in module.parameters())
                dropped -= sub_layer.width.full * sub_layer.weights_per_unit
    return int(model.lm.num_parameters()) - dropped


@torch.inference_mode()
def _compare(model: ElasticModel, subnet: Subnet, reloaded: PreTrainedModel) -> float:
    """The largest difference of any logit.

    Raises:
        ExportError: it is too large to be rounding.
    """
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    tokens = torch.randint(model.config.vocab_size, _CHECK_SHAPE, generator=generator).to(model.device)
    with model.use(subnet), _evaluating(model.lm):
        wanted = model(tokens).logits.float()
    difference = float((reloaded(tokens).logits.float() - wanted).abs().max())
    limit = _TOLERANCES.get(model.dtype, _TOLERANCE) * float(wanted.abs().max())
    if not difference <= limit:
        raise ExportError(
            f"the exported checkpoint computes something else: its logits differ by up to {difference:.3g}, "
            f"more than the {limit:.3g} that rounding explains. Nothing was kept; please report it."
        )
    return difference


@contextmanager
def _evaluating(lm: nn.Module) -> Iterator[None]:
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)
