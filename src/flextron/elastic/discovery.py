"""Find out where a decoder without an entry in FAMILIES keeps what narrows: from its modules and one forward pass.

In that pass, a layer's children are its sub-layers: the one whose output at a token depends on other tokens is the
attention, or what stands in its place; the other one is the MLP. Inside a sub-layer, projections that read its own
input open it, and one that reads something else and writes the residual stream closes it. A norm belongs to a
sub-layer if nothing else reads its output. What is left open (does a weight hold Q, K and V as blocks? does the code
count heads in an attribute?) is tried on a small random copy of the model, against the contract. An attention that does
not narrow can still be left out as a whole.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flextron.elastic.contract import BrokenContractError, check_causal, check_contract, random_tokens
from flextron.elastic.families import FAMILIES, Axis, Family, cannot_narrow, family_of
from flextron.elastic.observing import Calls, is_same, mixes_tokens, observed
from flextron.elastic.per_layer import PREFIX
from flextron.elastic.projections import is_projection
from flextron.elastic.shrinking import HEADS, HIDDEN, quiet, small_config, small_copy
from flextron.errors import first_line


def family_for(config: Any) -> Family:
    """The `Family` of a config: the entry in FAMILIES, or what discovery finds.

    Raises:
        UnknownFamilyError: there is no entry, and discovery finds none.
    """
    kind = config.model_type
    if kind in FAMILIES or kind.startswith(PREFIX):
        return family_of(kind)
    return found_for(config).family


def found_for(config: Any) -> Found:
    """What `discover` finds, once for each config in this process: a teacher is loaded beside its student.

    Raises:
        UnknownFamilyError: as `discover`.
    """
    key = config.to_json_string()
    if key not in _FOUND:
        _FOUND[key] = discover(config)
    return _FOUND[key]


@dataclass(frozen=True)
class Found:
    """What discovery found."""

    family: Family
    doubts: tuple[str, ...]
    """Why nothing narrower holds, one line each."""


_FOUND: dict[str, Found] = {}


def discover(config: Any) -> Found:
    """Find the `Family` of a decoder from its config. The answer has passed the contract on a small random copy.

    Raises:
        UnknownFamilyError: it cannot be made small, is no decoder of alike layers, or fails the contract; the message
            says which.
    """
    kind = config.model_type
    try:
        small = small_copy(config)
        tokens_BT = random_tokens(small)
        check_causal(small, tokens_BT)
        fewer_heads = _states_head_size(config)
        guesses = [replace(guess, exports_fewer_heads=fewer_heads) for guess in _guesses(small, tokens_BT)]
    except (BrokenContractError, _NotFoundError) as error:
        raise cannot_narrow(kind, str(error)) from None
    except Exception as error:  # configs and models refuse small sizes with errors of many types
        raise cannot_narrow(kind, f"no small copy of it runs, on which to check ({first_line(error)})") from None
    failures = []
    for family in guesses:
        try:
            check_contract(small, family)
        except BrokenContractError as error:
            failures.append(str(error))
            continue
        return Found(family, tuple(dict.fromkeys(failures)))
    raise cannot_narrow(kind, f"a small copy of it fails the contract: {failures[-1].rstrip('.')}")


def _states_head_size(config: Any) -> bool:
    """Whether a config can ask for heads of another size than hidden size / heads: then there are more weights."""
    try:
        with quiet(), torch.device("meta"):
            usual, larger = (
                AutoModelForCausalLM.from_config(small_config(config, **heads)).num_parameters()
                for heads in ({}, {"head_dim": 2 * HIDDEN // HEADS})
            )
    except Exception:  # configs refuse sizes with errors of many types
        return False
    return bool(larger > usual)


class _NotFoundError(Exception):
    """A model whose modules are not those of a decoder that narrows; the message says what is missing."""


def _guesses(lm: PreTrainedModel, tokens_BT: torch.Tensor) -> Iterator[Family]:
    """Yield specs from the one that narrows most to the one that only leaves attentions out."""
    path, layers = _layers(lm)
    if any((getattr(lm.config, name, None) or 1) > 1 for name in ("n_group", "num_expert_group")):
        raise _NotFoundError("its experts are routed in groups, so single ones cannot be left out")
    found = [_sub_layers(layer, calls) for layer, calls in zip(layers, observed(lm, layers, tokens_BT), strict=True)]
    mlps = _alike([list(_mlps(lm, sub)) for sub, _ in found])
    attentions = _alike([list(_attentions(lm, sub)) for _, sub in found])
    positions = _positions(lm)
    for attention, mlp in product(attentions, mlps):
        yield Family(layers=path, mlp=mlp, attention=attention, positions=positions)


def _layers(lm: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    count = getattr(lm.config, "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in lm.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise _NotFoundError(f"it has no list of {count} layers")
    path, layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    return path, list(layers)


@dataclass(frozen=True)
class _SubLayer:
    """A sub-layer as it was seen in one layer."""

    layer: nn.Module
    calls: Calls
    module: str
    """Its path inside the layer; empty for the layer's own projections."""
    norm: str


def _sub_layers(layer: nn.Module, calls: Calls) -> tuple[_SubLayer, _SubLayer]:
    """The MLP and the attention of a layer."""
    if "" not in calls:
        raise _NotFoundError("a layer is not called")
    size = calls[""].writes.numel()
    children = [
        name
        for name, module in layer.named_children()
        if name in calls and _weights(module) and not is_projection(module) and calls[name].writes.numel() == size
    ]
    mixers = [name for name in children if mixes_tokens(layer.get_submodule(name), calls[name])]
    others = [name for name in children if name not in mixers]
    if not mixers:
        raise _NotFoundError("a layer has no attention and nothing in its place")
    if not others and not any(is_projection(module) for module in layer.children()):
        raise _NotFoundError("a layer has no MLP")
    mlp, mixer = (
        max(names, key=lambda name: _weights(layer.get_submodule(name)), default="") for names in (others, mixers)
    )
    return (
        _SubLayer(layer, calls, mlp, _norm(layer, calls, mlp)),
        _SubLayer(layer, calls, mixer, _norm(layer, calls, mixer)),
    )


def _weights(module: nn.Module) -> int:
    """Number of weights in matrices."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _norm(layer: nn.Module, calls: Calls, module: str) -> str:
    """The norm whose output only this sub-layer reads; empty if there is none."""
    if not module:
        return ""
    reads = calls[module].reads
    readers = [name for name, _ in layer.named_children() if name in calls and is_same(calls[name].reads, reads)]
    writers = [
        name
        for name, child in layer.named_children()
        if name in calls and not _weights(child) and is_same(calls[name].writes, reads) and len([*child.parameters()])
    ]
    return writers[0] if readers == [module] and len(writers) == 1 else ""


@dataclass(frozen=True)
class _Parts:
    """The projections of a sub-layer, as paths inside the layer."""

    opens: tuple[str, ...]
    closes: str
    rows: tuple[int, ...]
    """Output size of each opening projection."""
    columns: int
    """Input size of the closing projection."""


def _parts(sub: _SubLayer) -> _Parts:
    inside = [
        path
        for path, module in sub.layer.named_modules()
        if path in sub.calls
        and is_projection(module)
        and path.startswith(f"{sub.module}." if sub.module else "")
        and (sub.module or "." not in path)
    ]
    hidden = sub.calls[""].writes.shape[-1]
    reads = sub.calls[sub.module].reads if sub.module else sub.calls[inside[0]].reads
    opens = tuple(path for path in inside if is_same(sub.calls[path].reads, reads))
    closes = [path for path in inside if path not in opens and sub.calls[path].writes.shape[-1] == hidden]
    if not closes:
        raise _NotFoundError(f"{sub.module or 'a layer'} has no projection that writes to the residual stream")
    rows = tuple(sub.calls[path].writes.shape[-1] for path in opens)
    return _Parts(opens, closes[-1], rows, sub.calls[closes[-1]].reads.shape[-1])


def _mlps(lm: PreTrainedModel, sub: _SubLayer) -> Iterator[Axis]:
    """Yield how an MLP may narrow."""
    experts = _experts(sub)
    if experts:
        yield _mixture(lm, sub, experts)
        return
    parts = _parts(sub)
    ratios = {rows / parts.columns for rows in parts.rows}
    if len(ratios) != 1 or not max(ratios).is_integer():
        raise _NotFoundError(f"{sub.module or 'the MLP'} does not open with projections to its neurons")
    yield Axis(
        parts.opens,
        parts.closes,
        tuple(_keys(lm.config, parts.columns)),
        stacked=int(ratios.pop()),
        norm=sub.norm,
        outputs=sub.calls[sub.module].outputs if sub.module else 1,
    )


def _experts(sub: _SubLayer) -> str:
    """The path of a mixture's experts, which hold 3-D weights; empty if this is none."""
    for path, module in sub.layer.named_modules():
        if path.startswith(f"{sub.module}.") and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            return str(path)
    return ""


def _mixture(lm: PreTrainedModel, sub: _SubLayer, experts: str) -> Axis:
    if experts.rpartition(".")[0] != sub.module:
        raise _NotFoundError(f"the experts of {sub.module} lie deeper than its router")
    count = next(p.shape[0] for p in sub.layer.get_submodule(experts).parameters() if p.ndim == 3)
    fields = lm.config.to_dict()  # without the other names that configs give to the field
    keys = [key for key in _EXPERTS if fields.get(key) == count]
    if not keys:
        raise _NotFoundError(f"no config field counts the {count} experts of {sub.module}")
    counters = [
        f"{sub.module}.{path}.{name}".replace("..", ".")
        for path, module in sub.layer.get_submodule(sub.module).named_modules()
        for name, value in vars(module).items()
        if type(value) is int and value == count and "expert" in name and "shared" not in path
    ]
    outputs = sub.calls[sub.module].outputs
    return Axis((), experts, (keys[0],), norm=sub.norm, counts=tuple(counters), outputs=outputs, experts=True)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _attentions(lm: PreTrainedModel, sub: _SubLayer) -> Iterator[Axis]:
    """Yield how an attention may narrow, and last how it is left out."""
    parts = _parts(sub)
    whole = Axis((), parts.closes, norm=sub.norm, outputs=sub.calls[sub.module].outputs)
    heads = getattr(lm.config, "num_attention_heads", 0)
    groups = getattr(lm.config, "num_key_value_heads", None) or heads
    if parts.opens and heads and not any(rows % groups for rows in (*parts.rows, parts.columns)):
        grouped = bool(getattr(lm.config, "num_key_value_heads", None))
        keys = ("num_key_value_heads", "num_attention_heads") if grouped else ("num_attention_heads",)
        fused = len(parts.opens) == 1
        counters = tuple(_counters(sub, parts, {heads, groups, parts.columns}))
        for stacked in (3, 1) if fused and parts.rows[0] == 3 * parts.columns else () if fused else (1,):
            for counts in {(): (), counters: ()}:
                yield replace(whole, opens=parts.opens, stacked=stacked, config_keys=keys, counts=counts)
    yield whole


def _keys(config: Any, size: int) -> Iterator[str]:
    """Config fields that count neurons."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "shared_intermediate_size")
    for name in names:
        if getattr(config, name, None) == size:
            yield name
            return


def _counters(sub: _SubLayer, parts: _Parts, sizes: Iterable[int]) -> Iterator[str]:
    """Attributes in which the attention's code counts heads or rows."""
    module = parts.closes.rpartition(".")[0]
    for name, value in vars(sub.layer.get_submodule(module)).items():
        if type(value) is int and value in sizes and _COUNTS.search(name):
            yield f"{module}.{name}"


_COUNTS = re.compile(r"heads|hidden_size|embed_dim|split_size")


def _alike(by_layer: list[list[Axis]]) -> Iterator[Axis]:
    """Join what each layer offers into axes for all layers.

    Where all layers have the same projections, that is what every layer offers. Else each kind is left out as a whole.
    """
    kinds: dict[str, list[Axis]] = {}
    for options in by_layer:
        closes = options[-1].closes
        known = kinds.get(closes, options)
        if known[-1].norm != options[-1].norm:  # the norm is this sub-layer's own in some layers only
            known, options = ([replace(axis, norm="") for axis in axes] for axes in (known, options))
        kinds[closes] = [axis for axis in known if axis in options]
    if len(kinds) == 1:
        yield from next(iter(kinds.values()))
        return
    chain: Axis | None = None
    for options in reversed(kinds.values()):
        chain = replace(options[-1], instead=chain)
    assert chain is not None  # noqa: S101 - a model has layers
    yield chain


def _positions(lm: PreTrainedModel) -> str:
    """The table of learned positions outside the layers; empty if there is none."""
    words = lm.get_input_embeddings()
    longest = getattr(lm.config, "max_position_embeddings", None)
    for path, module in lm.named_modules():
        is_table = isinstance(module, nn.Embedding) and module is not words
        if is_table and longest and 0 <= module.num_embeddings - longest <= 2:
            return str(path)
    return ""
