"""`Decoder`: fast decoding on a CPU, token by token, in a loop of our own.

Each new token reads every weight once, so memory bandwidth limits the speed. `F.linear` on one row calls MKL's gemv,
which runs in one thread; `torch.bmm` over equal pieces of the rows runs in all threads (30 against 11 GB/s, fp32,
2 threads, AMD EPYC). The prompt goes through transformers' own forward pass.

`Decoder.steps` computes several tokens as one matrix product, which reads the weights once for all of them.

Shapes: B batch (1), T time, S tokens of one pass, D model, G KV groups kept, Q query heads per group, H head size,
N neurons kept, V words. A product y = W x + b has W [P, R, K]: P pieces of R rows each, K columns; x [K], y [P * R].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from flextron.elastic.model import ElasticLayer, ElasticModel, SubLayer
from flextron.elastic.projections import ClosingLinear, OpeningLinear
from flextron.subnet import Subnet

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # in others, cosines change with the length of the text
_MOST_PIECES = 64


def supports(model: ElasticModel) -> bool:
    """Return whether `Decoder` computes what this model computes.

    True for Llama, Mistral, Qwen2 and Qwen3 on a CPU, in float32 or bfloat16, without sliding window, adapters or a
    rotary embedding that changes with the length.
    """
    lm: Any = model.lm
    kind = lm.config.model_type
    return (
        kind in _MODEL_TYPES
        and type(lm).__module__ == f"transformers.models.{kind}.modeling_{kind}"
        and model.device.type == "cpu"
        and {weight.dtype for weight in lm.parameters()} in ({torch.float32}, {torch.bfloat16})
        and type(getattr(lm, "lm_head", None)) is nn.Linear
        and all(_has_plain_projections(layer) for layer in model.layers)
        and _has_plain_attention(lm)
    )


def _has_plain_projections(layer: ElasticLayer) -> bool:
    """Return whether all projections are plain elastic Linears, at their usual paths, without adapters."""
    return all(
        type(projection) in (OpeningLinear, ClosingLinear) and layer.module.get_submodule(path) is projection
        for sub in layer.subs.values()
        for path, projection in zip((*sub.axis.opens, sub.axis.closes), (*sub.opens, sub.closes), strict=True)
    )


def _has_plain_attention(lm: Any) -> bool:
    rotary = lm.model.rotary_emb
    return (
        getattr(lm.config, "sliding_window", None) is None
        and lm.config._attn_implementation in ("sdpa", "eager")
        and not (lm.training and lm.config.attention_dropout)
        and rotary.rope_type in _FIXED_ROPE
        and 2 * rotary.inv_freq.numel() == lm.model.layers[0].self_attn.head_dim
    )


class _Norm(NamedTuple):
    """RMSNorm, computed in float32 as in transformers, with a fixed output buffer."""

    weight: torch.Tensor  # [D]
    epsilon: float
    out: torch.Tensor  # [D]

    def run(self, h_D: torch.Tensor) -> None:
        wide_D = h_D.float()
        scale = 1 / math.sqrt(torch.dot(wide_D, wide_D).item() / len(wide_D) + self.epsilon)
        torch.mul(self.weight, wide_D.mul(scale).to(h_D.dtype), out=self.out)

    def of_rows(self, h_SD: torch.Tensor) -> torch.Tensor:
        wide_SD = h_SD.float()
        scale_S1 = wide_SD.pow(2).mean(-1, keepdim=True).add(self.epsilon).rsqrt()
        return self.weight * (wide_SD * scale_S1).to(h_SD.dtype)


class _Product(NamedTuple):
    """y = W x + b with fixed input and output buffers."""

    weight: torch.Tensor  # [P, R, K]
    bias: torch.Tensor | None
    x: torch.Tensor  # [P, K, 1], the same memory P times
    pieces: torch.Tensor  # [P, R, 1], the memory of y
    y: torch.Tensor  # [P * R]

    def run(self) -> None:
        if len(self.weight) == 1:
            torch.mm(self.x[0].T, self.weight[0].T, out=self.y[None])
        else:
            torch.bmm(self.weight, self.x, out=self.pieces)
        if self.bias is not None:
            self.y.add_(self.bias)

    def of_rows(self, x_SK: torch.Tensor) -> torch.Tensor:
        """Compute y for several tokens, [S, P * R]."""
        if self.weight.dtype != torch.float32:
            return F.linear(x_SK, self.weight.flatten(0, 1), self.bias)
        # weight first: up to four times as fast as F.linear on a few rows
        y_SR = torch.bmm(self.weight, x_SK.T.expand(len(self.weight), -1, -1)).flatten(0, 1).T.contiguous()
        return y_SR if self.bias is None else y_SR.add_(self.bias)


class _MLP(NamedTuple):
    norm: _Norm
    gate: _Product
    up: _Product
    activation: Callable[[torch.Tensor], torch.Tensor]
    closes: _Product

    def add_to(self, h_D: torch.Tensor) -> None:
        self.norm.run(h_D)
        self.gate.run()
        self.up.run()
        self.up.y.mul_(self.activation(self.gate.y))
        self.closes.run()
        h_D.add_(self.closes.y)

    def add_to_rows(self, h_SD: torch.Tensor) -> None:
        normed_SD = self.norm.of_rows(h_SD)
        h_SD.add_(self.closes.of_rows(self.activation(self.gate.of_rows(normed_SD)).mul_(self.up.of_rows(normed_SD))))


class _Attention(NamedTuple):
    norm: _Norm
    opens: tuple[_Product, ...]
    head_norms: tuple[tuple[nn.Module, torch.Tensor], ...]
    """Norms of queries and keys with their heads [heads, H]; Qwen3 only."""
    heads: torch.Tensor  # [G * Q + G, H], the new token's queries, then its keys
    values: torch.Tensor  # [G, H]
    past_keys: torch.Tensor  # [G, T, H]
    past_values: torch.Tensor  # [G, T, H]
    scale: float
    mixed: torch.Tensor  # [G, Q, H]
    closes: _Product

    def add_to(self, h_D: torch.Tensor, cos_H: torch.Tensor, sin_H: torch.Tensor, position: int) -> None:
        self.norm.run(h_D)
        for product in self.opens:
            product.run()
        for norm, heads in self.head_norms:
            heads.copy_(norm(heads))
        rotated = torch.addcmul(self.heads * cos_H, self.heads.roll(len(cos_H) // 2, -1), sin_H)
        queries, keys = rotated.split_with_sizes([len(rotated) - len(self.values), len(self.values)])
        self.past_keys[:, position], self.past_values[:, position] = keys, self.values
        # a group's query heads take the place of several tokens' queries: they share its keys and see all of them
        past = self.past_keys[None, :, : position + 1], self.past_values[None, :, : position + 1]
        mixed = F.scaled_dot_product_attention(queries.view(self.mixed.shape)[None], *past, scale=self.scale)
        self.mixed.copy_(mixed[0])
        self.closes.run()
        h_D.add_(self.closes.y)

    def add_to_rows(
        self, h_SD: torch.Tensor, cos_SH: torch.Tensor, sin_SH: torch.Tensor, seen_ST: torch.Tensor
    ) -> None:
        """Add the attention for several tokens, the last of T; `seen_ST` says which of the T each one sees."""
        (groups, per_group, size), (tokens, past) = self.mixed.shape, seen_ST.shape
        normed_SD = self.norm.of_rows(h_SD)
        opened = [product.of_rows(normed_SD).view(tokens, -1, size) for product in self.opens]
        for part, (norm, _) in enumerate(self.head_norms):
            opened[part] = norm(opened[part])
        heads, values = torch.cat(opened[:2], dim=1), opened[2]
        rotated = torch.addcmul(heads * cos_SH[:, None], heads.roll(size // 2, -1), sin_SH[:, None])
        queries, keys = rotated.split_with_sizes([groups * per_group, groups], dim=1)
        self.past_keys[:, past - tokens : past] = keys.transpose(0, 1)
        self.past_values[:, past - tokens : past] = values.transpose(0, 1)
        # as in `add_to`: a group's query heads take the place of more tokens' queries
        queries = queries.view(tokens, groups, per_group, size).permute(1, 2, 0, 3).reshape(1, groups, -1, size)
        pasts, seen = (self.past_keys[None, :, :past], self.past_values[None, :, :past]), seen_ST.repeat(per_group, 1)
        mixed = F.scaled_dot_product_attention(queries, *pasts, attn_mask=seen, scale=self.scale)
        mixed = mixed.view(groups, per_group, tokens, size).permute(2, 0, 1, 3)
        h_SD.add_(self.closes.of_rows(mixed.reshape(tokens, -1)))


class _Buffers(NamedTuple):
    """Buffers that the products of all layers share; each layer overwrites those of the one before."""

    normed: torch.Tensor  # [D]
    added: torch.Tensor  # [D]
    opened: torch.Tensor
    mixed: torch.Tensor

    @classmethod
    def of_model(cls, model: ElasticModel) -> _Buffers:
        first, size = model.layers[0], model.config.hidden_size
        widest = max(sum(len(opens.weight) for opens in sub.opens) for sub in first.subs.values())
        sizes = (size, size, widest, first.attention.closing_size)
        return cls(*(torch.empty(size, dtype=model.dtype) for size in sizes))


class Decoder:
    """Decodes one text with one sub-network on a CPU.

    It holds views of the model's weights, and copies of a narrowed layer's closing columns, because a view of columns
    is read at half the speed. So make a new Decoder after the weights change.
    """

    @torch.inference_mode()
    def __init__(self, model: ElasticModel, subnet: Subnet, *, max_tokens: int) -> None:
        """Prepare `subnet` for a text of at most `max_tokens`, including the prompt.

        Raises:
            ValueError: `supports` refuses the model.
            SubnetError: `subnet` is not in the model's search space.
        """
        if not supports(model):
            raise ValueError(
                f"fast decoding does not support this {type(model.lm).__name__}. Use the model's own generate."
            )
        self.model, self.subnet, self.max_tokens = model, subnet, max_tokens
        self.position = 0
        """Number of tokens seen, which is the position of the next one."""
        lm: Any = model.lm
        buffers = _Buffers.of_model(model)
        self._embedding_VD = lm.model.embed_tokens.weight
        with model.use(subnet):
            self._layers = [
                (_prepare_attention(layer, buffers, max_tokens), _prepare_mlp(layer, buffers)) for layer in model.layers
            ]
        self._norm = _norm(lm.model.norm, buffers)
        logits_V = torch.empty(len(lm.lm_head.weight), dtype=model.dtype)
        self._head = _product(lm.lm_head.weight, lm.lm_head.bias, buffers.normed, logits_V)
        cos_TH, sin_TH = (table[0] for table in lm.model.rotary_emb(logits_V, torch.arange(max_tokens)[None]))
        below, above = sin_TH.chunk(2, dim=-1)
        self._cos_TH, self._sin_TH = cos_TH, torch.cat([-below, above], dim=-1)

    @torch.inference_mode()
    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Start a new text with the prompt [1, T] and return the logits [V] of the next token.

        The prompt runs through transformers' own forward pass.

        Raises:
            ValueError: more than one row, or more tokens than `max_tokens`.
        """
        rows, time = tokens_BT.shape
        if rows != 1:
            raise ValueError(f"got {rows} prompts; a Decoder takes one. Use the model's own generate.")
        self._check_room(time)
        with self.model.use(self.subnet):
            output = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        for cached, (attention, _) in zip(output.past_key_values.layers, self._layers, strict=True):
            if attention is not None:
                attention.past_keys[:, :time], attention.past_values[:, :time] = cached.keys[0], cached.values[0]
        self.position = time
        logits_V: torch.Tensor = output.logits[0, -1]
        return logits_V

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        """Return the logits [V] of the token after `token`. The next step overwrites them: clone what you keep.

        Raises:
            ValueError: the text already has `max_tokens`.
        """
        self._check_room(self.position + 1)
        h_D = self._embedding_VD[token].clone()
        cos_H, sin_H = self._cos_TH[self.position], self._sin_TH[self.position]
        for attention, mlp in self._layers:
            if attention is not None:
                attention.add_to(h_D, cos_H, sin_H, self.position)
            if mlp is not None:
                mlp.add_to(h_D)
        self._norm.run(h_D)
        self._head.run()
        self.position += 1
        return self._head.y

    @torch.inference_mode()
    def steps(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of several tokens, [S, V], in one pass over the weights.

        For a single token the logits are overwritten as in `step`.

        Raises:
            ValueError: no tokens, or more than fit into `max_tokens`.
        """
        if len(tokens) == 1:
            return self.step(tokens[0])[None]
        if not tokens:
            raise ValueError("got no tokens; give one or more.")
        past = self.position + len(tokens)
        self._check_room(past)
        h_SD = self._embedding_VD[torch.tensor(tokens)]
        cos_SH, sin_SH = self._cos_TH[self.position : past], self._sin_TH[self.position : past]
        seen_ST = torch.ones(len(tokens), past, dtype=torch.bool).tril(self.position)
        for attention, mlp in self._layers:
            if attention is not None:
                attention.add_to_rows(h_SD, cos_SH, sin_SH, seen_ST)
            if mlp is not None:
                mlp.add_to_rows(h_SD)
        self.position = past
        return self._head.of_rows(self._norm.of_rows(h_SD))

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens.

        Raises:
            ValueError: `tokens` is negative, or more than were seen.
        """
        if not 0 <= tokens <= self.position:
            raise ValueError(f"cannot go back to {tokens} tokens; {self.position} were seen.")
        self.position = tokens

    @torch.inference_mode()
    def pretend(self, tokens: int) -> None:
        """Continue as after `tokens` tokens, with zero keys and values, to time a step without a real text.

        Raises:
            ValueError: `tokens` is not below `max_tokens`.
        """
        self._check_room(tokens + 1)
        if self.position < tokens:
            for attention in (attention for attention, _ in self._layers if attention is not None):
                # memory never written to is a single page of zeros, so it reads faster than a real cache
                attention.past_keys.zero_()
                attention.past_values.zero_()
        self.position = tokens

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise ValueError(
                f"{tokens} tokens do not fit into a Decoder made for {self.max_tokens}. Make one with more max_tokens."
            )


def _prepare_attention(layer: ElasticLayer, buffers: _Buffers, max_tokens: int) -> _Attention | None:
    """Prepare the attention at the width in use; None if it is skipped."""
    groups = layer.attention.width.kept
    if not groups:
        return None
    module: Any = layer.module
    attention, opens = module.self_attn, _openings(layer.attention, buffers)
    queries, keys, values = (product.y.view(-1, attention.head_dim) for product in opens)
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    mixed = buffers.mixed[: queries.numel()]
    return _Attention(
        norm=_norm(module.input_layernorm, buffers),
        opens=opens,
        head_norms=tuple((norm, heads) for norm, heads in zip(norms, (queries, keys), strict=True) if norm is not None),
        heads=buffers.opened[: queries.numel() + keys.numel()].view(-1, attention.head_dim),
        values=values,
        past_keys=mixed.new_empty(groups, max_tokens, attention.head_dim),
        past_values=mixed.new_empty(groups, max_tokens, attention.head_dim),
        scale=attention.scaling,
        mixed=mixed.view(groups, -1, attention.head_dim),
        closes=_closing(layer.attention, mixed, buffers),
    )


def _prepare_mlp(layer: ElasticLayer, buffers: _Buffers) -> _MLP | None:
    """Prepare the MLP at the width in use; None if it is skipped."""
    if not layer.mlp.width.kept:
        return None
    module: Any = layer.module
    gate, up = _openings(layer.mlp, buffers)
    norm, closes = _norm(module.post_attention_layernorm, buffers), _closing(layer.mlp, up.y, buffers)
    return _MLP(norm, gate, up, module.mlp.act_fn, closes)


def _norm(norm: Any, buffers: _Buffers) -> _Norm:
    return _Norm(norm.weight, norm.variance_epsilon, buffers.normed)


def _openings(sub: SubLayer, buffers: _Buffers) -> tuple[_Product, ...]:
    """Prepare the first rows of each opening projection; their outputs are adjacent in memory."""
    rows = [sub.width.of(len(opens.weight)) for opens in sub.opens]
    outputs = buffers.opened[: sum(rows)].split_with_sizes(rows)
    return tuple(
        _product(opens.weight[: len(y)], None if opens.bias is None else opens.bias[: len(y)], buffers.normed, y)
        for opens, y in zip(sub.opens, outputs, strict=True)
    )


def _closing(sub: SubLayer, x_K: torch.Tensor, buffers: _Buffers) -> _Product:
    """Prepare the first columns of the closing projection, copied to be contiguous unless all are kept."""
    return _product(sub.closes.weight[:, : len(x_K)].contiguous(), sub.closes.bias, x_K, buffers.added)


def _product(weight: torch.Tensor, bias: torch.Tensor | None, x_K: torch.Tensor, y: torch.Tensor) -> _Product:
    # bfloat16 needs no pieces: oneDNN runs one row in all threads
    # in float32 use at least two: even with one thread they are twice as fast as one
    pieces = _pieces(len(weight), max(2, torch.get_num_threads())) if weight.dtype == torch.float32 else 1
    # strides (0, 1, K): with (0, 1, 1), which address the same numbers, bmm takes four times as long
    x_PK1 = x_K.view(1, 1, -1).transpose(1, 2).expand(pieces, -1, 1)
    return _Product(weight.reshape(pieces, -1, weight.shape[1]), bias, x_PK1, y.view(pieces, -1, 1), y)


def _pieces(rows: int, threads: int) -> int:
    """Return the number of equal pieces of `rows`: the least divisor from `threads` up, else the greatest below."""
    candidates = chain(range(threads, _MOST_PIECES + 1), range(threads, 0, -1))
    return next(pieces for pieces in candidates if rows % pieces == 0)
