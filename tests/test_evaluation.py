"""Losses are transformers' own; what is derived from them follows its definition."""

import math
import statistics

import pytest
import torch

import tiny
from flextron.data.blocks import BATCH_TOKENS, TokenBlocks
from flextron.errors import CheckpointError, SubnetError
from flextron.evaluation import evaluate
from flextron.model import ElasticModel
from flextron.ranking.importance import measure_importance
from flextron.ranking.sensitivity import measure_sensitivity
from flextron.routers.static.pairs import LossMeter
from flextron.subnet import Subnet


@pytest.fixture
def blocks() -> TokenBlocks:
    blocks = tiny.blocks(rows=5, time=12)
    sizes = torch.randint(0, 6, blocks.tokens.shape, generator=torch.Generator().manual_seed(3))
    return TokenBlocks(blocks.tokens, sizes, "a text")


@pytest.fixture
def subnets(llama) -> list[Subnet]:
    space = llama.search_space
    return [space.full, space.uniform(20, 2), space.full, tiny.random_subnet(space, 1), space.smallest]


@torch.no_grad()
def loss_by_transformers(model, tokens: torch.Tensor) -> float:
    return model(tokens, labels=tokens, use_cache=False).loss.item()


def test_losses_are_those_of_transformers(llama, plain_llama, blocks, subnets):
    for result, subnet in zip(evaluate(llama, subnets, blocks), subnets, strict=True):
        masked = tiny.masked(plain_llama, subnet, groups=tiny.KV_GROUPS)
        assert result.subnet == subnet
        assert result.nats_per_token == pytest.approx(loss_by_transformers(masked, blocks.tokens), rel=1e-5)


def test_batches_do_not_matter(llama):
    """More blocks than fit into one forward pass."""
    blocks = tiny.blocks(rows=2 * BATCH_TOKENS // 64 + 1, time=64)
    (result,) = evaluate(llama, [llama.search_space.full], blocks)
    assert result.tokens == len(blocks.tokens) * 63
    assert result.nats_per_token == pytest.approx(loss_by_transformers(llama, blocks.tokens), rel=1e-5)


def test_derived_values_follow_their_definitions(llama, blocks, subnets):
    results = evaluate(llama, subnets, blocks)
    losses = []
    for subnet in subnets:
        with llama.use(subnet):
            losses.append([loss_by_transformers(llama, block[None]) for block in blocks.tokens])
    for result, loss in zip(results, losses, strict=True):
        difference = [here - first for here, first in zip(loss, losses[0], strict=True)]
        assert result.nats_per_token == pytest.approx(statistics.mean(loss))
        assert result.standard_error == pytest.approx(statistics.stdev(loss) / math.sqrt(5))
        assert result.difference == pytest.approx(statistics.mean(difference))
        assert result.difference_standard_error == pytest.approx(statistics.stdev(difference) / math.sqrt(5))
        assert result.bits_per_byte == pytest.approx(
            result.nats_per_token * 5 * 11 / blocks.bytes[:, 1:].sum().item() / math.log(2)
        )
        assert result.share == llama.share(result.subnet)
        assert (result.tokens, result.text) == (55, "a text")


def test_divergence_from_the_original_by_its_definition(llama, blocks, subnets):
    """Where the text is certain, cross-entropy is the divergence; here the original's predictions take its place."""
    original = ElasticModel(tiny.plain_model("llama", num_hidden_layers=2))
    for result, subnet in zip(evaluate(llama, subnets, blocks, original=original), subnets, strict=True):
        with llama.use(subnet), torch.no_grad():
            own = llama(blocks.tokens, use_cache=False).logits[:, :-1].double().softmax(-1)
            theirs = original(blocks.tokens, use_cache=False).logits[:, :-1].double().softmax(-1)
        expected = (theirs * (theirs / own).log()).sum(-1).mean(1)
        assert result.divergence == pytest.approx(expected.mean().item(), rel=1e-4)
        assert result.divergence_standard_error == pytest.approx((expected.std() / math.sqrt(5)).item(), rel=1e-3)
    assert evaluate(llama, subnets[:1], blocks, original=llama)[0].divergence == pytest.approx(0, abs=1e-6)
    assert evaluate(llama, subnets[:1], blocks)[0].divergence is None


def test_an_original_with_another_vocabulary_is_refused(llama, blocks, subnets):
    other = ElasticModel(tiny.plain_model("llama", vocab_size=300))
    with pytest.raises(ValueError, match="the original model has 300 tokens"):
        evaluate(llama, subnets, blocks, original=other)


def test_a_subnet_does_not_differ_from_itself(llama, blocks, subnets):
    results = evaluate(llama, subnets, blocks)
    for same in (results[0], results[2]):
        assert (same.difference, same.difference_standard_error) == (0.0, 0.0)
    assert results[1].difference != 0
    assert results[1].difference_standard_error < results[1].standard_error + results[0].standard_error


def test_one_block_has_no_standard_error(llama):
    (result,) = evaluate(llama, [llama.search_space.full], tiny.blocks(rows=1))
    assert math.isnan(result.standard_error)
    assert math.isfinite(result.nats_per_token)


def test_refuses_before_it_computes(llama, blocks, monkeypatch):
    monkeypatch.setattr(llama.lm, "forward", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(SubnetError, match="neurons\\[0\\] is 41"):
        evaluate(llama, [llama.search_space.full, Subnet((41,) * 3, (3,) * 3)], blocks)


def test_leaves_the_model_as_it_was(llama, blocks, subnets):
    with llama.use(subnets[1]):
        evaluate(llama, subnets, blocks, show=True)
        assert llama.subnet == subnets[1]


def test_share_counts_the_weights_of_the_kept_units(llama, subnets):
    layers = llama.search_space.layers
    first = llama.lm.model.layers[0]
    mlp = sum(first.mlp.get_submodule(name).weight.numel() for name in ("gate_proj", "up_proj", "down_proj"))
    mlp += first.mlp.gate_proj.bias.numel() + first.mlp.up_proj.bias.numel()
    attention = sum(first.self_attn.get_submodule(f"{name}_proj").weight.numel() for name in "qkvo")
    attention += sum(first.self_attn.get_submodule(f"{name}_proj").bias.numel() for name in "qkv")
    assert llama.layer_weights(subnets[0]) == layers * (mlp + attention)
    assert llama.layer_weights(subnets[1]) == layers * (mlp // 2 + attention * 2 // 3)
    assert (llama.share(subnets[0]), llama.share(llama.search_space.smallest)) == (1, 0)


def test_a_token_that_the_model_has_not(llama):
    blocks = tiny.blocks()
    blocks.tokens[3, 4] = tiny.VOCAB
    for use in (
        lambda: evaluate(llama, [llama.search_space.full], blocks),
        lambda: measure_importance(llama, blocks),
        lambda: measure_sensitivity(llama, blocks),
        lambda: LossMeter(llama, blocks),
    ):
        with pytest.raises(CheckpointError, match="gives token 101, but the model has 101 tokens"):
            use()
