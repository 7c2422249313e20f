"""Pricing: formulas against real models, exports and caches; ceilings against hand-made tables; and the messages."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import tiny
from flextron import export
from flextron.budget import Budget, Limit
from flextron.costs.formulas import FORMULAS, formula_table
from flextron.costs.pricing import Ceiling, ceilings, check_possible, format_cost, meets
from flextron.costs.table import CostTable, linear_table
from flextron.errors import BudgetError, CostError, SubnetError
from flextron.model import ElasticModel
from flextron.subnet import SearchSpace, Subnet

SPACE = SearchSpace(tiny.LAYERS, (0, 8, 20, tiny.NEURONS), (0, 1, tiny.KV_GROUPS))
MEASURED = {"device": "AMD EPYC", "dtype": "float32", "threads": 2}
NONE_SKIPPED = SearchSpace(1, (8, 16), (1, 2))


def measured(metric: str, prompt_tokens: int | None = None) -> CostTable:
    """Times as if measured: 10 ms fixed, 1 per neuron and 20 per group of three layers; to the first token, of 100."""
    conditions = {**MEASURED, "prompt_tokens": 100} if metric == "ttft" else MEASURED
    return one_price(metric, conditions)


def one_price(metric: str, conditions, space: SearchSpace = SPACE) -> CostTable:
    return linear_table(
        space,
        metric=metric,
        unit="ms",
        fixed=10,
        per_neuron=[1] * space.layers,
        per_kv_group=[20] * space.layers,
        conditions=conditions,
    )


def subnets(space: SearchSpace) -> list:
    return [space.full, space.smallest, *(tiny.random_subnet(space, seed) for seed in range(3))]


def refuse(metric: str, prompt_tokens: int | None) -> CostTable:
    raise CostError(f"nobody should ask for {metric}")


# ------------------------------------------------------------------ formulas


def test_full_parameters_and_bytes_are_those_of_the_model(model):
    parameters = list(model.lm.parameters())
    assert formula_table(model, "parameters").full == sum(p.numel() for p in parameters)
    assert formula_table(model, "weights").full == sum(p.numel() * p.element_size() for p in parameters)


def test_narrower_ones_lose_the_weights_of_their_units(model):
    table = formula_table(model, "parameters")
    space = model.search_space
    for subnet in (space.uniform(8), space.uniform(20, 1), space.uniform(kv_groups=2)):
        assert table.full - table.price(subnet) == model.layer_weights(space.full) - model.layer_weights(subnet)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "granite"])
def test_exports_hold_what_the_tables_say(model_type, changes, tmp_path):
    model = ElasticModel(tiny.plain_model(model_type, **changes))
    table = formula_table(model, "parameters")
    for number, subnet in enumerate(subnets(model.search_space)):
        assert table.price(subnet) == export(model, subnet, tmp_path / str(number)).parameters_got


def test_bytes_follow_the_type_of_each_parameter(plain_llama):
    model = ElasticModel(copy.deepcopy(plain_llama).to(torch.bfloat16))
    parameters, weights = formula_table(model, "parameters"), formula_table(model, "weights")
    assert weights.price(model.search_space.uniform(20, 2)) == 2 * parameters.price(model.search_space.uniform(20, 2))
    assert (weights.unit, parameters.unit) == ("bytes", "parameters")
    assert weights.conditions == {"formula": "weights", "dtype": "bfloat16"}
    model.lm.get_input_embeddings().float()
    assert formula_table(model, "weights").fixed == weights.fixed + 2 * tiny.VOCAB * tiny.HIDDEN
    model.layers[1].mlp.closes.weight.data = model.layers[1].mlp.closes.weight.float()
    now = formula_table(model, "weights")
    assert now.neurons[1][-1] == weights.neurons[1][-1] + 2 * tiny.HIDDEN * tiny.NEURONS
    assert now.neurons[0] == weights.neurons[0]


@pytest.mark.parametrize("context", [3, tiny.TIME])
def test_kv_is_what_the_cache_holds(model, context):
    table = formula_table(model, "kv", context_tokens=context)
    assert table.fixed == 0
    for subnet in subnets(model.search_space):
        cache = DynamicCache(config=model.config)
        with model.use(subnet), torch.no_grad():
            model(tiny.token_ids(1, context), past_key_values=cache)
        groups = zip(cache.layers, subnet.kv_groups, strict=True)
        held = [tensor for layer, kept in groups if kept for tensor in (layer.keys, layer.values)]
        assert table.price(subnet) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_kv_follows_the_type_and_the_length(plain_llama):
    lm = copy.deepcopy(plain_llama)
    wide = formula_table(ElasticModel(lm), "kv", context_tokens=100)
    assert wide.full == 2 * 16 * tiny.KV_GROUPS * tiny.LAYERS * 100 * 4
    assert wide.conditions == {"formula": "kv", "dtype": "float32", "context_tokens": 100}
    assert formula_table(ElasticModel(copy.deepcopy(plain_llama).half()), "kv", context_tokens=50).full == wide.full / 4


def test_flops_are_those_of_the_matrix_products(model):
    table = formula_table(model, "flops")
    tokens = tiny.token_ids(2, 5)
    for subnet in subnets(model.search_space):
        with model.use(subnet), torch.no_grad(), FlopCounterMode(display=False) as counter:
            tiny.logits_of(model, tokens)
        counts = counter.get_flop_counts()["Global"]
        products = sum(counts.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))
        assert products == table.price(subnet) * tokens.numel()


@pytest.mark.parametrize(("metric", "message"), [("speed", "no formula for 'speed'"), ("kv", "needs context_tokens")])
def test_no_formula(llama, metric, message):
    with pytest.raises(ValueError, match=message):
        formula_table(llama, metric)


# ------------------------------------------------------------------ ceilings


def test_formulas_need_no_measurement(llama):
    budget = Budget.parse("parameters=0.5x,weights=30kB,kv=9kB@64,flops=0.5x")
    found = ceilings(llama, budget, refuse)
    assert [ceiling.table.metric for ceiling in found] == list(FORMULAS)
    assert [ceiling.text for ceiling in found] == ["parameters=0.5x", "weights=30kB", "kv=9kB@64", "flops=0.5x"]
    assert [found[1].limit, found[2].limit] == [30_000, 9_000]
    assert found[0].limit == formula_table(llama, "parameters").full / 2
    assert found[3].limit == formula_table(llama, "flops").full / 2
    assert found[2].table == formula_table(llama, "kv", context_tokens=64)


def test_a_part_of_the_cache_needs_no_length(llama):
    space = llama.search_space
    (ceiling,) = ceilings(llama, "kv=0.67x", refuse)
    assert meets([ceiling], space.uniform(kv_groups=2))
    assert not meets([ceiling], space.full)


def test_times_come_from_measured_tables(llama):
    tpot, first = ceilings(llama, "0.5x,ttft=200ms", measured)
    assert (tpot.table, tpot.limit) == (measured("tpot"), 155)
    assert (first.table, first.limit) == (measured("ttft"), 200)


def test_the_prompt_asked_for_is_passed_on(llama):
    asked = []
    ceilings(llama, "9ms,ttft=9s@30,e2e=9s@40+2", lambda *which: asked.append(which) or measured(*which))
    assert sorted(asked, key=str) == [("tpot", 40), ("tpot", None), ("ttft", 30), ("ttft", 40)]


def test_other_prompt_lengths_scale_the_time_to_the_first_token(llama):
    (same,) = ceilings(llama, "ttft=9s@100", measured)
    (longer,) = ceilings(llama, "ttft=9s@250", measured)
    assert same.table == measured("ttft")
    assert longer.table.price(SPACE.uniform(8, 1)) == 2.5 * same.table.price(SPACE.uniform(8, 1))
    assert longer.table.conditions == {**same.table.conditions, "scaled_to_prompt_tokens": 250}


def test_end_to_end_is_the_first_token_and_all_further_ones(llama):
    for text, times in (("e2e=9s@100+1", 1), ("e2e=9s@100+128", 128), ("e2e=9s@50+11", 10.5)):
        (ceiling,) = ceilings(llama, text, measured)
        assert ceiling.table.metric == "e2e"
        assert ceiling.table.full == pytest.approx(times * measured("tpot").full)
    (half,) = ceilings(llama, "e2e=0.5x@100+128", measured)
    assert half.limit == pytest.approx(64 * measured("tpot").full)


def test_a_table_that_does_not_say_its_length_is_not_scaled(llama):
    with pytest.raises(CostError, match=r"does not say for how many prompt_tokens\. Measure again\."):
        ceilings(llama, "ttft=9s@30", lambda metric, _: one_price(metric, {}))


def test_errors_of_the_text_and_of_the_tables_come_through(llama):
    with pytest.raises(BudgetError, match=r"'0\.6' has no unit"):
        ceilings(llama, "0.6", refuse)
    with pytest.raises(CostError, match="nobody should ask for tpot"):
        ceilings(llama, "12ms", refuse)


def test_meets_all_or_not():
    table = measured("tpot")
    subnet = SPACE.uniform(20, 1)  # 10 + 3 * (20 + 20) = 130
    assert meets([Ceiling(table, 130, ""), Ceiling(table, 131, "")], subnet)
    assert meets([Ceiling(table, 130 * (1 - 1e-10), "")], subnet)
    assert not meets([Ceiling(table, 130 * (1 - 1e-8), "")], subnet)
    assert not meets([Ceiling(table, 131, ""), Ceiling(table, 129, "")], subnet)
    with pytest.raises(SubnetError, match="not a choice"):
        meets([Ceiling(table, 131, "")], Subnet((7,) * 3, (1,) * 3))


# ------------------------------------------------------------------ what is possible, and how it is said


@pytest.mark.parametrize(
    ("ceiling", "message"),
    [
        (
            Ceiling(one_price("tpot", MEASURED, NONE_SKIPPED), 3, "tpot=3ms"),
            "budget tpot=3ms is below the smallest sub-network of the search space "
            "(38 ms on AMD EPYC, float32, 2 threads; 0.576x of the full model). "
            "Raise the budget, or rank with a search space that has narrower widths.",
        ),
        (
            Ceiling(one_price("tpot", {**MEASURED, "threads": 1}), 9.99, "tpot=9.99ms"),
            "budget tpot=9.99ms is below the smallest sub-network of the search space "
            "(10 ms on AMD EPYC, float32, 1 thread; 0.0323x of the full model). "
            "Raise the budget: here every layer is skipped already, and what is left are embeddings and norms.",
        ),
        (
            Ceiling(one_price("tpot", {"device": "NVIDIA H100", "dtype": "bfloat16"}), 1, "tpot=1ms"),
            "(10 ms on NVIDIA H100, bfloat16; 0.0323x of the full model)",
        ),
        (Ceiling(one_price("tpot", {}), 1, "tpot=1ms"), "(10 ms; 0.0323x of the full model)"),
    ],
)
def test_below_the_smallest(ceiling, message):
    with pytest.raises(BudgetError) as error:
        check_possible([Ceiling(measured("tpot"), 100, ""), ceiling])
    assert message in str(error.value)


def test_the_numbers_of_that_message_are_enough(llama):
    """Rounded up, so that a user who copies one gets on."""
    with pytest.raises(BudgetError) as error:
        check_possible(ceilings(llama, "weights=0.01x", refuse))
    inside = str(error.value).partition("(")[2].partition(")")[0]
    size, _, part = inside.partition(", float32; ")
    assert check_possible(ceilings(llama, f"weights={size}", refuse)) == []
    assert check_possible(ceilings(llama, f"weights={part.split()[0]}", refuse)) == []


def test_at_the_smallest_and_between_there_is_nothing_to_say():
    table = measured("tpot")
    assert check_possible([Ceiling(table, limit, "") for limit in (10 * (1 - 1e-10), 10, 309)]) == []


def test_what_the_full_model_meets_is_said():
    table = measured("tpot")
    assert check_possible([Ceiling(table, limit, f"tpot={limit}ms") for limit in (310, 200, 400)]) == [
        "tpot=310ms is all the full model needs (310 ms): the full model meets it.",
        "tpot=400ms is more than the full model needs (310 ms): the full model meets it.",
    ]


def test_one_time_of_the_full_model_is_the_full_model(llama):
    for limit in (
        Limit("tpot", 1, True),
        Limit("e2e", 1, True, 70, 31),
        Limit("kv", 1, True),
        Limit("weights", 1, True),
    ):
        found = ceilings(llama, Budget((limit,)), measured)
        assert meets(found, found[0].table.search_space.full)
        assert "is all the full model needs" in check_possible(found)[0]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.34, "ms", "12.3 ms"),
        (0.04213, "ms", "0.0421 ms"),
        (0, "ms", "0 ms"),
        (3000, "ms", "3 s"),
        (999.6, "ms", "1 s"),
        (80_123_456, "parameters", "80.1 M parameters"),
        (1.2e9, "parameters", "1.2 B parameters"),
        (2e12, "parameters", "2 T parameters"),
        (4321, "parameters", "4.32 k parameters"),
        (7, "parameters", "7 parameters"),
        (150e6, "bytes", "150 MB"),
        (1.5e9, "bytes", "1.5 GB"),
        (2e12, "bytes", "2 TB"),
        (9216, "bytes", "9.22 kB"),
        (12, "bytes", "12 bytes"),
        (212e6, "FLOPs", "212 MFLOPs"),
        (3.4e9, "FLOPs", "3.4 GFLOPs"),
        (3.4e12, "FLOPs", "3.4 TFLOPs"),
        (48_128, "FLOPs", "48.1 kFLOPs"),
        (48, "FLOPs", "48 FLOPs"),
    ],
)
def test_costs_for_people(value, unit, text):
    assert format_cost(value, unit) == text
