"""Whether the kernels compute what a model computes: its modules are looked at, then a few tokens run both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import ClosingLinear, OpeningLinear, Projection
from flextron.elastic.quantized import OutputLinear
from flextron.inference.lean.parts import activation_of, last_norm, projections, projections_of, roles_of
from flextron.inference.lean.room import Places
from flextron.inference.lean.weights import Kind
from flextron.subnet import AXES

_RECORDING = "flextron_recording"
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles do not change with the length of the text."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Of log-probabilities in nats, at most of the words, for the middle one of the tokens: rounding makes some tokens go
astray in both passes, where an activation is huge. A bfloat16 model is held against its own weights in float32."""


def has_the_parts(model: ElasticModel) -> bool:
    """Return whether the modules are those of a model like Llama, on a CPU, in a type that the kernels read."""
    lm: Any = model.lm
    inner: Any = getattr(lm, "model", None)
    return bool(
        model.device.type == "cpu"
        and not lm.training
        and lm.config._attn_implementation in ("sdpa", "eager")
        and lm.dtype in TOLERANCES
        and {parameter.dtype for parameter in lm.parameters()} <= {lm.dtype, torch.int8}
        and all(isinstance(projection, Projection) for layer in model.layers for projection in projections_of(layer))
        and len({projection.weight.dtype for layer in model.layers for projection in projections_of(layer)}) == 1
        and all(hasattr(inner, name) for name in ("embed_tokens", "rotary_emb"))
        and last_norm(lm) is not None
        and _ropes(inner.rotary_emb) <= _FIXED_ROPE
        and type(lm.get_output_embeddings()) in (nn.Linear, OutputLinear)
        and len({layer.attention.heads_per_unit for layer in model.layers}) == 1
        and all(
            roles_of(layer.module) is not None
            and len(layer.mlp.opens) in (1, 2)
            and len(layer.attention.opens) == 3
            and activation_of(layer)
            and all(_is_plain(layer.module, path, p) for sub in layer.subs.values() for path, p in projections(sub))
            for layer in model.layers
        )
    )


def _ropes(rotary: Any) -> set[str | None]:
    """Kinds of rotary embeddings, one for each type of layer where they differ."""
    kind = getattr(rotary, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind}


def _is_plain(layer: nn.Module, path: str, projection: Any) -> bool:
    """Return whether a projection is a Linear at its usual path, without adapter, whole in memory."""
    is_linear = type(projection) in (OpeningLinear, ClosingLinear)
    weight = projection.weight
    is_whole = projection.stacked == 1 and (weight.is_contiguous() or weight.t().is_contiguous())
    return bool(is_linear and is_whole and layer.get_submodule(path) is projection)


@torch.inference_mode()
def kinds_if_equal(model: ElasticModel, make_step: Callable[[ElasticModel, Sequence[Kind]], Any]) -> list[Kind] | None:
    """Return the kinds of the attentions, if a step gives the logits of the model's own forward pass.

    Args:
        make_step: makes the `LeanStep` to try.
    """
    lm: Any = model.lm
    size = 7
    tokens = torch.linspace(1, lm.get_input_embeddings().weight.shape[0] - 1, size).long()[None]
    with model.use(model.search_space.full), _in_float32(lm):
        kinds = _recorded(lm, tokens)
        expected = lm(tokens, use_cache=False).logits[0].float()
    found_kinds = [kinds.get(i, (1.0, 0, 0.0)) for i in range(len(model.layers))]
    step = make_step(model, found_kinds)
    places = Places(range(size), range(size), [[0]] * size, size)
    caches = [step.new_cache(size, step.groups) for _ in model.layers]
    neurons_LM, groups_LM = (
        np.array([[layer[axis].width.full] * size for layer in model.layers], np.int64) for axis in AXES
    )
    cached = [layer.attention.width.full for layer in model.layers]
    found = step.logits(tokens[0].tolist(), places, caches, neurons_LM, groups_LM, cached, range(size))
    apart_N = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().amax(-1)
    return found_kinds if apart_N.median() <= TOLERANCES[lm.dtype] else None


@contextmanager
def _in_float32(lm: Any) -> Iterator[None]:
    """Compute in float32 inside the block: each module has wider copies of its weights while it runs, and only then."""
    kept: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _inputs: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    kept[parameter], parameter.data = parameter.data, parameter.data.float()

    def narrow(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for parameter in module.parameters():
            parameter.data = kept.pop(parameter, parameter.data)

    with ExitStack() as hooks:
        for module in (lm.model.embed_tokens, *lm.model.layers, last_norm(lm), lm.get_output_embeddings()):
            hooks.callback(module.register_forward_pre_hook(widen).remove)
            hooks.callback(module.register_forward_hook(narrow, always_call=True).remove)
        yield


def _recorded(lm: Any, tokens: torch.Tensor) -> dict[int, Kind]:
    """Run the model's own forward pass, and note how each attention is asked to weigh."""
    kinds: dict[int, Kind] = {}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **asked: Any
    ) -> tuple[torch.Tensor, None]:
        scale = asked.get("scaling") or query.shape[-1] ** -0.5
        kinds[module.layer_idx] = (float(scale), asked.get("sliding_window") or 0, float(asked.get("softcap") or 0))
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register(_RECORDING, record)
    before = lm.config._attn_implementation
    try:
        lm.config._attn_implementation = _RECORDING
        lm(tokens, use_cache=False)
    finally:
        lm.config._attn_implementation = before
    return kinds
