"""Cost tables: prices by hand, sums and multiples, what is refused; files come back equal, or errors name them."""

import json

import pytest

from flextron.costs.table import CostTable, linear_table
from flextron.errors import CostError, SubnetError
from flextron.subnet import SearchSpace, Subnet

SPACE = SearchSpace(layers=2, neurons=(0, 4, 8), kv_groups=(1, 2))
NEURONS = ((0, 3, 5), (0, 1, 2))
KV_GROUPS = ((2, 4), (1, 1))


def table(space=SPACE, metric="tpot", unit="ms", fixed=10, neurons=NEURONS, kv_groups=KV_GROUPS, conditions=None):
    return CostTable(space, metric, unit, fixed, neurons, kv_groups, conditions or {"device": "a CPU", "batch": 1})


def test_prices_add_up_layer_by_layer():
    assert table().price(Subnet((4, 8), (2, 1))) == 10 + 3 + 2 + 4 + 1
    assert table().full == 10 + 5 + 2 + 4 + 1
    assert table().smallest == 10 + 2 + 1


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet((4,), (1,)), "for a model of 1 layers; this model has 2"),
        (Subnet((4, 5), (1, 1)), r"neurons\[1\] is 5, not a choice"),
        (Subnet((4, 4), (3, 1)), r"kv_groups\[0\] is 3; a layer of this model has 2"),
    ],
)
def test_no_price_for_another_models_sub_network(subnet, message):
    with pytest.raises(SubnetError, match=message):
        table().price(subnet)


def test_linear_tables_cost_by_the_unit():
    linear = linear_table(
        SPACE, metric="flops", unit="FLOPs", fixed=7, per_neuron=[2, 3], per_kv_group=[10, 0], conditions={}
    )
    assert linear == CostTable(SPACE, "flops", "FLOPs", 7, ((0, 8, 16), (0, 12, 24)), ((10, 20), (0, 0)))


def test_scaled():
    subnet = Subnet((4, 8), (2, 1))
    tenfold = table().scaled(10)
    assert tenfold.price(subnet) == 10 * table().price(subnet)
    assert (tenfold.metric, tenfold.unit, tenfold.conditions) == ("tpot", "ms", table().conditions)
    assert table().scaled(0).full == 0
    with pytest.raises(CostError, match="must be numbers from 0 up"):
        table().scaled(-1)


def test_plus():
    first = table(metric="ttft", fixed=100, neurons=((0, 0, 1), (0, 2, 2)), conditions={"device": "another"})
    both = first.plus(table(), metric="e2e")
    for subnet in (SPACE.full, SPACE.smallest, Subnet((4, 8), (2, 1))):
        assert both.price(subnet) == first.price(subnet) + table().price(subnet)
    assert (both.metric, both.unit, both.conditions) == ("e2e", "ms", {"device": "another"})


def test_only_alike_tables_are_added():
    with pytest.raises(CostError, match="cannot add bytes to ms"):
        table().plus(table(unit="bytes"), metric="e2e")
    with pytest.raises(CostError, match="different search spaces"):
        table().plus(table(SearchSpace(2, (0, 4, 9), (1, 2))), metric="e2e")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons": NEURONS[:1]}, "has 2 rows of 3 neurons"),
        ({"kv_groups": ((2, 4), (1,))}, "has 2 rows of 2 kv_groups"),
        ({"neurons": ((0, 3, 5), (0, 2, 1))}, r"costs of neurons must rise .*; layer 1 has \[0.0, 2.0, 1.0\]"),
        ({"kv_groups": ((-1, 4), (1, 1))}, r"costs of kv_groups must be numbers from 0 up; layer 0 has \[-1.0, 4.0\]"),
        ({"kv_groups": ((2, float("inf")), (1, 1))}, "costs of kv_groups must be numbers from 0 up"),
        ({"fixed": -1}, "fixed cost is -1; it must be a number from 0 up"),
        ({"fixed": float("nan")}, "fixed cost is nan"),
    ],
)
def test_what_cannot_be_costs_is_refused(changes, message):
    with pytest.raises(CostError, match=message):
        table(**changes)


def test_conditions_are_a_copy():
    conditions = {"device": "a CPU"}
    made = table(conditions=conditions)
    conditions["device"] = "another"
    assert made.conditions == {"device": "a CPU"}


# ------------------------------------------------------------------ files


def test_save_and_load_agree(tmp_path):
    file = tmp_path / "new" / "folder" / "table.json"
    made = table(fixed=0.1, conditions={"device": "ein Prozessor™", "error_median": None, "batch": 1})
    made.save(file)
    assert CostTable.load(file) == made
    assert json.loads(file.read_text(encoding="utf8"))["version"] == 1


def damaged(**changes) -> str:
    good = {
        "version": 1,
        "search_space": {"layers": 2, "neurons": [0, 4, 8], "kv_groups": [1, 2]},
        "metric": "tpot",
        "unit": "ms",
        "fixed": 1.5,
        "neurons": NEURONS,
        "kv_groups": KV_GROUPS,
        "conditions": {},
    }
    return json.dumps({key: value for key, value in {**good, **changes}.items() if value != "left out"})


def test_the_file_that_is_damaged_below_is_good(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(damaged())
    assert CostTable.load(file).full == 1.5 + 12


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        (damaged()[:-20], "delimiter"),
        ("[]", "it holds a list instead of an object"),
        ("3", "it holds a int instead of an object"),
        (damaged(version=2), "it has version 2; this flextron reads 1"),
        (damaged(version="left out"), "it has version None"),
        (damaged(search_space="left out"), "it has the keys"),
        (damaged(colour="red"), r"it has the keys .*'colour'.* instead of"),
        (damaged(search_space={"layers": 2}), "neurons"),
        (damaged(search_space=[2]), r"search_space is \[2\], not an object"),
        (damaged(neurons=NEURONS[:1]), "has 2 rows of 3 neurons"),
        (damaged(neurons=((0, 3, 5), (0, -1, 2))), "numbers from 0 up"),
        (damaged(neurons=((0, 3, 5), (0, None, 2))), r"neurons\[1\]\[1\] is None, not a number"),
        (damaged(fixed="much"), "fixed is 'much', not a number"),
        (damaged(fixed=10**400), "fixed is a huge number, not a finite number"),
        (damaged(conditions=None), "conditions is None, not an object"),
        (damaged(fixed=float("nan")), "fixed is nan, not a finite number"),
        (damaged(fixed=True), "fixed is True, not a number"),
        (damaged(unit="s"), "it has 'tpot' in 's'; flextron keeps tpot in ms"),
        (damaged(metric="speed"), "it has 'speed' in 'ms'; flextron keeps"),
        (damaged(fixed=0, neurons=((0,) * 3,) * 2, kv_groups=((0,) * 2,) * 2), "the full model costs 0.0"),
        (damaged(conditions={"batch": "one"}), "conditions.batch is 'one', not a whole number"),
        (damaged(conditions={"note": [float("inf")]}), r"conditions.note\[0\] is inf, not a finite number"),
        (damaged(search_space={"layers": 10**30, "neurons": [0, 1], "kv_groups": [0]}), "search_space.layers is"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, reason):
    file = tmp_path / "table.json"
    file.write_text(content)
    with pytest.raises(CostError, match=rf"table\.json: .*{reason}.*\. Measure again, or delete the file\."):
        CostTable.load(file)


def test_missing_files_and_other_bytes_are_named(tmp_path):
    with pytest.raises(CostError, match=r"none\.json: .*No such file"):
        CostTable.load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CostError, match=r"bytes\.json: .*decode"):
        CostTable.load(tmp_path / "bytes.json")
