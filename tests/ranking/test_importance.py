"""Scores equal their definitions, computed by brute force; measuring does not change the model."""

import copy
import weakref

import numpy as np
import pytest
import torch

import tiny
from flextron.errors import FlextronError
from flextron.model import ElasticModel
from flextron.ranking import importance
from flextron.ranking.importance import SCORES, SECOND_ROUND_SHARE, measure_importance

HAND_MADE = {
    # Outputs of four units, and their order, best first. By size alone both orders would differ.
    "repeat": ([[2, 0, 0], [2, 0, 0], [0, 2.5, 0], [0, 0, 1]], [1, 2, 0, 3]),
    "cancel": ([[2, 0, 0], [-2.3, 0, 0], [0, 2.2, 0], [0, 0, 2.5]], [3, 2, 1, 0]),
}


@pytest.fixture
def blocks():
    return tiny.blocks()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def plain(request):
    return tiny.plain_model(request.param)


@pytest.fixture
def model(plain) -> ElasticModel:
    return ElasticModel(copy.deepcopy(plain))


def heads_of(model: ElasticModel) -> tuple[int, int]:
    attention = model.layers[0].attention
    return attention.width.full, attention.heads_per_unit


def outputs(model, weights: ElasticModel, tokens: torch.Tensor, axis: str) -> list[torch.Tensor]:
    """Return what every unit adds to the residual stream, [T, U, D] for each layer, by `weights`; keeps all tokens."""
    result, hooks = [], []
    for layer in weights.layers:
        sub = getattr(layer, axis)
        closes = model.get_submodule(weights.family.layers)[len(hooks)].get_submodule(sub.axis.closes)
        matrix_DUC = sub.closes.matrix().detach().unflatten(1, (sub.width.full * sub.heads_per_unit, -1))

        def keep(_, inputs, matrix_DUC=matrix_DUC):
            a_TUC = inputs[0].flatten(0, 1).unflatten(1, matrix_DUC.shape[1:])
            result.append((a_TUC, torch.einsum("tuc,duc->tud", a_TUC, matrix_DUC)))

        hooks.append(closes.register_forward_pre_hook(keep))
    tiny.logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return result


def gram_of(y_TUD: torch.Tensor) -> np.ndarray:
    return torch.einsum("tud,tvd->uv", y_TUD.double(), y_TUD.double()).numpy()


def check_orders(order, neuron_gram: np.ndarray, head_gram: np.ndarray, groups: int, heads: int) -> None:
    """Compare one layer's orders with eliminations on directly computed sums."""
    assert order.neurons.tolist() == importance._eliminate(neuron_gram).tolist()
    blocks_GQGQ = head_gram.reshape(groups, heads, groups, heads)
    assert order.kv_groups.tolist() == importance._eliminate(blocks_GQGQ.sum((1, 3))).tolist()
    for place, group in enumerate(order.kv_groups.tolist()):
        within = importance._eliminate(blocks_GQGQ[group, :, group])
        assert order.query_heads[place].tolist() == within.tolist()


class TestElimination:
    """Compare `_eliminate` with trying every unit at every step."""

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_brute_force_greedy(self, seed):
        draw = np.random.default_rng(seed)
        outputs_UD = draw.normal(size=(7, 3)) + draw.normal(size=3)  # more units than dimensions: they overlap
        gram = outputs_UD @ outputs_UD.T
        left_out: list[int] = []
        while len(left_out) < len(gram):
            rest = [unit for unit in range(len(gram)) if unit not in left_out]
            left_out.append(min(rest, key=lambda unit: np.square(outputs_UD[[*left_out, unit]].sum(0)).sum()))
        assert importance._eliminate(gram).tolist() == left_out[::-1]

    @pytest.mark.parametrize("case", HAND_MADE)
    def test_sees_units_that_repeat_or_cancel_each_other(self, case):
        outputs_UD, expected = np.array(HAND_MADE[case][0]), HAND_MADE[case][1]
        gram = outputs_UD @ outputs_UD.T
        order = importance._eliminate(gram).tolist()
        assert order in (
            expected,
            [{0: 1, 1: 0}.get(unit, unit) for unit in expected] if case == "repeat" else expected,
        )
        by_size = np.argsort(-gram.diagonal(), kind="stable").tolist()
        kept = 1 if case == "repeat" else 2
        assert set(order[:kept]) != set(by_size[:kept])

    def test_leaves_its_input_alone(self):
        gram = np.eye(3)
        importance._eliminate(gram)
        assert (gram == np.eye(3)).all()


@pytest.mark.parametrize("case", HAND_MADE)
def test_reconstruction_orders_a_hand_made_layer(llama, blocks, case):
    """Give all neurons the same activations, so that only the closing weights, set by hand, differ."""
    outputs_UD, expected = HAND_MADE[case]
    mlp = llama.layers[1].mlp
    with torch.no_grad():
        for module in mlp.opens:
            module.weight.copy_(module.weight[:1].expand_as(module.weight))
            module.bias.fill_(0.1)
        mlp.closes.weight.zero_()
        mlp.closes.weight[:3, :4] = torch.tensor(outputs_UD).T
    order = measure_importance(llama, blocks)[1].neurons.tolist()[:4]
    assert [0 if unit == 1 and case == "repeat" else unit for unit in order] == [
        0 if unit == 1 and case == "repeat" else unit for unit in expected
    ]


class TestScores:
    @pytest.mark.parametrize("score", [score for score in SCORES if score != "reconstruction"])
    def test_additive_ones_equal_a_direct_sum(self, model, plain, blocks, score):
        def sums(a_TUC: torch.Tensor, matrix_DUC: torch.Tensor) -> np.ndarray:
            power = 1 if score.startswith("absolute") else 2
            total_U = a_TUC.double().norm(dim=2).pow(power).sum(0)
            if score.endswith("weight"):
                total_U *= matrix_DUC.detach().double().norm(dim=(0, 2)).pow(power)
            return np.diag(total_U.numpy())

        orders = measure_importance(model, blocks, score=score)
        groups, heads = heads_of(model)
        neuron_outputs, head_outputs = (outputs(plain, model, blocks.tokens, axis) for axis in ("mlp", "attention"))
        for index, layer in enumerate(model.layers):
            neurons = layer.mlp.closes.matrix().unflatten(1, (-1, 1))
            query_heads = layer.attention.closes.matrix().unflatten(1, (groups * heads, -1))
            check_orders(
                orders[index],
                sums(neuron_outputs[index][0], neurons),
                sums(head_outputs[index][0], query_heads),
                groups,
                heads,
            )

    def test_reconstruction_equals_the_outputs_themselves(self, model, plain):
        blocks = tiny.blocks(rows=1, time=48)  # one block gives one round only
        orders = measure_importance(model, blocks)
        neuron_outputs, head_outputs = (outputs(plain, model, blocks.tokens, axis) for axis in ("mlp", "attention"))
        for order, (_, neurons), (_, query_heads) in zip(orders, neuron_outputs, head_outputs, strict=True):
            check_orders(order, gram_of(neurons), gram_of(query_heads), *heads_of(model))

    def test_the_second_round_sees_the_best_neurons_only(self, model, plain, blocks):
        halves = blocks.tokens.split(len(blocks.tokens) // 2)
        first = [gram_of(y) for _, y in outputs(plain, model, halves[0], "mlp")]
        narrowed = copy.deepcopy(plain)
        for index, gram in enumerate(first):
            dropped = importance._eliminate(gram)[int(len(gram) * SECOND_ROUND_SHARE) :]
            with torch.no_grad():
                tiny.closing_matrix(narrowed, model.family, index, "mlp")[:, torch.tensor(dropped).long()] = 0
        second = [gram_of(y) for _, y in outputs(narrowed, model, halves[1], "mlp")]
        differs = []
        for order, gram_1, gram_2 in zip(measure_importance(model, blocks), first, second, strict=True):
            both = gram_1 / gram_1.trace() + gram_2 / gram_2.trace()
            assert order.neurons.tolist() == importance._eliminate(both).tolist()
            differs.append(order.neurons.tolist() != importance._eliminate(gram_1).tolist())
        assert any(differs)

    @pytest.mark.parametrize("score", SCORES)
    def test_orders_are_permutations(self, model, blocks, score):
        for order in measure_importance(model, blocks, score=score):
            for units in (order.neurons, order.kv_groups, order.query_heads):
                assert torch.equal(units.sort(-1).values, torch.arange(units.shape[-1]).expand_as(units).int())

    def test_an_unknown_one(self, llama, blocks):
        with pytest.raises(ValueError, match=f"unknown score 'size'; the scores are {', '.join(SCORES)}"):
            measure_importance(llama, blocks, score="size")


class TestBrokenModels:
    @pytest.mark.parametrize("score", SCORES)
    @pytest.mark.parametrize("axis", ["mlp", "attention"])
    def test_a_layer_without_effect_is_ordered_all_the_same(self, llama, blocks, axis, score):
        sub = getattr(llama.layers[1], axis)
        with torch.no_grad():
            for module in (*sub.opens, sub.closes):
                module.weight.zero_()
                module.bias.zero_()
        order = measure_importance(llama, blocks, score=score)[1]
        assert order.neurons.sort().values.tolist() == list(range(tiny.NEURONS))
        assert order.kv_groups.sort().values.tolist() == list(range(tiny.KV_GROUPS))

    @pytest.mark.parametrize("score", SCORES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none_are_refused(self, llama, blocks, value, score):
        """They have no order, and permuting by a wrong one would destroy weights."""
        with torch.no_grad():
            llama.layers[1].mlp.opens[1].weight[3] = value
        with pytest.raises((ValueError, FlextronError)):
            measure_importance(llama, blocks, score=score)


def hooks_of(model) -> list:
    return [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in model.lm.modules()]


class TestLeavesNoTrace:
    @pytest.fixture(autouse=True)
    def untouched(self, model):
        before = {name: value.clone() for name, value in model.lm.state_dict().items()}
        hooks = hooks_of(model)
        subnet = model.search_space.uniform(20, 1)
        with model.use(subnet):
            yield
            assert model.subnet == subnet
        after = model.lm.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert hooks_of(model) == hooks

    @pytest.mark.parametrize("score", SCORES)
    def test_when_it_ends_well(self, model, blocks, score):
        measure_importance(model, blocks, score=score, show=True)

    @pytest.mark.parametrize("fails_at", [1, 2])
    def test_when_it_is_interrupted(self, model, blocks, monkeypatch, fails_at):
        forward, calls = model.lm.base_model.forward, []

        def interrupted(*args, **kwargs):
            calls.append(args)
            result = forward(*args, **kwargs)
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(model.lm.base_model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_importance(model, blocks)
        assert len(calls) == fails_at


def size_of(statistic: importance._Statistic) -> dict[str, int]:
    """Count the numbers that it holds; a list counts by its length."""
    held = {name: value for name, value in vars(statistic).items() if hasattr(value, "__len__")}
    return {name: value.numel() if torch.is_tensor(value) else np.size(value) for name, value in held.items()}


def by_whole_passes(model: ElasticModel, blocks, score: str) -> list[importance.Orders]:
    """The orders from passes through the whole model, with the statistics of all layers held together."""
    statistics = [[importance._Statistic(layer[axis], score) for axis in model.family.axes] for layer in model.layers]
    batches = blocks.tokens.tensor_split(2)
    with importance._observed([each for pair in statistics for each in pair]):
        for place, tokens in enumerate(batches):
            if place and score == "reconstruction":
                for mlp, _ in statistics:
                    mlp.start_second_round()
            tiny.logits_of(model, tokens)
    return [importance._orders(mlp, attention) for mlp, attention in statistics]


@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_layer_by_layer_gives_the_orders_of_whole_passes(model_type):
    model, blocks = ElasticModel(tiny.plain_model(model_type)), tiny.blocks()
    for score in ("reconstruction", "absolute"):
        for found, expected in zip(
            measure_importance(model, blocks, score=score), by_whole_passes(model, blocks, score), strict=True
        ):
            for axis in ("neurons", "kv_groups", "query_heads"):
                assert torch.equal(getattr(found, axis), getattr(expected, axis))


def test_statistics_of_one_layer_at_a_time_are_held(llama, monkeypatch):
    alive: weakref.WeakSet[importance._Statistic] = weakref.WeakSet()
    most = []

    class Counted(importance._Statistic):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(importance, "_Statistic", Counted)
    measure_importance(llama, tiny.blocks())
    assert len(most) == 2 * tiny.LAYERS
    assert max(most) <= 4  # those of the layer before live until they are replaced


@pytest.mark.parametrize("score", SCORES)
def test_statistics_do_not_grow_with_the_text(llama, monkeypatch, score):
    kept: list[importance._Statistic] = []

    class Recorded(importance._Statistic):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(importance, "_Statistic", Recorded)
    sizes = []
    for rows in (2, 24):
        kept.clear()
        measure_importance(llama, tiny.blocks(rows=rows), score=score)
        sizes.append([size_of(one) for one in kept])
    assert len(sizes[0]) == 2 * tiny.LAYERS
    assert sizes[0] == sizes[1]
    assert all("sum" in size for size in sizes[0])
