"""The static router: arrays, surrogate, nested answers within limits, training, saving and loading."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tiny
from flextron import cli
from flextron.choosing.explaining import as_text, explain
from flextron.choosing.routing import route
from flextron.config import TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.costs.pricing import Ceiling, meets
from flextron.costs.saved import save_table
from flextron.costs.table import linear_table
from flextron.data.blocks import TokenBlocks
from flextron.environment import faster_dtype
from flextron.errors import BudgetError, CostError, RouterError, SubnetError
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import COUNTS, Sensitivity
from flextron.routers.choices import allowed, cost_matrix, increase_matrix, prices, to_indices, to_subnet
from flextron.routers.static import learning as training
from flextron.routers.static import surrogate
from flextron.routers.static.learning import check_gain, fit_router, optimise, train_router
from flextron.routers.static.making import describe_router, router_from_pairs, unused_blocks
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.pairs import LossMeter, Pairs
from flextron.routers.static.router import ABOUT, WEIGHTS, Check, Router, metrics_with_router, route_along
from flextron.routers.static.surrogate import Surrogate, SurrogateError, cross_validated
from flextron.subnet import AXES, SearchSpace, Subnet
from flextron.training.run import train
from flextron.training.sampling import even_sensitivity


@pytest.fixture
def table(llama):
    return linear_table(
        llama.search_space,
        metric="tpot",
        unit="ms",
        fixed=2.0,
        per_neuron=[0.05] * llama.search_space.layers,
        per_kv_group=[0.4] * llama.search_space.layers,
        conditions={"batch": 1, "context_tokens": 512},
    )


def ceiling(table, share: float) -> Ceiling:
    return Ceiling(table, share * table.full, f"tpot={share}x")


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    """Few steps are enough for six sub-layers."""
    monkeypatch.setattr(surrogate, "STEPS", 250)
    monkeypatch.setattr(training, "STEPS", 150)


def any_router_will_do(patch) -> None:
    """Few steps of training, and no router refused."""
    patch.setattr(surrogate, "STEPS", 20)
    patch.setattr(training, "STEPS", 20)
    patch.setattr(training, "LARGEST_ERROR", 10.0)
    patch.setattr(training, "_orders", lambda _: True)


class SyntheticMeter:
    """A synthetic loss with an interaction that single sensitivities do not show."""

    def __init__(self, sensitivity, noise: float = 0.0, scale: float = 1.0) -> None:
        self.increases_SK = increase_matrix(sensitivity)
        self.space = sensitivity.search_space
        self.noise = np.random.default_rng(0), noise
        self.scale = scale
        self.measured = 0
        self.blocks = TokenBlocks(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), "synthetic")

    def __call__(self, subnet: Subnet) -> float:
        self.measured += 1
        indices = to_indices(self.space, [subnet])[0]
        parts = self.increases_SK[np.arange(len(indices)), indices] * np.linspace(0.6, 1.6, len(indices))
        draw, size = self.noise
        return float(3 + self.scale * (parts.sum() + 0.2 * parts.sum() ** 2) + size * draw.standard_normal())


class TestChoices:
    def test_indices_and_back(self, llama, sensitivity):
        space = llama.search_space
        subnets = [space.full, space.smallest, sensitivity.allocate(0.6)]
        assert [to_subnet(space, row) for row in to_indices(space, subnets)] == subnets
        assert to_indices(space, []).shape == (0, 2 * space.layers)

    def test_a_foreign_subnet_is_an_error(self, llama):
        with pytest.raises(SubnetError, match="layers"):
            to_indices(llama.search_space, [Subnet((1,), (1,))])

    def test_prices_are_those_of_the_table(self, llama, sensitivity, table):
        subnets = [sensitivity.allocate(share) for share in (0.3, 0.6, 1)]
        found = prices(cost_matrix(table), table.fixed, to_indices(llama.search_space, subnets))
        assert found == pytest.approx([table.price(subnet) for subnet in subnets])

    def test_allowed_are_the_choices_of_each_axis(self, llama):
        space = llama.search_space
        layers = space.layers
        assert allowed(space).sum(1).tolist() == [len(space.neurons)] * layers + [len(space.kv_groups)] * layers


class TestSurrogate:
    def data(self, sensitivity, count=120, seed=0):
        draw = np.random.default_rng(seed)
        counts = allowed(sensitivity.search_space).sum(1)
        indices = (draw.random((count, len(counts))) * counts).astype(np.int64)
        meter = SyntheticMeter(sensitivity)
        return indices, np.array([meter(to_subnet(sensitivity.search_space, row)) for row in indices])

    def test_it_learns_what_the_sum_of_sensitivities_misses(self, sensitivity):
        indices, losses = self.data(sensitivity)
        unseen, truth = self.data(sensitivity, seed=1)
        untrained = Surrogate.of(sensitivity).predict(unseen)
        learnt = SurrogateError.of(Surrogate.of(sensitivity).fit(indices, losses).predict(unseen), truth)
        plain = np.abs(untrained - untrained.mean() - (truth - truth.mean())).mean()
        assert learnt.mean_absolute < 0.4 * plain
        assert learnt.rank_correlation > 0.97

    def test_cross_validation_tells_the_error_on_the_unseen(self, sensitivity):
        indices, losses = self.data(sensitivity)
        unseen, truth = self.data(sensitivity, seed=1)
        told = cross_validated(Surrogate.of(sensitivity), indices, losses)
        true = SurrogateError.of(Surrogate.of(sensitivity).fit(indices, losses).predict(unseen), truth)
        assert told.pairs == len(losses)
        assert told.mean_absolute == pytest.approx(true.mean_absolute, rel=0.6)

    def test_one_hot_and_indices_agree(self, sensitivity):
        indices, losses = self.data(sensitivity, count=30)
        learnt = Surrogate.of(sensitivity).fit(indices, losses)
        with torch.no_grad():
            choices = F.one_hot(torch.tensor(indices), allowed(sensitivity.search_space).shape[1]).float()
            assert learnt(choices).double().numpy() == pytest.approx(learnt.predict(indices), rel=1e-5)

    def test_learning_is_the_same_twice_and_leaves_the_generator_alone(self, sensitivity):
        indices, losses = self.data(sensitivity, count=30)
        torch.manual_seed(3)
        first = Surrogate.of(sensitivity).fit(indices, losses).predict(indices)
        state = torch.get_rng_state()
        second = Surrogate.of(sensitivity)
        torch.set_rng_state(state)
        assert (second.fit(indices, losses).predict(indices) == first).all()
        assert torch.equal(torch.get_rng_state(), state)

    def test_attention_counts_twice_where_a_router_learns(self, sensitivity):
        net = Surrogate.of(sensitivity)
        space = sensitivity.search_space
        for axis, times in COUNTS.items():
            narrow = space.full.with_width(axis, 1, space[axis][0])
            one_hot = torch.nn.functional.one_hot(torch.tensor(to_indices(space, [narrow])), net.increases_SK.shape[1])
            increase = sensitivity.increases[axis][1][0]
            assert net(one_hot.float()).item() == pytest.approx(increase, rel=1e-5)
            assert net.counted(one_hot.float()).item() == pytest.approx(times * increase, rel=1e-5)


class TestAnswers:
    """The router keeps its promises for any budget, before and after training."""

    @pytest.fixture(params=["untrained", "trained"])
    def net(self, request, sensitivity, table):
        net = StaticRouter.of(sensitivity, table, lowest=0.4)
        if request.param == "trained":
            indices, losses = TestSurrogate().data(sensitivity, count=60)
            optimise(net, Surrogate.of(sensitivity).fit(indices, losses), seed=0, steps=60)
        return net

    def test_no_answer_exceeds_its_budget_and_none_shrinks_as_it_grows(self, llama, net, table):
        before = llama.search_space.smallest
        for share in np.linspace(table.smallest / table.full, 1, 50):
            limit = ceiling(table, float(share))
            subnet = route_along(net, llama.search_space, [limit])
            assert meets([limit], subnet)
            assert all(
                now >= then
                for axis in AXES
                for now, then in zip(getattr(subnet, axis), getattr(before, axis), strict=True)
            )
            before = subnet
        assert before == llama.search_space.full

    def test_the_budget_is_used_up_to_a_step(self, llama, net, table):
        space = llama.search_space
        steps = np.diff(cost_matrix(table), axis=1).max()
        for share in np.linspace(0.45, 0.95, 11):
            subnet = route_along(net, space, [ceiling(table, float(share))])
            assert table.price(subnet) > share * table.full - steps

    def test_all_limits_are_kept(self, llama, net, table):
        groups = linear_table(
            llama.search_space,
            metric="kv",
            unit="bytes",
            fixed=0,
            per_neuron=[0] * 3,
            per_kv_group=[10] * 3,
            conditions={},
        )
        both = [ceiling(table, 0.9), Ceiling(groups, 0.5 * groups.full, "kv=0.5x")]
        subnet = route_along(net, llama.search_space, both)
        assert meets(both, subnet)
        assert groups.price(subnet) == pytest.approx(0.5 * groups.full, abs=10)

    def test_what_costs_nothing_is_kept(self, llama, net):
        space = llama.search_space
        groups = linear_table(
            space, metric="kv", unit="bytes", fixed=0, per_neuron=[0] * 3, per_kv_group=[10] * 3, conditions={}
        )
        subnet = route_along(net, space, [Ceiling(groups, 0.5 * groups.full, "kv=0.5x")])
        assert subnet.neurons == space.full.neurons

    def test_widths_are_multiples_where_asked(self, llama, net, table):
        space = llama.search_space
        step = 2 * space.neurons[1]
        before = 0.0
        for share in np.linspace(0.3, 1, 15):
            limit = ceiling(table, float(share))
            subnet = route_along(net, space, [limit], neuron_step=step)
            assert all(n % step == 0 or n == space.neurons[-1] for n in subnet.neurons)
            assert meets([limit], subnet)
            assert table.price(subnet) >= before
            before = table.price(subnet)
        assert before == table.full
        free = route_along(net, space, [ceiling(table, 0.6)], neuron_step=space.neurons[1])
        assert free == route_along(net, space, [ceiling(table, 0.6)])

    @pytest.mark.parametrize("step", [0, -64, 1000])
    def test_a_step_without_multiples_is_refused(self, llama, net, table, step):
        with pytest.raises(ValueError, match=f"neuron_step is {step}; .*multiples of it"):
            route_along(net, llama.search_space, [ceiling(table, 0.6)], neuron_step=step)

    def test_untrained_it_is_about_the_greedy_choice(self, llama, sensitivity, table):
        net = StaticRouter.of(sensitivity, table, lowest=0.4)
        increases = increase_matrix(sensitivity, counted=True)

        def total(subnet):
            return increases[np.arange(len(increases)), to_indices(llama.search_space, [subnet])[0]].sum()

        for share in (0.5, 0.7, 0.9):
            routed = route_along(net, llama.search_space, [ceiling(table, share)])
            even = next(
                llama.search_space.uniform(width)
                for width in reversed(llama.search_space.neurons)
                if table.price(llama.search_space.uniform(width)) <= share * table.full
            )
            assert total(routed) < total(even)


class TestPairs:
    ABOUT: ClassVar = {"fingerprint": "f00d", "tokens": 7}

    def test_they_come_back_and_a_cut_line_is_left_out(self, tmp_path, llama):
        pairs = Pairs(tmp_path / "routers" / "pairs.jsonl", self.ABOUT)
        pairs.add(llama.search_space.full, 3.0)
        pairs.add(llama.search_space.smallest, 9.5)
        with pairs.file.open("a") as file:
            file.write('{"neurons": [1, 2')
        again = Pairs(pairs.file, self.ABOUT)
        assert (again.subnets, again.losses) == (pairs.subnets, [3.0, 9.5])
        again.add(llama.search_space.full, 3.1)
        assert Pairs(pairs.file, self.ABOUT).losses == [3.1, 9.5]  # a double counts once

    def test_those_of_another_checkpoint_or_text_have_a_file_of_their_own(self, tmp_path, llama):
        pairs = Pairs.beside(tmp_path, self.ABOUT)
        pairs.add(llama.search_space.full, 3.0)
        assert not len(Pairs.beside(tmp_path, {**self.ABOUT, "fingerprint": "beef"}))
        assert len(Pairs.beside(tmp_path, self.ABOUT)) == 1
        with pytest.raises(RouterError, match=r"pairs of another checkpoint or text.*Delete it"):
            Pairs(pairs.file, {**self.ABOUT, "fingerprint": "beef"})

    @pytest.mark.parametrize("text", ["hello\n", "7\n", "", '{"loss": 3}\n{"loss": 4}\n'])
    def test_a_file_that_is_no_pairs_is_an_error(self, tmp_path, text):
        (tmp_path / "pairs.jsonl").write_text(text)
        with pytest.raises(RouterError, match=r"cannot read the measured pairs in .*pairs\.jsonl"):
            Pairs(tmp_path / "pairs.jsonl", self.ABOUT)

    def test_a_broken_line_in_the_middle_is_told_and_left_out(self, tmp_path, llama, capsys):
        pairs = Pairs(tmp_path / "pairs.jsonl", self.ABOUT)
        for loss in (3.0, 4.0, 5.0, 6.0):
            pairs.add(llama.search_space.full, loss)
        lines = pairs.file.read_text().splitlines()
        lines[1:4] = ["{garbled", lines[2].replace("4.0", "NaN"), lines[3].replace(f"{tiny.NEURONS}", "7")]
        pairs.file.write_text("\n".join(lines) + "\n")
        assert Pairs(pairs.file, self.ABOUT, llama.search_space).losses == [6.0]
        assert "line 2 is left out, because it is not JSON" in capsys.readouterr().err
        assert pairs.file.read_text().splitlines() == lines

    def test_the_meter_is_the_mixed_loss(self, llama, sensitivity):
        tokens = torch.randint(0, 90, (6, 16), generator=torch.Generator().manual_seed(0))
        meter = LossMeter(llama, TokenBlocks(tokens, torch.ones_like(tokens), "random"))
        subnet = sensitivity.allocate(0.5)
        with torch.no_grad():
            full = llama(tokens).logits[:, :-1].softmax(-1)
            with llama.use(subnet):
                logs = llama(tokens).logits[:, :-1].log_softmax(-1)
        to_text = -logs.gather(2, tokens[:, 1:, None]).mean()
        to_full = -(logs * full).sum(-1).mean()
        assert meter(subnet) == pytest.approx(((to_text + to_full) / 2).item(), rel=1e-4)
        assert meter.measured == 1


class TestTraining:
    EVALUATIONS = training.LEAST_EVALUATIONS

    @pytest.fixture
    def pairs(self, tmp_path):
        return Pairs(tmp_path / "pairs.jsonl", {})

    def test_the_router_beats_the_greedy_choice_where_sensitivities_mislead(self, sensitivity, table, pairs):
        meter = SyntheticMeter(sensitivity)
        router = train_router(sensitivity, table, meter, pairs, evaluations=256)
        assert meter.measured <= 256
        assert router.about.error.rank_correlation > 0.95
        gains = [check.greedy_loss - check.loss for check in router.about.checks]
        assert len(gains) == training.CHECKED_BUDGETS
        assert np.mean(gains) >= 0
        for check in router.about.checks:
            assert table.price(check.subnet) <= check.budget * table.full * (1 + 1e-9)

    def test_a_router_learns_from_losses_in_which_attention_counts_twice(self, sensitivity, table, pairs, monkeypatch):
        given = []
        monkeypatch.setattr(training, "optimise", lambda _router, losses_of, **_: given.append(losses_of))
        for row, loss in zip(*TestSurrogate().data(sensitivity), strict=True):
            pairs.add(to_subnet(sensitivity.search_space, row), float(loss))
        fitted = fit_router(sensitivity, table, pairs, text="made up", tokens=7).surrogate
        space = sensitivity.search_space
        narrow = space.full.with_width("kv_groups", 1, 0)
        indices = to_indices(space, [narrow])
        one_hot = torch.nn.functional.one_hot(torch.tensor(indices), fitted.increases_SK.shape[1]).float()
        expected = fitted.predict(indices)[0] + sensitivity.increases["kv_groups"][1][0]
        assert [losses_of(one_hot).item() for losses_of in given] == [pytest.approx(expected, rel=1e-4)]

    def test_interrupted_it_measures_only_what_is_missing(self, sensitivity, table, pairs, monkeypatch):
        any_router_will_do(monkeypatch)
        meter = SyntheticMeter(sensitivity)

        def cut_short(subnet):
            if meter.measured == 120:
                raise KeyboardInterrupt
            return meter(subnet)

        cut_short.blocks = meter.blocks
        with pytest.raises(KeyboardInterrupt):
            train_router(sensitivity, table, cut_short, pairs, evaluations=self.EVALUATIONS)
        assert len(pairs) == 120
        again = SyntheticMeter(sensitivity)
        train_router(sensitivity, table, again, Pairs(pairs.file, {}), evaluations=self.EVALUATIONS)
        assert again.measured <= self.EVALUATIONS - 120 + training.ROUND_PAIRS

    def test_a_surrogate_that_cannot_learn_is_refused(self, sensitivity, table, pairs):
        with pytest.raises(RouterError, match=r"does not predict losses well enough.*--evaluations"):
            train_router(
                sensitivity, table, SyntheticMeter(sensitivity, noise=1.0), pairs, evaluations=self.EVALUATIONS
            )
        assert len(pairs) >= self.EVALUATIONS - 2 * training.CHECKED_BUDGETS

    @pytest.mark.parametrize(
        ("error", "gains", "kept"),
        [
            (0.3, (0.1, 0.2, 0.3), True),
            (0.3, (0.0, 0.0, 0.1), False),
            (0.3, (-0.1, -0.2, -0.3), False),
            (0.3, (0.0, 0.0, 0.0), False),
            (0.09, (0.0, 0.0, 0.0), True),
        ],
    )
    def test_a_surrogate_far_off_must_lead_to_answers_that_beat_the_greedy_choice(self, error, gains, kept):
        checks = [Check(0.5, None, 5.0 - gain, 5.0) for gain in gains]
        with nullcontext() if kept else pytest.raises(RouterError, match="must beat the greedy choice's"):
            check_gain(SurrogateError(error, 0.99, 48), checks, 160)

    @pytest.mark.parametrize(("rank", "trained"), [(0.9, True), (0.8, True), (0.7, False), (float("nan"), False)])
    def test_no_router_is_trained_on_a_surrogate_that_orders_badly(self, rank, trained):
        assert training._orders(SurrogateError(0.01, rank, 48)) == trained

    def test_one_far_off_whose_answers_stay_the_greedy_ones_is_refused(self, sensitivity, table, pairs, monkeypatch):
        monkeypatch.setattr(training, "optimise", lambda *_args, **_kwargs: None)
        with pytest.raises(RouterError, match=r"must beat the greedy choice's.*they gain 0\.000 ± 0\.000 nats"):
            train_router(sensitivity, table, SyntheticMeter(sensitivity, scale=4), pairs, evaluations=self.EVALUATIONS)

    def test_too_few_evaluations_and_a_lowest_budget_above_the_full_model(self, sensitivity, table, pairs):
        meter = SyntheticMeter(sensitivity)
        with pytest.raises(ValueError, match=f"evaluations is 10; a router needs at least {self.EVALUATIONS}"):
            train_router(sensitivity, table, meter, pairs, evaluations=10)
        with pytest.raises(ValueError, match=r"lowest is 1\.5; it must be below 1"):
            train_router(sensitivity, table, meter, pairs, lowest=1.5)


@pytest.fixture
def folder(tmp_path, llama, sensitivity, table):
    """An elastic checkpoint with sensitivities and a table that names no device."""
    llama.save_pretrained(tmp_path / "elastic")
    sensitivity.save(tmp_path / "elastic")
    save_table(tmp_path / "elastic", table)
    return tmp_path / "elastic"


@pytest.fixture(scope="module")
def routers():
    """The result of one training, shared by all tests that only read it."""
    return {}


@pytest.fixture
def trained(folder, sensitivity, table, routers):
    """The router saved in the folder."""
    if not routers:
        pairs = Pairs(folder / "routers" / "pairs.jsonl", {})
        with pytest.MonkeyPatch.context() as patch:
            any_router_will_do(patch)
            routers["tpot"] = train_router(
                sensitivity, table, SyntheticMeter(sensitivity), pairs, evaluations=training.LEAST_EVALUATIONS
            )
    routers["tpot"].save(folder, ElasticModel.from_pretrained(folder))
    return routers["tpot"]


class TestFolder:
    def test_saved_and_loaded_it_answers_the_same(self, folder, trained, table):
        model = ElasticModel.from_pretrained(folder)
        again = Router.load(folder, "tpot", model)
        assert again.about == trained.about
        for share in (0.45, 0.6, 0.83):
            subnet = trained.choose([ceiling(table, share)])
            assert again.choose([ceiling(table, share)]) == subnet
            assert again.predicted_loss(subnet) == trained.predicted_loss(subnet)
        assert metrics_with_router(folder) == ["tpot"]
        assert sorted(file.name for file in (folder / "routers" / "tpot").iterdir()) == [ABOUT, WEIGHTS]

    def test_it_is_replaced_as_a_whole(self, folder, trained):
        trained.save(folder, ElasticModel.from_pretrained(folder))
        assert metrics_with_router(folder) == ["tpot"]

    def test_what_a_killed_save_left_is_no_router(self, folder, trained):
        del trained
        shutil.copytree(folder / "routers" / "tpot", folder / "routers" / ".tpot.partial-x")
        assert metrics_with_router(folder) == ["tpot"]

    def test_it_serves_any_type_of_the_same_weights(self, folder, trained):
        del trained
        assert Router.load(folder, "tpot", ElasticModel.from_pretrained(folder, dtype="bfloat16"))

    def test_that_of_another_checkpoint_is_refused(self, folder, trained):
        del trained
        other = ElasticModel.from_pretrained(folder)
        with torch.no_grad():
            other.layers[0].mlp.closes.weight.neg_()
        with pytest.raises(RouterError, match=r"trained for another checkpoint.*train-router"):
            Router.load(folder, "tpot", other)

    @pytest.mark.parametrize(
        ("name", "change", "problem"),
        [
            (
                "router.utilities_SK",
                lambda tensor: tensor * float("nan"),
                "utilities_SK has numbers that are not",
            ),
            ("router.log_prices", lambda tensor: tensor[:-1], r"log_prices is torch.float32 of \(32,\) instead of"),
            ("surrogate.base", lambda tensor: tensor.half(), "base is torch.float16 of"),
            ("router.costs_SK", lambda tensor: -tensor, "costs or its lowest budget"),
            ("router.ends", lambda tensor: tensor + 1, "costs or its lowest budget"),
            ("router.allowed_SK", lambda tensor: ~tensor, "allowed_SK belongs to another search space"),
            ("surrogate.more", None, "tensor more is unknown"),
        ],
    )
    def test_weights_that_are_none(self, folder, trained, name, change, problem):
        del trained
        file = folder / "routers" / "tpot" / WEIGHTS
        weights = load_file(file)
        weights[name] = torch.zeros(1) if change is None else change(weights[name]).contiguous()
        save_file(weights, file)
        with pytest.raises(RouterError, match=rf"cannot read the router in .*{problem}.*train-router"):
            Router.load(folder, "tpot", ElasticModel.from_pretrained(folder))

    @pytest.mark.parametrize("damage", ["about", "weights", "version", "keys"])
    def test_a_damaged_one_is_an_error(self, folder, trained, damage):
        del trained
        source = folder / "routers" / "tpot"
        about = json.loads((source / ABOUT).read_text())
        if damage == "about":
            (source / ABOUT).write_text("{")
        elif damage == "weights":
            (source / WEIGHTS).write_bytes(b"1234")
        else:
            about |= {"version": 99} if damage == "version" else {}
            about.pop("checks" if damage == "keys" else "text")
            (source / ABOUT).write_text(json.dumps(about))
        with pytest.raises(RouterError, match=r"tpot.*train-router"):
            Router.load(folder, "tpot", ElasticModel.from_pretrained(folder))

    def test_a_missing_one_is_an_error(self, folder):
        with pytest.raises(RouterError, match=r"no router for ttft. Train one"):
            Router.load(folder, "ttft", ElasticModel.from_pretrained(folder))


class TestFromStoredPairs:
    """As a pack brings them: nothing is measured."""

    def stored(self, folder, sensitivity, count: int = 120, **changes) -> SyntheticMeter:
        model, meter = ElasticModel.from_pretrained(folder), SyntheticMeter(sensitivity)
        pairs = Pairs.beside(folder, {"fingerprint": model.fingerprint(), "text": "a text", "tokens": 14, **changes})
        for seed in range(count):
            subnet = tiny.random_subnet(model.search_space, seed)
            pairs.add(subnet, meter(subnet))
        return meter

    def test_it_beats_the_greedy_choice_where_sensitivities_mislead(self, folder, sensitivity, table):
        meter = self.stored(folder, sensitivity, 200)
        router = router_from_pairs(ElasticModel.from_pretrained(folder), folder, lowest=0.5)
        assert (router.about.pairs, router.about.text, router.about.tokens) == (200, "a text", 14)
        assert router.about.cross_validated.rank_correlation > 0.8
        gains = []
        for budget in (0.9, 0.8, 0.7, 0.6):
            limit = ceiling(table, budget)
            greedy = StaticRouter.of(sensitivity, table, lowest=0.5)
            gains.append(meter(route_along(greedy, table.search_space, [limit])) - meter(router.choose([limit])))
        assert np.mean(gains) > 0
        assert Router.load(folder, "tpot", ElasticModel.from_pretrained(folder)).about == router.about

    def test_the_file_with_most_pairs_of_these_weights_serves(self, folder, sensitivity):
        self.stored(folder, sensitivity, 100)
        self.stored(folder, sensitivity, 110, text="another")
        self.stored(folder, sensitivity, 130, fingerprint="of other weights")
        assert Pairs.most_of(folder, ElasticModel.from_pretrained(folder).fingerprint()).about["text"] == "another"

    def test_command(self, folder, sensitivity, capsys):
        words = ["train-router", str(folder), "--evaluations", "0"]
        assert cli.main(words) == 2
        assert "no measured pairs of these weights" in capsys.readouterr().err
        self.stored(folder, sensitivity, 60)
        assert cli.main(words) == 2
        assert "there are 60 measured pairs; a router needs at least 96" in capsys.readouterr().err
        self.stored(folder, sensitivity, 150, text="more")
        assert cli.main(words) == 0
        assert "from 150 sub-networks measured on 14 tokens of more" in capsys.readouterr().out


class TestRoute:
    def test_without_a_router_it_is_the_greedy_choice(self, folder, sensitivity, table):
        model = ElasticModel.from_pretrained(folder)
        routed = route(model, "0.6x")
        assert routed.router is None
        assert routed.subnet == route_along(
            StaticRouter.of(sensitivity, table, lowest=max(0.2, 1.05 * table.smallest / table.full)),
            model.search_space,
            [ceiling(table, 0.6)],
        )
        assert "predicted" in routed.costs()[0]

    def test_with_a_router_any_budget_goes_through_it(self, folder, trained):
        model = ElasticModel.from_pretrained(folder)
        for budget in ("0.6x", "5ms", "parameters=0.9x", "0.8x,kv=0.5x"):
            routed = route(model, budget)
            assert routed.router is not None
            assert meets(routed.ceilings, routed.subnet), budget
        assert route(model, "0.6x").subnet == trained.choose(route(model, "0.6x").ceilings)

    def test_choosing_leaves_the_generator_alone(self, folder):
        model = ElasticModel.from_pretrained(folder)
        state = torch.get_rng_state()
        first = route(model, "0.6x").subnet
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        assert route(model, "0.6x").subnet == first

    @pytest.mark.parametrize("routed", [False, True])
    def test_several_limits_in_any_order(self, folder, request, routed):
        if routed:
            request.getfixturevalue("trained")
        model = ElasticModel.from_pretrained(folder)
        one, other = (route(model, budget) for budget in ("0.6x,kv=0.7x", "kv=0.7x,0.6x"))
        assert one.subnet == other.subnet
        assert meets(one.ceilings, one.subnet)
        assert model.share(one.subnet) > 0.3

    def test_sensitivities_of_another_search_space_are_refused(self, folder):
        model = ElasticModel.from_pretrained(folder)
        space = model.search_space
        other = SearchSpace(space.layers, space.neurons[::2], space.kv_groups)
        if other.neurons[-1] != space.neurons[-1]:
            other = replace(other, neurons=(*other.neurons, space.neurons[-1]))
        model = ElasticModel.from_pretrained(folder, search_space=other)
        with pytest.raises(RouterError, match="different search spaces"):
            route(model, "parameters=0.99x")

    def test_use_takes_a_budget(self, folder):
        model = ElasticModel.from_pretrained(folder)
        with model.use(budget="0.6x"):
            assert model.subnet == route(model, "0.6x").subnet
        assert model.subnet == model.search_space.full
        with pytest.raises(ValueError, match="a sub-network or a budget"), model.use():
            pass
        with pytest.raises(ValueError, match="a sub-network or a budget"), model.use(model.subnet, budget="1ms"):
            pass

    def test_notes_of_a_budget_outside_the_range(self, folder, trained):
        del trained
        model = ElasticModel.from_pretrained(folder)
        above = route(model, "1000ms")
        assert above.subnet == model.search_space.full
        assert "full model" in above.notes[0]
        below = route(model, "0.4x")
        assert "below the router's lowest budget (0.45x)" in below.notes[0]
        assert meets(below.ceilings, below.subnet)

    def test_impossible_budgets_and_missing_tables(self, folder, llama):
        model = ElasticModel.from_pretrained(folder)
        with pytest.raises(BudgetError, match="below the smallest"):
            route(model, "0.01ms")
        with pytest.raises(CostError, match=r"no latency table of prefill.*measure-latency"):
            route(model, "ttft=100ms")
        with pytest.raises(BudgetError, match="needs the folder"):
            route(llama, "0.6x")
        with pytest.raises(BudgetError, match="needs the router or the sensitivities"):
            route(llama, "parameters=0.9x")

    def test_contradictory_limits_name_the_impossible_one(self, folder):
        with pytest.raises(BudgetError, match="parameters"):
            route(ElasticModel.from_pretrained(folder), "0.9x,1k")


class TestTogether:
    """Training weights and router in turn, the last stage of the method."""

    @pytest.fixture(scope="class")
    @staticmethod
    def with_router(checkpoint, tmp_path_factory):
        """Folder of a checkpoint with a router."""
        folder = tmp_path_factory.mktemp("together") / "elastic"
        shutil.copytree(checkpoint, folder)
        model = ElasticModel.from_pretrained(folder)
        sensitivity = tiny.in_nats(even_sensitivity(model))
        sensitivity.save(folder)
        space = model.search_space
        table = linear_table(
            space,
            metric="tpot",
            unit="ms",
            fixed=2.0,
            per_neuron=[0.05] * space.layers,
            per_kv_group=[0.4] * space.layers,
            conditions={},
        )
        save_table(folder, table)
        meter = SyntheticMeter(sensitivity)
        blocks = torch.zeros(2, 256, dtype=torch.long)
        meter.blocks = TokenBlocks(blocks, torch.ones_like(blocks), "sample/train")
        pairs = Pairs(folder.parent / "pairs.jsonl", {})
        with pytest.MonkeyPatch.context() as patch:
            any_router_will_do(patch)
            router = train_router(sensitivity, table, meter, pairs, evaluations=training.LEAST_EVALUATIONS)
        router.save(folder, model)
        return folder

    @pytest.fixture
    def ranked(self, with_router, tmp_path):
        return shutil.copytree(with_router, tmp_path / "elastic")

    def test_the_router_is_trained_on_for_the_new_weights(self, ranked, tmp_path, monkeypatch):
        any_router_will_do(monkeypatch)  # losses of a random model hardly depend on its widths
        out = tmp_path / "trained"
        config = TrainConfig(
            str(ranked),
            out,
            text=TextOptions(tokens=512, block_tokens=64),
            visit=VisitOptions(router="tpot", visits=(1, 0, 0, 3), retrain_router=True),
            watch=WatchOptions(evaluate_tokens=0),
        )
        train(config)
        model = ElasticModel.from_pretrained(out)
        assert model.fingerprint() != ElasticModel.from_pretrained(ranked).fingerprint()
        router = Router.load(out, "tpot", model)
        assert router.about.text == "sample/train"
        assert route(model, "0.6x").router is not None
        visits = [
            visit
            for line in (out / "metrics.jsonl").read_text().splitlines()
            for visit in json.loads(line).get("visits", [])
        ]
        assert {visit["kind"] for visit in visits} == {"full", "random"}
        saved = (out / "routers" / "tpot" / WEIGHTS).read_bytes()
        train(config)  # done already
        assert (out / "routers" / "tpot" / WEIGHTS).read_bytes() == saved

    @pytest.mark.parametrize(("spread", "nested"), [(0.0, True), (1.0, False)])
    def test_visits_are_its_answers_or_near_them(self, ranked, tmp_path, spread, nested):
        out = tmp_path / "trained"
        visit = VisitOptions(router="tpot", visits=(0, 0, 0, 1), spread=spread)
        text = TextOptions(tokens=12 * 128, block_tokens=64)
        train(TrainConfig(str(ranked), out, text=text, visit=visit, watch=WatchOptions(evaluate_tokens=0)))
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        found = [visit["neurons"] + visit["kv_groups"] for line in lines for visit in line["visits"]]
        assert len(found) == 24
        in_order = sorted(found, key=sum)  # answers are nested, so each is nowhere narrower than the one before
        is_nested = all(a <= b for low, high in pairwise(in_order) for a, b in zip(low, high, strict=True))
        assert is_nested == nested
        assert len(set(map(tuple, found))) > 3

    def test_it_is_kept_with_losses_of_the_new_weights(self, ranked, tmp_path, capsys):
        out = tmp_path / "trained"
        visit = VisitOptions(router="tpot", visits=(0, 0, 0, 1))
        text = TextOptions(tokens=128, block_tokens=64)
        config = TrainConfig(str(ranked), out, text=text, visit=visit, watch=WatchOptions(evaluate_tokens=0))
        train(config)
        before, after = ElasticModel.from_pretrained(ranked), ElasticModel.from_pretrained(out)
        old, new = Router.load(ranked, "tpot", before), Router.load(out, "tpot", after)
        assert (old.about.kept, new.about.kept) == (False, True)
        for check, was in zip(new.about.checks, old.about.checks, strict=True):
            budget = f"{check.budget}x"
            assert check.subnet == was.subnet == route(after, budget).subnet == route(before, budget).subnet
            assert check.loss != was.loss
        blocks, _ = unused_blocks(after, Sensitivity.load(out), "sample/train", tokens=512)
        meter = LossMeter(after, blocks, arithmetic=faster_dtype("cpu"))
        assert new.about.checks[0].loss == pytest.approx(meter(new.about.checks[0].subnet), abs=1e-4)
        explained = explain(after, route(after, "0.6x"), out, measure=False)
        assert explained["predicted_nats_per_token"] is None  # the surrogate was fitted to the weights before training
        assert "at whose answers the weights were trained" in as_text(route(after, "0.6x"), explained, out)
        assert "surrogate for the weights before training" in describe_router(new)
        train(config)  # done already

    def test_without_a_router_there_is_none_to_train(self):
        with pytest.raises(ValueError, match="--retrain-router needs the metric of a router"):
            VisitOptions(retrain_router=True)

    def test_a_router_that_is_not_there_is_an_error(self, ranked, tmp_path):
        config = TrainConfig(str(ranked), tmp_path / "trained", visit=VisitOptions(router="ttft"))
        with pytest.raises(RouterError, match="no router for ttft"):
            train(config)
        assert not (tmp_path / "trained").exists()
