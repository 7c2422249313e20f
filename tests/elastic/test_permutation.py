"""Ranking puts the best units first, keeps what the model computes, and records the permutation."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from flextron.elastic.permutation import permute
from flextron.model import ElasticModel
from flextron.ranking.importance import SCORES, measure_importance, rank
from tiny import assert_same_function, differs, logits_of

ORDERS = ("neurons", "kv_groups", "query_heads")


@pytest.fixture
def blocks():
    return tiny.blocks()


@pytest.mark.parametrize("score", SCORES)
class TestRank:
    def test_computes_the_same_and_says_what_it_did(self, llama, plain_llama, blocks, score):
        ranking = rank(llama, blocks, score=score)
        assert llama.ranking is ranking
        assert (ranking.score, ranking.tokens, ranking.text) == (score, blocks.tokens.numel(), "random")
        assert [getattr(ranking, name).dtype for name in ORDERS] == [torch.int32] * 3
        assert not torch.equal(llama.layers[0].mlp.closes.weight, plain_llama.model.layers[0].mlp.down_proj.weight)
        assert_same_function(logits_of(llama, blocks.tokens), logits_of(plain_llama, blocks.tokens))

    def test_ranks_by_what_importance_says(self, llama, blocks, score):
        orders = measure_importance(llama, blocks, score=score)
        ranking = rank(llama, blocks, score=score)
        for name in ORDERS:
            assert torch.equal(getattr(ranking, name), torch.stack([getattr(order, name) for order in orders]))

    def test_a_ranked_model_is_in_order(self, llama, blocks, score):
        rank(llama, blocks, score=score)
        for order in measure_importance(llama, blocks, score=score):
            assert order.neurons.tolist() == list(range(tiny.NEURONS))
            assert order.kv_groups.tolist() == list(range(tiny.KV_GROUPS))
            assert order.query_heads.tolist() == [[0, 1]] * tiny.KV_GROUPS

    def test_dead_units_go_last_and_can_go(self, llama, blocks, score):
        """Removing neurons that are never active, and a KV group with zero values, changes nothing."""
        dead = [[3, 17, 0, 39], [5, 6, 7, 8], [0, 1, 38, 39]]
        for index, layer in enumerate(llama.layers):
            kill(layer.mlp.opens[0], torch.tensor(dead[index]), units=tiny.NEURONS)
            kill(layer.attention.opens[2], torch.tensor([index]), units=tiny.KV_GROUPS)
        full = logits_of(llama, blocks.tokens)
        ranking = rank(llama, blocks, score=score)
        for index in range(tiny.LAYERS):
            assert set(ranking.neurons[index, -4:].tolist()) == set(dead[index])
            assert ranking.kv_groups[index, -1] == index
        space = llama.search_space
        with llama.use(space.uniform(tiny.NEURONS - 4, tiny.KV_GROUPS - 1)):
            assert_same_function(logits_of(llama, blocks.tokens), full)
        with llama.use(space.uniform(tiny.NEURONS - 6)):
            assert differs(logits_of(llama, blocks.tokens), full)


@torch.no_grad()
def kill(module, dead: torch.Tensor, *, units: int) -> None:
    module.weight.unflatten(0, (units, -1))[dead] = 0
    module.bias.unflatten(0, (units, -1))[dead] = 0


@pytest.mark.parametrize("score", ["reconstruction", "absolute_weight", "rms_weight"])
def test_a_query_head_that_nothing_reads_goes_last_in_its_group(llama, blocks, score):
    with torch.no_grad():
        for layer in llama.layers:
            layer.attention.closes.weight.unflatten(1, (tiny.KV_GROUPS, 2, -1))[:, 1, 0] = 0
    ranking = rank(llama, blocks, score=score)
    for groups, heads in zip(ranking.kv_groups, ranking.query_heads, strict=True):
        assert heads[groups.tolist().index(1)].tolist() == [1, 0]


def test_ranking_in_half_precision(plain_llama, blocks):
    model = ElasticModel(copy.deepcopy(plain_llama).to(torch.bfloat16))
    before = model.layers[0].mlp.closes.weight.clone()
    ranking = rank(model, blocks)
    assert torch.equal(model.layers[0].mlp.closes.weight, before[:, ranking.neurons[0].long()])


def test_ranking_does_not_depend_on_the_subnet_in_use(llama, plain_llama, blocks):
    with llama.use(llama.search_space.smallest):
        narrow = rank(llama, blocks)
    full = rank(ElasticModel(copy.deepcopy(plain_llama)), blocks)
    assert all(torch.equal(getattr(narrow, name), getattr(full, name)) for name in ORDERS)
    assert_same_function(logits_of(llama, blocks.tokens), logits_of(plain_llama, blocks.tokens))


def test_ranking_again_keeps_the_original_indices(llama, blocks):
    first = rank(llama, blocks, score="absolute")
    second = rank(llama, blocks, score="absolute")  # finds everything in order
    assert torch.equal(second.neurons, torch.arange(tiny.NEURONS).expand(tiny.LAYERS, -1).int())
    assert all(torch.equal(getattr(llama.ranking, name), getattr(first, name)) for name in ORDERS)


@pytest.mark.parametrize(
    "change",
    [
        {"neurons": torch.zeros(tiny.LAYERS, tiny.NEURONS)},
        {"neurons": torch.arange(20).expand(tiny.LAYERS, -1)},
        {"kv_groups": torch.tensor([[0, 1, 3]] * tiny.LAYERS)},
        {"query_heads": torch.zeros(tiny.LAYERS, tiny.KV_GROUPS, 2)},
        {"neurons": torch.arange(tiny.NEURONS).expand(tiny.LAYERS - 1, -1)},
    ],
    ids=["repeated", "too few", "beyond", "repeated heads", "a layer short"],
)
def test_what_is_no_permutation_of_this_model_is_refused(llama, change):
    before = {name: value.clone() for name, value in llama.lm.state_dict().items()}
    with pytest.raises(ValueError):  # noqa: PT011
        permute(llama, replace(tiny.ranking_for(llama), **{name: value.int() for name, value in change.items()}))
    assert all(torch.equal(value, before[name]) for name, value in llama.lm.state_dict().items())
    assert llama.ranking is None
