"""Levels: made from a model, kept in levels.json, found by budgets."""

import json
import random
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

import tiny
from flextron.choosing.routing import route
from flextron.costs.saved import save_table
from flextron.costs.table import linear_table
from flextron.errors import BudgetError, CheckpointError, CostError
from flextron.routers.static.learning import FIRST_PAIRS
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.pairs import Pairs
from flextron.routers.static.router import Router, RouterAbout
from flextron.routers.static.surrogate import Surrogate, SurrogateError
from flextron.serving.engine import Level
from flextron.serving.levels import make_levels
from flextron.serving.saved import FILE, Levels
from flextron.subnet import AXES, Subnet


def table(model, metric, **conditions):
    space = model.search_space
    costs = {"per_neuron": [0.05] * space.layers, "per_kv_group": [0.4] * space.layers}
    return linear_table(space, metric=metric, unit="ms", fixed=2.0, conditions=conditions, **costs)


@pytest.fixture
def levels(llama, sensitivity):
    return make_levels(llama, sensitivity=sensitivity)


class TestMaking:
    def test_each_contains_the_one_before_and_the_last_is_the_full_model(self, llama, levels):
        assert len(levels) > 4
        assert levels[-1].name == "full"
        assert levels[-1].share == 1
        assert levels[-1].subnet == llama.search_space.full
        for low, high in pairwise(levels):
            assert all(a <= b for axis in AXES for a, b in zip(low.subnet[axis], high.subnet[axis], strict=True))
            assert low.subnet != high.subnet
            assert low.share < high.share

    def test_each_keeps_within_its_name(self, levels):
        for level in levels[:-1]:
            assert 0 < level.share <= float(level.name.removesuffix("x"))

    def test_without_a_table_shares_are_of_parameters_and_it_says_so(self, llama, sensitivity):
        notes = []
        levels = make_levels(llama, sensitivity=sensitivity, warn=notes.append)
        assert levels.metric == "parameters"
        assert any("shares are of parameters" in note for note in notes)
        assert {(level.step_ms, level.prefill_ms_per_token) for level in levels} == {(None, None)}

    def test_tables_price_them(self, llama, sensitivity, tmp_path):
        save_table(tmp_path, table(llama, "tpot", context_tokens=64))
        save_table(tmp_path, table(llama, "ttft", prompt_tokens=100))
        levels = make_levels(llama, tmp_path, sensitivity=sensitivity)
        assert levels.metric == "tpot"
        assert set(levels.conditions) == {"tpot", "ttft"}
        for level in levels:
            assert level.share == pytest.approx(level.step_ms / levels[-1].step_ms)
            assert level.prefill_ms_per_token == pytest.approx(level.step_ms / 100)

    def test_a_table_of_another_machine_is_named_and_not_used(self, llama, sensitivity, tmp_path):
        save_table(tmp_path, table(llama, "tpot", context_tokens=64, device="Abacus"))
        notes = []
        levels = make_levels(llama, tmp_path, sensitivity=sensitivity, warn=notes.append)
        assert (levels.metric, levels[0].step_ms) == ("parameters", None)
        assert any("Abacus" in note for note in notes)
        assert make_levels(llama, tmp_path, sensitivity=sensitivity, any_device=True).metric == "tpot"

    def test_a_time_without_a_table_is_an_error(self, llama, sensitivity):
        with pytest.raises(CostError, match="measure-latency"):
            make_levels(llama, sensitivity=sensitivity, metric="tpot")

    def test_sensitivities_predict_increases(self, levels):
        assert levels.losses == "sensitivities"
        assert levels[-1].loss == 0
        assert all(low.loss > high.loss for low, high in pairwise(levels))

    def test_a_router_predicts_losses(self, llama, sensitivity, tmp_path):
        times = table(llama, "tpot", context_tokens=64)
        save_table(tmp_path, times)
        error = SurrogateError(0.1, 1.0, 8)
        about = RouterAbout("tpot", dict(times.conditions), "text", 64, 8, error, error, ())
        net = StaticRouter.of(sensitivity, times, lowest=0.5)
        router = Router(llama.search_space, net, Surrogate.of(sensitivity), about)
        router.save(tmp_path, llama)
        levels = make_levels(llama, tmp_path)
        assert (levels.metric, levels.losses) == ("tpot", "router")
        assert [level.loss for level in levels] == [router.predicted_loss(level.subnet) for level in levels]
        assert levels[levels.find("0.8x")].subnet == route(llama, "tpot=0.8x", tmp_path).subnet

    def test_measured_pairs_predict_losses_without_a_router(self, llama, sensitivity, tmp_path):
        draw, space = random.Random(0), llama.search_space  # noqa: S311
        pairs = Pairs.beside(tmp_path, {"fingerprint": llama.fingerprint(), "text": "text", "tokens": 8}, space)
        while len(pairs) < FIRST_PAIRS:
            layers = range(space.layers)
            subnet = Subnet(*([draw.choice(widths) for _ in layers] for widths in (space.neurons, space.kv_groups)))
            pairs.add(subnet, 5.0 - 2 * llama.share(subnet))
        levels = make_levels(llama, tmp_path, sensitivity=sensitivity)
        assert levels.losses == "pairs"
        for level in levels:
            assert level.loss == pytest.approx(5.0 - 2 * llama.share(level.subnet), abs=0.2)
        levels.save(tmp_path)
        assert Levels.load(tmp_path) == levels

    def test_shares_below_the_smallest_sub_network_give_no_level(self, llama, sensitivity):
        notes = []
        levels = make_levels(llama, sensitivity=sensitivity, shares=(1e-6, 0.8), warn=notes.append)
        assert levels.names == ("0.8x", "full")
        assert any(note.startswith("no level of 1e-06x") for note in notes)

    def test_shares_with_one_answer_give_one_level(self, llama, sensitivity):
        assert make_levels(llama, sensitivity=sensitivity, shares=(0.7, 0.7 + 1e-7)).names == ("0.7x", "full")

    def test_a_model_without_sensitivities_is_an_error(self, llama):
        with pytest.raises(BudgetError, match="sensitivities"):
            make_levels(llama)

    @pytest.mark.parametrize("wrong", [{"shares": (0.5, 1.2)}, {"shares": (0.0,)}, {"metric": "joules"}])
    def test_wrong_arguments(self, llama, sensitivity, wrong):
        with pytest.raises(ValueError, match="shares are"):
            make_levels(llama, sensitivity=sensitivity, **wrong)


class TestFinding:
    def test_names_indices_and_shares(self, levels):
        assert [levels.find(name) for name in levels.names] == list(range(len(levels)))
        assert [levels.find(index) for index in range(len(levels))] == list(range(len(levels)))
        assert levels.find("0.999x") == len(levels) - 2
        assert levels.find("1x") == levels.find("1.5x") == levels.find(" full ") == len(levels) - 1

    def test_a_share_gives_the_largest_level_within(self, levels):
        share = (levels[1].share + levels[2].share) / 2
        assert levels.find(f"{share}x") == 1
        assert levels.find(f"{levels[1].share}x") == 1

    @pytest.mark.parametrize("wrong", ["", "0.6", "12ms", "nanx", "-1x", "0.0001x", "largest", -1, 99, True, 0.5, None])
    def test_others_are_refused(self, levels, wrong):
        with pytest.raises(BudgetError, match=r"[Ll]evel"):
            levels.find(wrong)


class TestFile:
    def test_save_and_load_agree(self, levels, tmp_path):
        assert levels.save(tmp_path) == tmp_path / FILE
        assert Levels.load(tmp_path) == levels

    def test_of_other_weights(self, levels, tmp_path):
        levels.save(tmp_path)
        other = tiny.plain_model("llama", intermediate_size=32)
        assert Levels.load(tmp_path, fingerprint=levels.fingerprint) == levels
        with pytest.raises(CheckpointError, match="other weights"):
            Levels.load(tmp_path, fingerprint=str(other))

    def test_a_missing_file_names_the_way_out(self, tmp_path):
        with pytest.raises(CheckpointError, match="make_levels"):
            Levels.load(tmp_path)

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            (("version",), 2, "version"),
            (("levels",), [], "at least one level"),
            (("levels", 0, "name"), "full", "must differ"),
            (("levels", 0, "name"), "a b", "no space"),
            (("levels", 0, "share"), 0, "above 0"),
            (("levels", 0, "share"), "much", "not a number"),
            (("levels", 0, "step_ms"), -1.0, "above 0"),
            (("levels", 0, "subnet", "neurons", 0), 41, "a layer of this model has 40"),
            (("levels", 0, "more"), 1, "unknown keys"),
            (("losses",), "hearsay", "not from 'hearsay'"),
            (("search_space", "layers"), 4, "must be the full model"),
        ],
    )
    def test_damage_is_named(self, levels, tmp_path, path, value, says):
        data = json.loads(levels.save(tmp_path).read_text())
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / FILE).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=says):
            Levels.load(tmp_path)

    def test_levels_that_are_not_nested_are_refused(self, levels):
        low, *others = levels
        wider = replace(low, subnet=others[0].subnet.with_width("neurons", 0, 40))
        with pytest.raises(ValueError, match="must contain"):
            replace(levels, levels=(wider, *others))
        with pytest.raises(ValueError, match="must contain"):
            replace(levels, levels=(others[0], replace(others[0], name="again"), *others[1:]))

    def test_levels_by_hand(self, llama):
        space = llama.search_space
        full = Level("full", 1.0, space.full, None, None, None)
        assert list(Levels((full,), "parameters", None, space, llama.fingerprint())) == [full]
        assert asdict(full)["loss"] is None
