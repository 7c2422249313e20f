"""`LeanStep`: a few tokens through an elastic model on a CPU, each with its own widths, by compiled kernels.

transformers' forward pass of SmolLM2 takes some 2,000 operations, whose calls cost as much time as reading the weights.
Here all layers are one call of `kernels`, which reads torch's own memory: no weight of a projection is held twice.
Those of closing projections are laid out anew, column by column (`columns`).

Which models it computes right is not listed but found out: `LeanStep.of` runs a few tokens both ways and compares.

Shapes: M rows (tokens, rounded up to 1, 2, 4 or a multiple of 8), L layers, D model, G KV groups, S head size.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from flextron.elastic.loss import logits_of
from flextron.elastic.model import ElasticLayer, ElasticModel, SubLayer
from flextron.elastic.projections import ClosingLinear, OpeningLinear, Projection
from flextron.elastic.quantized import FourBits, OutputLinear
from flextron.subnet import AXES

_PARTS = 4
"""Parts of a closing projection's inputs whose sums are added, whatever the number of threads: so is the result."""
MOST_TOKENS = 128
"""Up to so many tokens a step is lean; with more, torch's products are faster than the kernels'."""
_RECORDING = "flextron_recording"
_ACTIVATIONS = {
    **dict.fromkeys(("SiLUActivation", "SiLU"), 0),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), 1),
    **dict.fromkeys(("GELUActivation", "GELU"), 2),
    "ReLU": 3,
    "ReLUSquaredActivation": 4,
}
"""By class: silu, gelu by a tangent, gelu, relu, its square."""
_ROLES: dict[frozenset[str], tuple[str | None, ...]] = {
    frozenset(role for role in roles if role): roles
    for roles in (
        ("input_layernorm", "post_attention_layernorm", None, None),
        ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
        (None, None, "post_attention_layernorm", "post_feedforward_layernorm"),
        ("input_layernorm", "input_layernorm", None, None),  # side by side
    )
}
"""Norms of a layer before attention, before the MLP, after attention and after the MLP, by all their names."""
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles do not change with the length of the text."""
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Of log-probabilities in nats, at most of the words, for the middle one of the tokens: rounding makes some tokens go
astray in both passes, where an activation is huge. A bfloat16 model is held against its own weights in float32."""
_NONE = np.empty(0, np.float32)
_lock = threading.Lock()  # Numba's simplest pool of threads takes one caller at a time

Matrix = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weight, scales, and bias; the last two may be empty."""
_NO_GATE: Matrix = (_NONE, _NONE, _NONE)
Kind = tuple[float, int, float]
"""How an attention weighs: the scale of its scores, how many tokens back it sees or 0, the cap of its scores or 0."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step stand in their texts, and where the texts' keys and values are."""

    positions: Sequence[int]
    """Of each token in its text."""
    slots: Sequence[int]
    """Where each token's key and value go, in the first dimension of the cache."""
    tables: Sequence[Sequence[int]]
    """Pages of each token's text."""
    page: int
    """Tokens of a page."""


class _Norm:
    """An RMSNorm, a LayerNorm, or nothing. What it computes is asked of the module: some add 1 to their weight."""

    def __init__(self, module: Any) -> None:
        self.weight, self.bias, self.epsilon = _NONE, _NONE, 0.0
        if module is not None:
            epsilon = getattr(module, "variance_epsilon", None)
            self.epsilon = float(module.eps if epsilon is None else epsilon)
            asked = copy.deepcopy(module).float()
            signs_D = torch.ones_like(asked.weight)  # their mean is 0, and that of their squares 1
            signs_D[1::2] = -1
            one_D, other_D = asked(signs_D), asked(-signs_D)
            self.weight = ((one_D - other_D) / 2 * signs_D * (1 + self.epsilon) ** 0.5).detach().numpy()
            if torch.allclose(asked(signs_D + 1), one_D, atol=1e-5):
                self.bias = ((one_D + other_D) / 2).detach().numpy()

    @property
    def of_kernel(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Weight, bias and epsilon, as `kernels.normalize` takes them."""
        return self.weight, self.bias, self.epsilon


class _Weights:
    """What `kernels.layers` needs to know of a model; see there. It keeps alive what it holds the addresses of."""

    def __init__(self, layers: Sequence[ElasticLayer], kinds: Sequence[Kind], angles: _Angles) -> None:
        matrices = [[matrix for sub in (layer.mlp, layer.attention) for matrix in _matrices(sub)] for layer in layers]
        norms = [[_Norm(module) for module in _norms(layer.module)] for layer in layers]
        self._alive = matrices, norms
        self.of_kernel = (
            matrices[0][1][0][:0],
            np.array([[[_address(part) for part in matrix] for matrix in row] for row in matrices], np.int64),
            np.array([[(_address(norm.weight), _address(norm.bias)) for norm in row] for row in norms], np.int64),
            np.array([[layer.mlp.width.full, layer.attention.width.full] for layer in layers], np.int64),
            np.array(
                [
                    [
                        angles.kind_of(index) if _rotates(layer) else -1,
                        _ACTIVATIONS[_activation(layer)],
                        window,
                        _is_side_by_side(layer),
                    ]
                    for index, (layer, (_, window, _)) in enumerate(zip(layers, kinds, strict=True))
                ],
                np.int64,
            ),
            np.array(
                [
                    [*(norm.epsilon for norm in row), _residual_factor(layer), scale, cap]
                    for row, layer, (scale, _, cap) in zip(norms, layers, kinds, strict=True)
                ]
            ),
        )


def _roles(layer: nn.Module) -> tuple[str | None, ...] | None:
    """Names of a layer's norms by what they do; None if it has other parts, or they have other names."""
    names = {name for name, module in layer.named_children() if not isinstance(module, nn.Dropout)}
    return _ROLES.get(frozenset(names - {"self_attn", "mlp"})) if {"self_attn", "mlp"} <= names else None


def _is_side_by_side(layer: ElasticLayer) -> bool:
    """Whether the MLP reads what the attention reads."""
    before_attention, before_mlp, *_ = _roles(layer.module) or (None, "")
    return before_attention is not None and before_attention == before_mlp


def _norms(layer: Any) -> list[Any]:
    before_attention, before_mlp, after_attention, after_mlp = (
        role and getattr(layer, role) for role in _roles(layer) or ()
    )
    of_heads = (
        getattr(layer.self_attn, f"{which}_norm", None) or getattr(layer.self_attn, f"{which}_layernorm", None)
        for which in "qk"
    )
    return [before_attention, before_mlp, *of_heads, after_attention, after_mlp]


def _last_norm(lm: Any) -> Any:
    return getattr(lm.model, "norm", None) or getattr(lm.model, "final_layernorm", None)


def _rotates(layer: ElasticLayer) -> bool:
    return bool(getattr(layer.module.self_attn, "use_rope", True))


def _activation(layer: ElasticLayer) -> str:
    """Class of an MLP's activation, of those that the kernels know; empty if there is none."""
    kinds = (type(module).__name__ for module in layer.module.get_submodule("mlp").children())
    return next((kind for kind in kinds if kind in _ACTIVATIONS), "")


def _residual_factor(layer: ElasticLayer) -> float:
    return float(getattr(layer.module, "residual_multiplier", 1.0))


class LeanStep:
    """Runs steps of up to `MOST_TOKENS` tokens. It holds views of the weights, and copies of the norms' weights.

    The weights of closing projections lie in memory column by column from then on; nothing else about them changes.
    """

    def __init__(self, model: ElasticModel, kinds: Sequence[Kind]) -> None:
        """Prepare a model; `of` knows whether it can be run.

        Args:
            kinds: of each layer's attention.
        """
        lm: Any = model.lm
        self._lm = lm
        self.dtype: torch.dtype = lm.dtype
        """Of the weights, and of keys and values."""
        self._angles = _Angles(lm)
        self._weights = _Weights(model.layers, kinds, self._angles)
        self._norm = _Norm(_last_norm(lm))
        self._head = _matrix(lm.get_output_embeddings())
        self._factor = float(getattr(lm.model, "embedding_multiplier", 1.0))
        first = model.layers[0]
        self.groups = first.attention.width.full
        self.head_size = first.attention.closing_size // (self.groups * first.attention.heads_per_unit)
        self._heads_per_group = first.attention.heads_per_unit
        attention = first.attention.closing_size + 2 * self.groups * self.head_size
        self._widest = max(attention, *(2 * layer.mlp.width.full for layer in model.layers))
        self._rooms: dict[int, _Room] = {}
        self._memory = _Memory()

    @classmethod
    def of(cls, model: ElasticModel) -> LeanStep | None:
        """Return a step for a model; None where this does not compute what the model computes."""
        if not _has_the_parts(model):
            return None
        try:
            if model.lm not in _kinds_of:
                with _told("preparing fast decoding; at its first use on a machine this compiles for some 25 seconds"):
                    _kinds_of[model.lm] = _kinds_if_equal(model)
            kinds = _kinds_of[model.lm]
        except (RuntimeError, TypeError, AttributeError, IndexError):  # its modules do not fit together as Llama's do
            kinds = _kinds_of[model.lm] = None
        return None if kinds is None else cls(model, kinds)

    def new_cache(self, tokens: int, groups: int) -> torch.Tensor:
        """Return room for keys and values of the first groups of one layer, [tokens, 2, groups, S]."""
        return torch.zeros(tokens, 2, groups, self.head_size, dtype=self.dtype)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[int],
        places: Places,
        caches: Sequence[torch.Tensor],
        neurons_LM: np.ndarray,
        groups_LM: np.ndarray,
        cached_groups_L: Sequence[int],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Run tokens and return the logits after those at the places `wanted`, [len(wanted), V] in float32.

        Args:
            tokens: at most `MOST_TOKENS`; they may be of several texts.
            caches: of each layer, [tokens, 2, G, S].
            neurons_LM: neurons that each token uses in each layer, int64.
            groups_LM: KV groups that each token uses in each layer, int64.
            cached_groups_L: KV groups whose keys and values are written.
        """
        from flextron.inference import kernels  # Numba takes a second to import, which not all need

        count = len(tokens)
        room = self._room(_rounded(count))
        ids = torch.tensor(tokens)
        h_ND = self._lm.model.embed_tokens(ids).float() * self._factor
        room.fill(h_ND, *self._angles.of(places.positions), places)
        addresses = [(cache.data_ptr(), *cache.shape[::2]) for cache in caches]
        groups_LM = room.padded(groups_LM)
        heads = int(groups_LM.max()) * self._heads_per_group
        opened, hidden = (self._memory.of(name, len(room.h) * self._widest) for name in ("opened", "hidden"))
        scores = self._memory.of("scores", len(room.h) * heads * (int(room.positions.max()) + 1))
        with _lock, _in_threads_of_torch() as threads:
            kernels.layers(
                room.h,
                self._weights.of_kernel,
                (self._heads_per_group, self.head_size),
                (room.cos, room.sin),
                (room.tables, room.page, room.positions, room.slots),
                np.array(addresses, np.int64),
                _array(caches[0][:0].flatten()),
                room.padded(neurons_LM),
                groups_LM,
                np.array(cached_groups_L, np.int64),
                (room.normed, opened, hidden, scores, room.sums, -(-threads // _PARTS)),
            )
            chosen_MD = np.zeros((_rounded(len(wanted)), room.h.shape[1]), np.float32)
            chosen_MD[: len(wanted)] = room.h[list(wanted)]
            kernels.normalize(chosen_MD, self._norm.of_kernel, chosen_MD)
            return logits_of(self._lm, torch.from_numpy(chosen_MD), self._product)[: len(wanted)]

    def _product(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Multiply by the output projection, [M, V]."""
        from flextron.inference import kernels

        y_VM = np.empty((len(self._head[0]), len(x_MD)), np.float32)
        kernels.product(self._head, x_MD.numpy(), y_VM)
        return torch.from_numpy(y_VM).t().contiguous()

    def _room(self, rows: int) -> _Room:
        if rows not in self._rooms:
            self._rooms[rows] = _Room(rows, self._lm.config.hidden_size, len(self._angles.kinds))
        return self._rooms[rows]


class _Angles:
    """Cosines and sines of the positions so far: asking the module for them takes 0.1 ms a step."""

    def __init__(self, lm: Any) -> None:
        self._rotary = lm.model.rotary_emb
        types = lm.config.layer_types if isinstance(self._rotary.rope_type, dict) else [None]
        self._types: list[str | None] = types
        self.kinds = sorted(set(types), key=str)
        """Types of layers with angles of their own; one, None, where all have the same."""
        self._cos_ATR = self._sin_ATR = np.zeros((len(self.kinds), 0, 0), np.float32)

    def kind_of(self, layer: int) -> int:
        """Index in `kinds` of a layer's."""
        return self.kinds.index(self._types[layer % len(self._types)])

    def of(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, each [A, N, R]."""
        if max(positions) >= self._cos_ATR.shape[1]:
            ids = torch.arange(max(256, 2 * max(positions)))
            both = [self._rotary(torch.zeros(1), ids[None], *([kind] if kind else ())) for kind in self.kinds]
            self._cos_ATR, self._sin_ATR = (torch.cat(each).float().numpy() for each in zip(*both, strict=True))
        chosen = list(positions)
        return self._cos_ATR[:, chosen], self._sin_ATR[:, chosen]


class _Memory:
    """Arrays of float32 that steps of all sizes use in turn; they grow, and what they hold is of no step."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def of(self, name: str, size: int) -> np.ndarray:
        """An array of at least so many numbers."""
        if name not in self._arrays or size > len(self._arrays[name]):
            self._arrays[name] = np.zeros(2 * size if name == "scores" else size, np.float32)
        return self._arrays[name]


class _Room:
    """What one step of M rows is given, used again by the next; the rows beyond the tokens hold zeros."""

    def __init__(self, rows: int, size: int, kinds_of_angles: int) -> None:
        from flextron.inference.vectors import LANES  # behind Numba, which takes a second to import

        self.h, self.normed = np.zeros((rows, size), np.float32), np.zeros((rows, size), np.float32)
        self.sums = np.zeros((_PARTS, rows, -(-size // LANES) * LANES), np.float32)
        self.positions, self.slots = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.cos = self.sin = np.zeros((kinds_of_angles, rows, 0), np.float32)
        self.tables, self.page = np.zeros((rows, 1), np.int64), 1

    def fill(self, h_ND: torch.Tensor, cos_ANR: np.ndarray, sin_ANR: np.ndarray, places: Places) -> None:
        rows, count = len(self.h), len(h_ND)
        self.h[:count], self.h[count:] = h_ND.numpy(), 0
        if self.cos.shape[2] != cos_ANR.shape[2]:
            self.cos, self.sin = (np.zeros((len(cos_ANR), rows, cos_ANR.shape[2]), np.float32) for _ in range(2))
        self.cos[:, :count], self.sin[:, :count] = cos_ANR, sin_ANR
        self.positions[:count], self.positions[count:] = places.positions, 0
        self.slots[:count], self.slots[count:] = places.slots, -1
        self.page = places.page
        self.tables = np.zeros((rows, max(len(table) for table in places.tables)), np.int64)
        for row, table in zip(self.tables, places.tables, strict=False):
            row[: len(table)] = table

    def padded(self, widths_LN: np.ndarray) -> np.ndarray:
        widths_LM = np.zeros((len(widths_LN), len(self.h)), np.int64)
        widths_LM[:, : widths_LN.shape[1]] = widths_LN
        return widths_LM


_kinds_of: WeakKeyDictionary[nn.Module, list[Kind] | None] = WeakKeyDictionary()


def _has_the_parts(model: ElasticModel) -> bool:
    """Return whether the modules are those of a model like Llama, on a CPU, in a type that the kernels read."""
    lm: Any = model.lm
    inner: Any = getattr(lm, "model", None)
    return bool(
        model.device.type == "cpu"
        and not lm.training
        and lm.config._attn_implementation in ("sdpa", "eager")
        and lm.dtype in _TOLERANCES
        and {parameter.dtype for parameter in lm.parameters()} <= {lm.dtype, torch.int8}
        and all(isinstance(projection, Projection) for layer in model.layers for projection in _projections_of(layer))
        and len({projection.weight.dtype for layer in model.layers for projection in _projections_of(layer)}) == 1
        and all(hasattr(inner, name) for name in ("embed_tokens", "rotary_emb"))
        and _last_norm(lm) is not None
        and _ropes(inner.rotary_emb) <= _FIXED_ROPE
        and type(lm.get_output_embeddings()) in (nn.Linear, OutputLinear)
        and len({layer.attention.heads_per_unit for layer in model.layers}) == 1
        and all(
            _roles(layer.module) is not None
            and len(layer.mlp.opens) in (1, 2)
            and len(layer.attention.opens) == 3
            and _activation(layer)
            and all(_is_plain(layer.module, path, p) for sub in layer.subs.values() for path, p in _projections(sub))
            for layer in model.layers
        )
    )


def _ropes(rotary: Any) -> set[str | None]:
    """Kinds of rotary embeddings, one for each type of layer where they differ."""
    kind = getattr(rotary, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind}


def _projections_of(layer: ElasticLayer) -> Iterator[Any]:
    return (projection for sub in layer.subs.values() for _, projection in _projections(sub))


def _projections(sub: SubLayer) -> zip[tuple[str, Any]]:
    return zip((*sub.axis.opens, sub.axis.closes), (*sub.opens, sub.closes), strict=True)


def _is_plain(layer: nn.Module, path: str, projection: Any) -> bool:
    """Return whether a projection is a Linear at its usual path, without adapter, whole in memory."""
    is_linear = type(projection) in (OpeningLinear, ClosingLinear)
    weight = projection.weight
    is_whole = projection.stacked == 1 and (weight.is_contiguous() or weight.t().is_contiguous())
    return bool(is_linear and is_whole and layer.get_submodule(path) is projection)


@torch.inference_mode()
def _kinds_if_equal(model: ElasticModel) -> list[Kind] | None:
    """Return the kinds of the attentions, if a lean step gives the logits of the model's own forward pass."""
    lm: Any = model.lm
    size = 7
    tokens = torch.linspace(1, lm.get_input_embeddings().weight.shape[0] - 1, size).long()[None]
    with model.use(model.search_space.full), _in_float32(lm):
        kinds = _recorded(lm, tokens)
        expected = lm(tokens, use_cache=False).logits[0].float()
    found_kinds = [kinds.get(i, (1.0, 0, 0.0)) for i in range(len(model.layers))]
    step = LeanStep(model, found_kinds)
    places = Places(range(size), range(size), [[0]] * size, size)
    caches = [step.new_cache(size, step.groups) for _ in model.layers]
    neurons_LM, groups_LM = (
        np.array([[layer[axis].width.full] * size for layer in model.layers], np.int64) for axis in AXES
    )
    cached = [layer.attention.width.full for layer in model.layers]
    found = step.logits(tokens[0].tolist(), places, caches, neurons_LM, groups_LM, cached, range(size))
    apart_N = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().amax(-1)
    return found_kinds if apart_N.median() <= _TOLERANCES[lm.dtype] else None


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
        for module in (lm.model.embed_tokens, *lm.model.layers, _last_norm(lm), lm.get_output_embeddings()):
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


@contextmanager
def _told(line: str) -> Iterator[None]:
    """Print a line to standard error, if the block takes more than two seconds."""
    timer = threading.Timer(2.0, print, [line], {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _in_threads_of_torch() -> Iterator[int]:
    """Compute in as many threads as torch does, and yield how many.

    Numba shares OpenMP with torch, and sets its number when it starts.
    """
    import numba

    threads, most = torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)
    try:
        numba.set_num_threads(min(threads, most))
        yield min(threads, most)
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _rounded(rows: int) -> int:
    return rows if rows <= 2 else -(-rows // 4) * 4


def _matrix(projection: Any) -> Matrix:
    """The arrays of an opening projection, of a closing one in 4 bits, or of the output projection."""
    held = getattr(projection, "quantized", None) or projection
    scale, bias = getattr(held, "scale", None), projection.bias
    return (
        _array(held.weight.detach()),
        _NONE if scale is None else _array(scale),
        _NONE if bias is None else bias.detach().float().numpy(),
    )


def _matrices(sub: SubLayer) -> list[Matrix]:
    if not isinstance(sub.closes.quantized, FourBits):
        _lay_out_by_columns(sub.closes.quantized or sub.closes)
    weight, scale, bias = _matrix(sub.closes)
    opens = [_matrix(projection) for projection in sub.opens]
    return [*([_NO_GATE] if len(opens) == 1 else []), *opens, (weight if weight.ndim == 3 else weight.T, scale, bias)]


def _lay_out_by_columns(holder: Any) -> None:
    """Let a matrix lie in memory column by column, where its first columns are one piece; its values stay."""
    if not holder.weight.t().is_contiguous():
        with torch.inference_mode(False), torch.no_grad():
            holder.weight.data = holder.weight.data.t().contiguous().t()


def _address(array: np.ndarray) -> int:
    """Where its numbers lie; 0 if it has none."""
    return array.ctypes.data if array.size else 0


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A view; bfloat16 as the bits of uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
