"""Baselines: brute force on tiny spaces, losses with interactions, and layers that do nothing."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import tiny
from flextron.choosing import baselines
from flextron.choosing.baselines import (
    block_influence,
    drop_layers,
    equal_widths,
    evolve,
    greedy,
    knapsack,
    random_search,
)
from flextron.costs.pricing import Ceiling, meets
from flextron.costs.table import linear_table
from flextron.errors import BudgetError, FlextronError, SubnetError
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.choices import increase_matrix, to_indices, to_subnet
from flextron.subnet import SearchSpace

SMALL = SearchSpace(2, (0, 2, 5, 8), (0, 1, 2))
LARGE = SearchSpace(6, (0, 2, 4, 6, 8), (0, 1, 2))
LIMITS = (0.35, 0.5, 0.72, 0.9)


def table_of(space):
    """Layers of unequal costs, with a fixed part."""
    return linear_table(
        space,
        metric="tpot",
        unit="ms",
        fixed=7,
        per_neuron=[1 + 0.3 * layer for layer in range(space.layers)],
        per_kv_group=[3.7 - 0.1 * layer for layer in range(space.layers)],
        conditions={"device": "made up"},
    )


def sensitivity_of(space, seed=0):
    """Return curves that fall with the width, some of them not convex."""
    draw = np.random.default_rng(seed)

    def rows(choices):
        steps = draw.exponential(size=(space.layers, len(choices) - 1))
        falling = np.cumsum(steps[:, ::-1], 1)[:, ::-1]
        return tuple((*map(float, row), 0.0) for row in falling)

    axes = {"neurons": space.neurons, "kv_groups": space.kv_groups}
    return Sensitivity(
        search_space=space,
        widths=axes,
        increases={axis: rows(choices) for axis, choices in axes.items()},
        unit_weights=dict.fromkeys(axes, (10,) * space.layers),
        tokens=100,
        text="made up",
    )


def increase(sensitivity, subnet) -> float:
    matrix = increase_matrix(sensitivity, counted=True)
    return float(matrix[np.arange(len(matrix)), to_indices(sensitivity.search_space, [subnet])[0]].sum())


class Meter:
    """A made-up loss: the sum of sensitivities plus a penalty on differing neighbours, which no sum expresses."""

    def __init__(self, sensitivity):
        self.sensitivity = sensitivity
        self.seen = []

    def __call__(self, subnet) -> float:
        self.seen.append(subnet)
        parts = to_indices(self.sensitivity.search_space, [subnet])[0] / 4
        return increase(self.sensitivity, subnet) + 20 * float((np.diff(parts) ** 2).sum())


def every_subnet(space):
    counts = [len(space.neurons)] * space.layers + [len(space.kv_groups)] * space.layers
    return [to_subnet(space, np.array(row)) for row in itertools.product(*map(range, counts))]


def methods(space, limit):
    """Return the choice of every method."""
    table, sensitivity = table_of(space), sensitivity_of(space)
    search = {"evaluations": 20, "seed": 0}
    return {
        "equal widths": lambda: equal_widths(table, limit),
        "drop layers": lambda: drop_layers(np.arange(space.layers), table, limit),
        "greedy": lambda: greedy(sensitivity, table, limit),
        "knapsack": lambda: knapsack(sensitivity, table, limit),
        "random": lambda: random_search(table, limit, Meter(sensitivity), **search),
        "evolution": lambda: evolve(sensitivity, table, limit, Meter(sensitivity), **search),
    }


METHODS = tuple(methods(SMALL, 1))


@pytest.mark.parametrize("space", [SMALL, LARGE])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_limit(method, space):
    table = table_of(space)
    for part in LIMITS:
        ceiling = Ceiling(table, part * table.full, "")
        assert meets([ceiling], methods(space, ceiling.limit)[method]())


@pytest.mark.parametrize("method", METHODS)
def test_the_ends(method):
    """At the smallest model's cost the answer is that model; from the full model's cost on, it is the full model."""
    table = table_of(LARGE)
    assert methods(LARGE, table.smallest)[method]() == LARGE.smallest
    for limit in (table.full, 2 * table.full):
        assert methods(LARGE, limit)[method]() == LARGE.full


@pytest.mark.parametrize("method", METHODS)
def test_below_the_smallest(method):
    with pytest.raises(
        BudgetError, match=r"budget 6\.9 ms is below the smallest .*\(7 ms on made up.*Raise the budget"
    ):
        methods(LARGE, 6.9)[method]()


# ------------------------------------------------------------------ without a measurement


def test_equal_widths_keeps_the_same_part_of_both_axes():
    table = table_of(LARGE)
    for limit in np.linspace(table.smallest, table.full, 20):
        found = equal_widths(table, limit)
        assert found.is_uniform
        least = min(found.neurons[0] / LARGE.neurons[-1], found.kv_groups[0] / LARGE.kv_groups[-1])
        for neurons, kv_groups in itertools.product(LARGE.neurons, LARGE.kv_groups):
            if table.price(LARGE.uniform(neurons, kv_groups)) <= limit:
                assert min(neurons / LARGE.neurons[-1], kv_groups / LARGE.kv_groups[-1]) <= least


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("part", LIMITS)
def test_knapsack_is_as_good_as_brute_force(part, seed):
    table, sensitivity = table_of(SMALL), sensitivity_of(SMALL, seed)
    limit = part * table.full
    fitting = [subnet for subnet in every_subnet(SMALL) if table.price(subnet) <= limit]
    found = increase(sensitivity, knapsack(sensitivity, table, limit))
    assert found == pytest.approx(min(increase(sensitivity, subnet) for subnet in fitting), rel=1e-6)


def test_knapsack_at_a_limit_that_is_met_exactly():
    table, sensitivity = table_of(SMALL), sensitivity_of(SMALL)
    for subnet in every_subnet(SMALL)[:: len(every_subnet(SMALL)) // 20]:
        assert increase(sensitivity, knapsack(sensitivity, table, table.price(subnet))) <= increase(sensitivity, subnet)


@pytest.mark.parametrize("part", LIMITS)
def test_the_sums_are_in_order(part):
    table, sensitivity = table_of(LARGE), sensitivity_of(LARGE)
    limit = part * table.full
    found = [knapsack(sensitivity, table, limit), greedy(sensitivity, table, limit), equal_widths(table, limit)]
    sums = [increase(sensitivity, subnet) for subnet in found]
    assert sums == sorted(sums)


def test_a_knapsack_that_is_not_solved_says_so(monkeypatch):
    monkeypatch.setattr(baselines, "SOLVER_SECONDS", 0)
    with pytest.raises(FlextronError, match=r"not solved in 0 s: .*Time limit.* Use greedy"):
        knapsack(sensitivity_of(LARGE), table_of(LARGE), 30)


def test_a_solver_that_exceeds_the_limit_is_asked_for_less(monkeypatch):
    table, sensitivity = table_of(SMALL), sensitivity_of(SMALL)
    solve, asked = baselines._solve, []

    def careless(sub_layers, increases, costs, most):
        asked.append(most)
        return solve(sub_layers, increases, costs, 1 if len(asked) == 1 else most)

    monkeypatch.setattr(baselines, "_solve", careless)
    assert table.price(knapsack(sensitivity, table, 20)) <= 20
    assert asked == [13 / table.full, 13 / table.full - baselines.SLACK]
    monkeypatch.setattr(baselines, "_solve", lambda *args: solve(*args[:3], 1))
    with pytest.raises(FlextronError, match="exceeds 20 ms by rounding"):
        knapsack(sensitivity, table, 20)


# ------------------------------------------------------------------ whole layers


def test_the_least_influential_layers_are_dropped_whole():
    table = table_of(LARGE)
    influence = np.array([0.9, 0.1, 0.5, 0.1, 0.8, 0.7])
    dropped = []
    for limit in np.linspace(table.full, table.smallest, 50):
        subnet = drop_layers(influence, table, float(limit))
        gone = {layer for layer in range(6) if subnet.neurons[layer] == 0}
        assert subnet.neurons == tuple(0 if layer in gone else 8 for layer in range(6))
        assert subnet.kv_groups == tuple(0 if layer in gone else 2 for layer in range(6))
        dropped += sorted(gone - set(dropped))
        if gone:  # and no more layers than necessary
            back = next(layer for layer in reversed(dropped) if layer in gone)
            wider = [tuple(full if at == back else w for at, w in enumerate(widths)) for widths, full in _wide(subnet)]
            assert table.price(replace(subnet, neurons=wider[0], kv_groups=wider[1])) > limit
    assert dropped == [1, 3, 2, 5, 4, 0]


def _wide(subnet):
    return ((subnet.neurons, 8), (subnet.kv_groups, 2))


def test_layers_that_cannot_be_dropped():
    for space in (SearchSpace(2, (1, 8), (0, 2)), SearchSpace(2, (0, 8), (1, 2))):
        with pytest.raises(SubnetError, match="without width 0 on every axis"):
            drop_layers(np.ones(2), table_of(space), 1000)
    with pytest.raises(SubnetError, match="influences of 3 layers; the table is for a model of 2"):
        drop_layers(np.ones(3), table_of(SMALL), 1000)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_influence_of_a_layer_that_does_nothing_is_zero(model_type):
    model = ElasticModel(tiny.plain_model(model_type))
    for closing in (model.layers[1].mlp.closes, model.layers[1].attention.closes):
        for parameter in closing.parameters():
            parameter.data.zero_()
    influence = block_influence(model, tiny.blocks())
    assert influence.shape == (tiny.LAYERS,)
    assert influence[1] == pytest.approx(0, abs=1e-9)
    assert (influence[[0, 2]] > 0.01).all()
    assert (influence <= 2).all()


def test_influence_is_that_of_the_hidden_states_of_the_full_model(llama):
    blocks = tiny.blocks(rows=200, time=16)  # two batches
    with llama.use(llama.search_space.full):
        states = llama(blocks.tokens, output_hidden_states=True, use_cache=False).hidden_states
    expected = 1 - np.array(
        [(a * b).sum(-1).div(a.norm(dim=-1) * b.norm(dim=-1)).mean().item() for a, b in itertools.pairwise(states[:-1])]
    )
    hooks = [len(layer.module._forward_hooks) for layer in llama.layers]
    with llama.use(llama.search_space.smallest):
        influence = block_influence(llama, blocks)
    assert influence[:2] == pytest.approx(expected, abs=1e-5)  # transformers' last state has passed the final norm
    assert [len(layer.module._forward_hooks) for layer in llama.layers] == hooks


# ------------------------------------------------------------------ searches


@pytest.mark.parametrize("part", LIMITS)
def test_evolution_improves_on_greedy_where_parts_interact(part):
    table, sensitivity = table_of(LARGE), sensitivity_of(LARGE)
    limit, meter = part * table.full, Meter(sensitivity)
    best = evolve(sensitivity, table, limit, meter, evaluations=150, seed=0)
    losses = [Meter(sensitivity)(subnet) for subnet in meter.seen]
    assert meter.seen[0] == greedy(sensitivity, table, limit)
    assert len(meter.seen) == len(set(meter.seen)) == 150
    assert best == meter.seen[int(np.argmin(losses))]
    assert min(losses) < losses[0]


def test_evolution_beats_random_search():
    table, sensitivity = table_of(LARGE), sensitivity_of(LARGE)
    limit, loss = 0.6 * table.full, Meter(sensitivity)
    evolved = [loss(evolve(sensitivity, table, limit, loss, evaluations=60, seed=seed)) for seed in range(3)]
    random = [loss(random_search(table, limit, loss, evaluations=60, seed=seed)) for seed in range(3)]
    assert max(evolved) < min(random)


@pytest.mark.parametrize("method", ["random", "evolution"])
def test_searches_are_told_by_their_seed_and_use_the_limit_up(method):
    table, sensitivity = table_of(LARGE), sensitivity_of(LARGE)
    limit = 0.6 * table.full

    def search(seed):
        meter = Meter(sensitivity)
        options = {"evaluations": 30, "seed": seed}
        if method == "random":
            best = random_search(table, limit, meter, **options)
        else:
            best = evolve(sensitivity, table, limit, meter, **options)
        return best, meter.seen

    assert search(1) == search(1)
    assert search(1)[1] != search(2)[1]
    best, seen = search(1)
    assert len(set(seen)) == 30
    loss = Meter(sensitivity)
    assert loss(best) == min(map(loss, seen))
    cheapest_step = min(2 * 1.0, 3.7 - 0.1 * 5)  # of a layer's neurons, of a KV group
    for subnet in seen[1:]:
        assert limit - 2 * 2.5 - 0.1 < table.price(subnet) <= limit
    assert any(limit - cheapest_step < table.price(subnet) for subnet in seen)


@pytest.mark.parametrize("method", ["random", "evolution"])
def test_searches_end_where_nothing_is_new(method):
    table, sensitivity = table_of(SearchSpace(1, (0, 4), (0, 2))), sensitivity_of(SearchSpace(1, (0, 4), (0, 2)))
    limit, meter = table.full - 1, Meter(sensitivity)
    if method == "random":
        random_search(table, limit, meter, evaluations=100, seed=0)
    else:
        evolve(sensitivity, table, limit, meter, evaluations=100, seed=0)
    assert len(meter.seen) == len(set(meter.seen)) == 2  # the MLP or the attention, not both


def test_searches_measure_something():
    with pytest.raises(ValueError, match="evaluations is 0; a search measures at least 1"):
        random_search(table_of(SMALL), 20, Meter(sensitivity_of(SMALL)), evaluations=0, seed=0)
