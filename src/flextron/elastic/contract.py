"""What must hold for every family: equalities between an elastic model and the plain one that it was made from.

Discovery holds its guesses against it, and `flextron inspect` any spec, on a small random copy of the model.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flextron.elastic.checkpoint import Ranking
from flextron.elastic.families import Axis, Family
from flextron.elastic.layers import axis_of
from flextron.elastic.loss import body_of, logits_of
from flextron.elastic.model import ElasticModel
from flextron.elastic.permutation import permute
from flextron.elastic.projections import expert_tensors
from flextron.subnet import SearchSpace, Subnet

TOLERANCE = 1e-5
"""Largest difference of logits in float32 that the order of sums explains, relative to the largest logit."""
CACHED_TOLERANCE = 1e-4
"""The same with a cache: linear attentions sum in another order there."""
TIME = 12
Check = Callable[[PreTrainedModel, ElasticModel, torch.Tensor], None]


class BrokenContractError(Exception):
    """A spec and a model that do not go together: the message says which equality fails."""


def check_contract(plain: PreTrainedModel, family: Family) -> None:
    """Pass if `family` says rightly where `plain` keeps what narrows. `plain` stays as it was.

    Args:
        plain: a small model with random weights, biases and norms, so that every mistake shows.

    Raises:
        BrokenContractError: an equality does not hold, or the model does not run.
    """
    tokens_BT = random_tokens(plain)
    for name, check in CHECKS.items():
        try:
            check(plain, ElasticModel(copy.deepcopy(plain), family=family), tokens_BT)
        except BrokenContractError as error:
            raise BrokenContractError(f"{name}: {error}") from None
        except Exception as error:  # a wrong spec makes the model's own code fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BrokenContractError(f"{name}: {reason}") from error


def random_tokens(lm: PreTrainedModel, rows: int = 2, time: int = TIME) -> torch.Tensor:
    """Random tokens, [rows, time]."""
    words = lm.get_input_embeddings().weight.shape[0]
    return torch.randint(3, words, (rows, time), generator=torch.Generator().manual_seed(0))


def subnets(space: SearchSpace) -> list[Subnet]:
    """Some sub-networks: uneven ones, each axis alone, and the smallest."""
    draw = torch.Generator().manual_seed(1)

    def widths(choices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(choices[place] for place in torch.randint(len(choices), (space.layers,), generator=draw))

    uneven = [Subnet(widths(space.neurons), widths(space.kv_groups)) for _ in range(3)]
    middle = space.uniform(space.neurons[len(space.neurons) // 2], space.kv_groups[len(space.kv_groups) // 2])
    return [*uneven, middle, space.uniform(neurons=0), space.uniform(kv_groups=0), space.smallest]


@torch.no_grad()
def masked(lm: PreTrainedModel, family: Family, subnet: Subnet, *, ranking: Ranking | None = None) -> PreTrainedModel:
    """A copy of a plain model that computes, by its plain code, what `subnet` means.

    The closing projection's columns of every unit left out are zero; of a sub-layer of width 0, its bias too. With a
    ranking, the units kept are the original ones that it names.
    """
    result = copy.deepcopy(lm)
    for index, layer in enumerate(result.get_submodule(family.layers).children()):
        for name, chain in family.axes.items():
            axis = axis_of(layer, chain)
            if axis.experts:
                order = None if ranking is None else ranking.neurons[index].long()
                _keep_experts(layer, axis, subnet[name][index], order)
                continue
            closing: Any = layer.get_submodule(axis.closes)
            matrix = closing.weight if isinstance(closing, torch.nn.Linear) else closing.weight.t()
            units = units_of(lm.config, matrix.shape[1], name) if axis.narrows else 1
            if chain.holds_experts:
                units = _experts_of(lm, family)
            order = torch.arange(units) if ranking is None else getattr(ranking, name)[index].long()
            matrix.unflatten(1, (units, -1))[:, order[subnet[name][index] :]] = 0
            if not subnet[name][index] and closing.bias is not None:
                closing.bias.zero_()
    return result


def _experts_of(lm: PreTrainedModel, family: Family) -> int:
    """Number of experts in each mixture."""
    key = next(kind.config_keys[0] for kind in family.mlp.kinds() if kind.experts)
    return int(getattr(lm.config, key))


def _keep_experts(layer: nn.Module, axis: Axis, kept: int, order: torch.Tensor | None) -> None:
    """Make a mixture of a plain model one of fewer experts, or let it add zero."""
    mixture = layer.get_submodule(axis.module)
    if not kept:
        mixture.register_forward_hook(_zeros)
        return
    count = next(p.shape[0] for p in layer.get_submodule(axis.closes).parameters() if p.ndim == 3)
    chosen = (torch.arange(count) if order is None else order)[:kept]
    for held, name in list(expert_tensors(mixture, count)):
        tensor = held[name][chosen]
        held[name] = nn.Parameter(tensor) if isinstance(held[name], nn.Parameter) else tensor
    for path in axis.counts:
        parent, _, attribute = path.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, kept)


def _zeros(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def units_of(config: Any, columns: int, axis: str) -> int:
    """Number of neurons of a closing projection with so many columns, or of KV groups."""
    if axis == "neurons":
        return columns
    return getattr(config, "num_key_value_heads", None) or int(config.num_attention_heads)


def random_ranking(model: ElasticModel, seed: int = 0) -> Ranking:
    """A random order of all units of a model."""
    draw = torch.Generator().manual_seed(seed)
    layers, first = len(model.layers), model.layers[0]
    groups, heads = first.attention.width.full, first.attention.heads_per_unit

    def orders(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=draw).argsort(-1).int()

    return Ranking(
        orders(layers, first.mlp.width.full), orders(layers, groups), orders(layers, groups, heads), "random", 0, ""
    )


@torch.no_grad()
def _logits(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV: torch.Tensor = model(tokens_BT, use_cache=False).logits
    return logits_BTV


def _hold_equal(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    limit = tolerance * max(1.0, float(expected.abs().max()))
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= limit:
        apart = "have other shapes" if found.shape != expected.shape else _apart(found, expected)
        raise BrokenContractError(f"the logits {what} {apart}")


def _apart(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"differ by {float((found - expected).abs().max()):.2g}"


def check_causal(plain: PreTrainedModel, tokens_BT: torch.Tensor) -> None:
    """Pass if logits depend on earlier tokens only.

    Raises:
        BrokenContractError: they do not, so this is an encoder.
    """
    other_BT = tokens_BT.clone()
    other_BT[:, -1] = (other_BT[:, -1] + 1) % 100 + 3
    before_BTV, after_BTV = (_logits(plain, tokens)[:, :-1] for tokens in (tokens_BT, other_BT))
    if not torch.allclose(before_BTV, after_BTV, atol=1e-3):
        raise BrokenContractError("its predictions depend on later tokens, as an encoder's do")


def _full_equals_original(plain: PreTrainedModel, model: ElasticModel, tokens_BT: torch.Tensor) -> None:
    _hold_equal(_logits(model, tokens_BT), _logits(plain, tokens_BT), "at full width and of the original")


def _narrowed_equals_masked(plain: PreTrainedModel, model: ElasticModel, tokens_BT: torch.Tensor) -> None:
    full_BTV = _logits(plain, tokens_BT)
    for subnet in subnets(model.search_space):
        expected_BTV = _logits(masked(plain, model.family, subnet, ranking=model.ranking), tokens_BT)
        if subnet != model.search_space.full and torch.equal(expected_BTV, full_BTV):
            raise BrokenContractError(f"leaving out units changes nothing at {subnet}")
        with model.use(subnet):
            _hold_equal(_logits(model, tokens_BT), expected_BTV, f"narrowed and masked, at {subnet},")


def _permuting_changes_nothing(plain: PreTrainedModel, model: ElasticModel, tokens_BT: torch.Tensor) -> None:
    permute(model, random_ranking(model))
    _hold_equal(_logits(model, tokens_BT), _logits(plain, tokens_BT), "permuted and of the original")
    _narrowed_equals_masked(plain, model, tokens_BT)


@torch.no_grad()
def _cached_equals_uncached(_plain: PreTrainedModel, model: ElasticModel, tokens_BT: torch.Tensor) -> None:
    space = model.search_space
    last = space.kv_groups[-1]
    uneven = Subnet(
        (space.neurons[-1],) * space.layers, tuple(0 if index % 2 == 0 else last for index in range(space.layers))
    )
    model.lm.generation_config.eos_token_id = None  # texts of equal lengths
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for subnet in (space.full, uneven, subnets(space)[0], space.smallest):
        with model.use(subnet):
            written = model.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), pad_token_id=0, **options)
            expected_BTV = _logits(model, written.sequences)[:, TIME - 1 : -1]
            found_BTV = torch.stack(written.logits, 1)
            _hold_equal(found_BTV, expected_BTV, f"with and without a cache, at {subnet},", CACHED_TOLERANCE)


@torch.no_grad()
def _logits_follow_from_hidden_states(plain: PreTrainedModel, model: ElasticModel, tokens_BT: torch.Tensor) -> None:
    hidden_BTD = body_of(model.lm)(input_ids=tokens_BT, use_cache=False).last_hidden_state
    _hold_equal(logits_of(model.lm, hidden_BTD), _logits(plain, tokens_BT), "by the loss and of the model")


def _gradients_reach_every_weight(_plain: PreTrainedModel, model: ElasticModel, tokens_BT: torch.Tensor) -> None:
    model.lm.train(False)
    for subnet in (subnets(model.search_space)[0], model.search_space.smallest):
        model.lm.zero_grad(set_to_none=True)
        with model.use(subnet):
            model(tokens_BT, use_cache=False).logits.float().square().mean().backward()
        missing = [name for name, weight in _elastic_weights(model) if weight.grad is None]
        if missing:
            raise BrokenContractError(f"{missing[0]} has no gradient at {subnet}")


def _elastic_weights(model: ElasticModel) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, axis, sub in model.sub_layers():
        weights = sub.unit_parameters() if sub.axis.experts else (p.weight for p in (*sub.opens, sub.closes))
        for weight in weights:
            yield f"{axis} of layer {layer}", weight


CHECKS: dict[str, Check] = {
    "full width equals the original": _full_equals_original,
    "narrowed equals masked": _narrowed_equals_masked,
    "permuting changes nothing": _permuting_changes_nothing,
    "cached equals uncached": _cached_equals_uncached,
    "logits follow from hidden states": _logits_follow_from_hidden_states,
    "gradients reach every weight": _gradients_reach_every_weight,
}
"""The contract, from the check that takes least on."""
