"""Sensitivities: the same as changing one thing at a time by hand; the greedy choice: as good as brute force."""

import itertools

import pytest
import torch

import tiny
from flextron.elastic import ElasticModel
from flextron.errors import CheckpointError, SubnetError
from flextron.evaluation import evaluate
from flextron.sensitivity import Sensitivity, measure_sensitivity
from flextron.subnet import SearchSpace, Subnet

SPACE = SearchSpace(layers=2, neurons=(0, 1, 2, 3, 4), kv_groups=(0, 1, 2))


def sensitivity(neurons, kv_groups, unit_weights=None) -> Sensitivity:
    return Sensitivity(
        search_space=SPACE,
        widths={"neurons": (0, 2, 4), "kv_groups": (0, 1, 2)},
        increases={"neurons": neurons, "kv_groups": kv_groups},
        unit_weights=unit_weights or {"neurons": (10, 10), "kv_groups": (20, 20)},
        full_loss=3.0,
        tokens=100,
        text="made up",
    )


CONVEX = sensitivity(((2.0, 0.5, 0.0), (0.4, 0.1, 0.0)), ((3.0, 1.0, 0.0), (0.2, 0.05, 0.0)))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_increases_are_those_of_changing_one_sub_layer_by_hand(model_type):
    model = ElasticModel(tiny.plain_model(model_type))
    blocks = tiny.blocks(rows=5)
    found = measure_sensitivity(model, blocks)
    full = model.search_space.full
    assert found.full_loss == pytest.approx(evaluate(model, [full], blocks)[0].nats_per_token, abs=1e-6)
    for axis in ("neurons", "kv_groups"):
        assert found.widths[axis][0] == 0
        for layer, (index, width) in itertools.product(range(full.layers), enumerate(found.widths[axis])):
            widths = list(getattr(full, axis))
            widths[layer] = width
            changed = Subnet(**{"neurons": full.neurons, "kv_groups": full.kv_groups, axis: tuple(widths)})
            by_hand = evaluate(model, [full, changed], blocks)[1].difference
            assert found.increases[axis][layer][index] == pytest.approx(by_hand, abs=1e-5)


def test_lower_layers_are_not_computed_again():
    model = ElasticModel(tiny.plain_model("llama"))
    calls = [0] * len(model.layers)
    for index, layer in enumerate(model.layers):

        def count(*_args, index=index):
            calls[index] += 1

        layer.mlp.opens[0].register_forward_pre_hook(count)
    measure_sensitivity(model, tiny.blocks(rows=1))
    changes = 4 + tiny.KV_GROUPS  # of one layer; one of them skips its MLP
    assert calls == [1 + changes - 1, 1 + 2 * changes - 1, 1 + 3 * changes - 1]


def test_model_is_left_as_it_was():
    model = ElasticModel(tiny.plain_model("llama"))
    tokens = tiny.token_ids()
    before = tiny.logits_of(model, tokens)
    measure_sensitivity(model, tiny.blocks(rows=1))
    assert torch.equal(tiny.logits_of(model, tokens), before)
    assert all("forward" not in vars(layer.module) for layer in model.layers)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6, 0.5, 0.3, 0.1, 0.0])
def test_greedy_is_within_the_share_and_no_worse_than_brute_force_on_the_hull_corners(share):
    def loss(subnet: Subnet) -> float:
        return sum(
            CONVEX.increases[axis][layer][CONVEX.widths[axis].index(width)]
            for axis in ("neurons", "kv_groups")
            for layer, width in enumerate(getattr(subnet, axis))
        )

    greedy = CONVEX.allocate(share)
    assert CONVEX.share(greedy) <= share + 1e-12
    corners = [
        Subnet(neurons, groups)
        for neurons in itertools.product((0, 2, 4), repeat=2)
        for groups in itertools.product((0, 1, 2), repeat=2)
    ]
    if all(width in (0, 2, 4) for width in greedy.neurons):
        larger = [subnet for subnet in corners if CONVEX.share(subnet) <= CONVEX.share(greedy)]
        assert loss(greedy) == pytest.approx(min(map(loss, larger)))


def test_a_step_that_removes_too_much_stops_between():
    assert CONVEX.allocate(0.96).neurons in {(4, 3), (4, 4)}
    assert CONVEX.share(CONVEX.allocate(0.93)) > 0.85


def test_larger_share_never_drops_what_a_smaller_one_keeps():
    subnets = [CONVEX.allocate(share / 100) for share in range(101)]
    for small, large in itertools.pairwise(subnets):
        assert all(
            a <= b for a, b in zip(small.neurons + small.kv_groups, large.neurons + large.kv_groups, strict=True)
        )


def test_noise_below_zero_is_removed_first_and_not_rewarded():
    noisy = sensitivity(((0.0, -0.2, 0.0), (0.4, 0.1, 0.0)), ((3.0, 1.0, 0.0), (0.2, 0.05, 0.0)))
    assert noisy.allocate(0.75).neurons[0] == 0


@pytest.mark.parametrize("share", [-0.1, 1.01, 60])
def test_impossible_shares_say_what_is_possible(share):
    with pytest.raises(SubnetError, match=r"not between the smallest sub-network's \(0%\) and 100%"):
        CONVEX.allocate(share)


def test_saved_and_loaded_agree(tmp_path):
    CONVEX.save(tmp_path)
    assert Sensitivity.is_in(tmp_path)
    loaded = Sensitivity.load(tmp_path)
    assert [loaded.allocate(s / 10) for s in range(11)] == [CONVEX.allocate(s / 10) for s in range(11)]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 99}'])
def test_bad_files_are_named(tmp_path, content):
    (tmp_path / "sensitivity.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"sensitivity\.json"):
        Sensitivity.load(tmp_path)
