"""Sensitivities equal changing one width at a time by hand; the greedy choice is as good as brute force."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import tiny
from flextron.data.blocks import load_blocks
from flextron.errors import CheckpointError, SubnetError
from flextron.evaluation import evaluate
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import COUNTS, Sensitivity, measure_sensitivity, sensitivity_blocks
from flextron.subnet import SearchSpace, Subnet

SPACE = SearchSpace(layers=2, neurons=(0, 1, 2, 3, 4), kv_groups=(0, 1, 2))


def sensitivity(neurons, kv_groups, unit_weights=None) -> Sensitivity:
    return Sensitivity(
        search_space=SPACE,
        widths={"neurons": (0, 2, 4), "kv_groups": (0, 1, 2)},
        increases={"neurons": neurons, "kv_groups": kv_groups},
        unit_weights=unit_weights or {"neurons": (10, 10), "kv_groups": (20, 20)},
        tokens=100,
        text="made up",
    )


CONVEX = sensitivity(((2.0, 0.5, 0.0), (0.4, 0.1, 0.0)), ((3.0, 1.0, 0.0), (0.2, 0.05, 0.0)))


def by_hand(model, blocks, around, axis, layer, width) -> float:
    """Return how much the loss rises when one width of `around` is narrowed from full."""

    def changed(units):
        widths = list(getattr(around, axis))
        widths[layer] = units
        return replace(around, **{axis: tuple(widths)})

    wide, narrow = changed(getattr(model.search_space, axis)[-1]), changed(width)
    in_text = evaluate(model, [wide, narrow], blocks)[1].difference
    predictions = []
    for subnet in (model.search_space.full, wide, narrow):
        with model.use(subnet):
            predictions.append(tiny.logits_of(model, blocks.tokens)[:, :-1].log_softmax(-1))
    full, *both = predictions
    to_wide, to_narrow = ((full.exp() * (full - other)).sum(-1).mean().item() for other in both)
    return (in_text + to_narrow - to_wide) / 2


def every_change(sensitivity):
    for axis in ("neurons", "kv_groups"):
        assert sensitivity.widths[axis][0] == 0
        for layer, (index, width) in itertools.product(
            range(sensitivity.search_space.layers), enumerate(sensitivity.widths[axis])
        ):
            yield sensitivity.increases[axis][layer][index], (axis, layer, width)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_one_block_measures_changes_of_the_full_model(model_type):
    model = ElasticModel(tiny.plain_model(model_type))
    blocks = tiny.blocks(rows=1)
    full = model.search_space.full
    found = measure_sensitivity(model, blocks)
    for increase, change in every_change(found):
        assert increase == pytest.approx(by_hand(model, blocks, full, *change), abs=1e-5)


def test_the_second_half_is_measured_around_the_choice_of_the_first(llama):
    blocks = tiny.blocks(rows=5)
    first, second = (replace(blocks, tokens=part) for part in (blocks.tokens[:3], blocks.tokens[3:]))
    template = measure_sensitivity(llama, tiny.blocks(rows=1))
    in_full = {change: by_hand(llama, first, llama.search_space.full, *change) for _, change in every_change(template)}
    around = replace(
        template,
        increases={
            axis: tuple(tuple(in_full[axis, layer, width] for width in widths) for layer in range(tiny.LAYERS))
            for axis, widths in template.widths.items()
        },
    ).allocate(0.6)
    assert around != llama.search_space.full
    for increase, change in every_change(measure_sensitivity(llama, blocks)):
        expected = (in_full[change] + by_hand(llama, second, around, *change)) / 2
        assert increase == pytest.approx(expected, abs=1e-5)


def test_lower_layers_are_not_computed_again():
    model = ElasticModel(tiny.plain_model("llama"))
    calls = [0] * len(model.layers)
    for index, layer in enumerate(model.layers):

        def count(*_args, index=index):
            calls[index] += 1

        layer.mlp.opens[0].register_forward_pre_hook(count)
    measure_sensitivity(model, tiny.blocks(rows=1))
    changes = 4 + tiny.KV_GROUPS  # of one layer; one of them skips its MLP
    assert calls == [1 + changes - 1, 1 + 2 * changes - 1, 1 + 3 * changes - 1]  # 1: the full model


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
            COUNTS[axis] * CONVEX.increases[axis][layer][CONVEX.widths[axis].index(width)]
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


def test_attention_goes_only_where_it_costs_half_as_much_per_weight():
    """The mean loss understates it: few tokens need what stands far before them."""
    cheap, dear = 0.019, 0.021  # nats for half of a layer's attention; half of its neurons cost 0.04, weights are alike
    for increase, first in ((cheap, (1, 2)), (dear, (2, 2))):
        found = sensitivity(((2.0, 0.04, 0.0), (2.0, 1.0, 0.0)), ((3.0, increase, 0.0), (3.0, 1.0, 0.0)))
        assert found.allocate(0.9).kv_groups == first


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


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda data: data["increases"]["neurons"][0].__setitem__(0, float("nan")),
            r"\[0\]\[0\] is nan",
        ),
        (lambda data: data["increases"]["neurons"][0].__setitem__(0, float("inf")), "is inf, not a finite number"),
        (lambda data: data["increases"]["neurons"].pop(), r"increases\.neurons are not \d for each of the \d layers"),
        (
            lambda data: data["widths"]["neurons"].__setitem__(0, -1),
            r"is \[-1, .*not ascending widths of",
        ),
        (
            lambda data: data["widths"]["neurons"].__setitem__(1, 999),
            "neurons is .*999.*not ascending widths",
        ),
        (lambda data: data["widths"]["kv_groups"].pop(), "widths.kv_groups do not reach from"),
        (lambda data: data["widths"].pop("kv_groups"), "widths.kv_groups do not reach from"),
        (lambda data: data["unit_weights"]["neurons"].__setitem__(0, 0), "unit_weights.neurons is"),
        (lambda data: data.update(tokens=True), "tokens is True, not a whole number"),
        (lambda data: data.update(increases=[]), "increases is .*, not an object"),
        (lambda data: data["search_space"].update(layers=7), "for each of the 7 layers"),
    ],
)
def test_values_that_are_none_are_named(tmp_path, change, problem):
    CONVEX.save(tmp_path)
    file = tmp_path / "sensitivity.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"sensitivity\.json: .*{problem}.* Rank again\."):
        Sensitivity.load(tmp_path)


def test_those_of_another_checkpoint_are_refused(tmp_path, llama):
    llama.save_pretrained(tmp_path / "llama")
    CONVEX.save(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="belongs to a checkpoint with another search space"):
        Sensitivity.load(tmp_path / "llama")


@pytest.mark.parametrize("seed", range(20))
def test_never_above_the_share_whatever_the_curves(seed):
    """Also on straight curves, whose steps all cost the same up to rounding."""
    draw = torch.Generator().manual_seed(seed)

    def curves(points):
        slopes = torch.rand(2, 1, generator=draw) if seed % 2 else torch.rand(2, points, generator=draw).sort().values
        steps = (slopes / 3).expand(2, points).clone()
        steps[:, 0] = 0
        return tuple(tuple(reversed(row)) for row in steps.cumsum(1).tolist())

    made_up = sensitivity(curves(3), curves(3), {"neurons": (7, 11), "kv_groups": (13, 3)})
    for share in torch.linspace(0, 1, 41).tolist():
        assert made_up.share(made_up.allocate(share)) <= share + 1e-12


def test_blocks_leave_out_the_documents_that_were_ranked_on(tmp_path):
    file = tmp_path / "text.jsonl"
    texts = [f"Document {number}: {tiny.TEXT * 12}" for number in range(6)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = tiny.tokenizer()
    ranked_on = load_blocks(tokenizer, file, tokens=512, block_tokens=256)
    assert ranked_on.documents == 2
    others = sensitivity_blocks(tokenizer, file, tokens=512, after=ranked_on.documents)
    assert tokenizer.decode(others.tokens[0]).startswith("Document 2:")
    again = sensitivity_blocks(tokenizer, file, tokens=512, after=6)  # no others are left
    assert tokenizer.decode(again.tokens[0]).startswith("Document 0:")
