"""The token router on tiny models: it starts as the static router, learns from slopes, and keeps budgets on average."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from flextron import cli, config, generate
from flextron.choosing import routing
from flextron.config import (
    EvaluateConfig,
    GenerateConfig,
    TextOptions,
    TrainConfig,
    TrainRouterConfig,
    VisitOptions,
    WatchOptions,
)
from flextron.costs.saved import save_table
from flextron.costs.table import linear_table
from flextron.errors import BudgetError, RouterError
from flextron.evaluation import evaluate
from flextron.model import ElasticModel
from flextron.routers.static import learning as training
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.router import Router, RouterAbout
from flextron.routers.static.surrogate import Surrogate, SurrogateError
from flextron.routers.token import learning as token_training
from flextron.routers.token import making as token_making
from flextron.routers.token import net as token
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.learning import TokenRouterAbout, fit, static_answers, train_token_router
from flextron.routers.token.making import ABOUT, WEIGHTS, load_token_router, save_token_router
from flextron.routers.token.net import TokenRouter
from flextron.routers.token.slopes import Slopes
from flextron.training.run import train
from flextron.training.sampling import TokenRouterInUse, make_sampler
from tiny import assert_same_function, differs, logits_of

BUDGETS = (0.5, 0.6, 0.75, 0.9)
ABOUT_IT = TokenRouterAbout(metric="tpot", conditions={}, text="random", tokens=96, explained=0.5)


@pytest.fixture
def table(llama):
    space = llama.search_space
    return linear_table(
        space,
        metric="tpot",
        unit="ms",
        fixed=1.0,
        per_neuron=[0.05] * space.layers,
        per_kv_group=[0.8] * space.layers,
        conditions={},
    )


@pytest.fixture
def static(sensitivity, table):
    net = StaticRouter.of(sensitivity, table, lowest=0.45)
    error = SurrogateError(0.0, 1.0, 1)
    about = RouterAbout(table.metric, {}, "random", 96, 1, error, error, ())
    return Router(table.search_space, net, Surrogate.of(sensitivity), about)


@pytest.fixture
def trained(llama, static, table):
    """A calibrated router whose worths differ."""
    router = TokenRouter(static.net, tiny.HIDDEN)
    with torch.no_grad():
        router.reads_LRD *= 2
        router.out_LR.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.5)
    token_training.calibrate(llama, router, table, static, tiny.blocks(32), np.linspace(0.45, 0.97, 8).tolist())
    return router


def routing_of(model, router, static, table, budgets, **options):
    return TokenRouting(model, router, budgets, static_answers(static, table, budgets), **options)


def run(model, routing, tokens):
    with routing.use():
        return logits_of(model, tokens)


@pytest.mark.parametrize("hard", [False, True])
def test_evaluated_layer_by_layer_it_chooses_as_in_a_whole_pass(llama, trained, static, table, hard):
    blocks = tiny.blocks(4)
    routings = [routing_of(llama, trained, static, table, (0.7,), hard=hard) for _ in range(2)]
    _, found = evaluate(llama, [llama.search_space.full, routings[0]], blocks)
    logits = run(llama, routings[1], blocks.tokens)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks.tokens[:, 1:].flatten())
    assert found.nats_per_token == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(routings[0].used_LK, routings[1].used_LK)
    assert found.share == routings[1].share


class TestRouter:
    def test_untrained_it_answers_as_the_static_one(self, llama, static, monkeypatch):
        monkeypatch.setattr(token, "WIDTHS", len(llama.search_space.neurons))
        router = TokenRouter(static.net, tiny.HIDDEN)
        budgets = torch.linspace(0.45, 1, 40)
        hidden = torch.randn(len(budgets), 5, tiny.HIDDEN)
        logits = static.net(budgets)
        for layer in range(tiny.LAYERS):
            prices = router.log_prices(budgets)[:, layer, None] - router.log_worths(
                layer, hidden, router.shifts(budgets)[layer]
            )
            chosen = router.choose(layer, prices)
            assert (chosen == logits[:, layer].argmax(-1)[:, None]).all()

    def test_its_choice_is_the_best_at_any_price(self, trained, llama, monkeypatch):
        monkeypatch.setattr(token, "WIDTHS", len(llama.search_space.neurons))
        trained = token_making._of_state(trained.state_dict(), llama)
        for layer in range(tiny.LAYERS):
            prices = torch.linspace(-6, 12, 500)
            net = trained.static
            logits = net.utilities_SK[layer] - prices.exp()[:, None] * net.costs_SK[layer]
            logits = logits.masked_fill(~net.allowed_SK[layer], -torch.inf)
            chosen = trained.choose(layer, prices[None])[0]
            torch.testing.assert_close(logits.gather(1, chosen[:, None])[:, 0], logits.max(-1).values)
            assert (chosen.diff() <= 0).all()

    def test_worths_are_of_each_token_alone(self, trained):
        hidden, budgets = torch.randn(3, 7, tiny.HIDDEN), torch.tensor([0.5, 0.7, 0.9])
        together = trained.log_worths(1, hidden, trained.shifts(budgets)[1])
        alone = trained.log_worths(1, hidden[1:2, 3:4], trained.shifts(budgets[1:2])[1])
        torch.testing.assert_close(together[1:2, 3:4], alone)


class TestFit:
    ROWS, TIME = 64, 16

    def slopes(self, *, signal: float) -> Slopes:
        """Slopes that depend on one direction of the hidden states, with as much noise as signal."""
        draw = np.random.default_rng(0)
        tokens = self.ROWS * self.TIME
        hidden = torch.tensor(draw.standard_normal((tiny.LAYERS, tokens, tiny.HIDDEN)), dtype=torch.float32)
        expected = (signal * hidden[..., 0]).exp()
        slopes = (
            expected
            / expected.mean(1, keepdim=True)
            * torch.tensor(draw.exponential(size=expected.shape), dtype=torch.float32)
        )
        self.direction = hidden[..., 0]
        return Slopes(hidden.bfloat16(), slopes, torch.zeros(tiny.LAYERS, tokens), torch.full((tokens,), 0.7))

    def worths(self, router, slopes):
        shifts = router.shifts(slopes.budgets_N)
        return torch.stack(
            [
                router.log_worths(layer, x[:, None].float(), shifts[layer])[:, 0]
                for layer, x in enumerate(slopes.hidden_LND)
            ]
        )

    def test_it_finds_what_slopes_depend_on(self, static):
        router, slopes = TokenRouter(static.net, tiny.HIDDEN), self.slopes(signal=0.8)
        assert fit(router, [slopes], rows=self.TIME) > 0.05
        worths = self.worths(router, slopes).detach()
        for layer in range(tiny.LAYERS):
            assert np.corrcoef(worths[layer], self.direction[layer])[0, 1] > 0.7
        assert worths.mean(1).abs().max() < 0.05

    def test_of_noise_it_learns_next_to_nothing(self, static):
        router, slopes = TokenRouter(static.net, tiny.HIDDEN), self.slopes(signal=0.0)
        assert fit(router, [slopes], rows=self.TIME) < 0.01
        assert self.worths(router, slopes).std() < 0.2

    def test_slopes_at_known_worths_move_them(self, static):
        """If tokens already have the right worths, slopes are equal and training keeps the worths."""
        router, first = TokenRouter(static.net, tiny.HIDDEN), self.slopes(signal=0.8)
        fit(router, [first], rows=self.TIME)
        before = self.worths(router, first).detach()
        even = first._replace(slopes_LN=torch.ones_like(first.slopes_LN), log_worths_LN=before)
        fit(router, [even], rows=self.TIME)
        assert (self.worths(router, first) - before).abs().mean() < 0.1


class TestTraining:
    def test_the_whole_of_it(self, llama, static, table):
        before = copy.deepcopy(llama.lm.state_dict())
        router, about = train_token_router(llama, static, table, tiny.blocks(48), tiny.blocks(32, seed=1))
        assert about.tokens == 48 * tiny.TIME
        assert all(torch.equal(tensor, before[name]) for name, tensor in llama.lm.state_dict().items())
        assert all(parameter.requires_grad for parameter in llama.lm.parameters())
        for budget in BUDGETS:
            routing = routing_of(llama, router, static, table, [budget])
            run(llama, routing, tiny.blocks(32, seed=1).tokens)
            assert routing.average_cost == pytest.approx(budget, rel=0.03)

    def test_too_little_text(self, llama, static, table):
        with pytest.raises(RouterError, match=r"6 blocks of text are too few for 3 rounds"):
            train_token_router(llama, static, table, tiny.blocks(6), tiny.blocks(4))

    def test_unequal_steps_of_the_search_space(self):
        """Slopes are per neuron even if blocks of neurons differ in size."""
        sizes = torch.tensor([1, 2, 3])
        mask = torch.tensor([[[1.0, 1.0, 0.0]]])
        assert token_training._of_neurons(mask, sizes).tolist() == [[[1, 1, 1, 0, 0, 0]]]
        assert token_training._of_neurons(mask, sizes[:1].expand(3)).tolist() == mask.tolist()


class TestRouting:
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_the_average_is_kept(self, llama, trained, static, table, budget):
        routing = routing_of(llama, trained, static, table, [budget])
        run(llama, routing, tiny.blocks(32).tokens)
        assert routing.average_cost == pytest.approx(budget, rel=0.02)
        assert routing.used_LK.sum(1).tolist() == [32 * tiny.TIME] * tiny.LAYERS
        assert (routing.used_LK > 0).sum(1).max() > 2  # tokens differ

    def test_blocks_equal_masks(self, llama, trained, static, table):
        tokens = tiny.token_ids(3)
        results = [
            run(llama, routing_of(llama, trained, static, table, [0.6], masked=masked), tokens)
            for masked in (False, True)
        ]
        assert_same_function(*results)

    def test_requests_with_different_budgets_share_a_batch(self, llama, trained, static, table):
        tokens = tiny.token_ids(4)
        mixed = run(llama, routing_of(llama, trained, static, table, [1.0, 0.5, 0.9, 0.6]), tokens)
        for row, budget in enumerate([1.0, 0.5, 0.9, 0.6]):
            alone = run(llama, routing_of(llama, trained, static, table, [budget]), tokens[row : row + 1])
            assert_same_function(mixed[row : row + 1], alone)

    def test_the_whole_budget_is_the_full_model(self, llama, trained, static, table):
        tokens = tiny.token_ids(2)
        assert torch.equal(
            run(llama, routing_of(llama, trained, static, table, [1.0]), tokens), logits_of(llama, tokens)
        )

    @pytest.mark.parametrize("seed", range(4))
    def test_the_hard_mode_never_exceeds_a_budget(self, llama, trained, static, table, seed):
        for budget in (0.47, *BUDGETS):
            for rows, time in ((1, 1), (1, 16), (4, 9)):
                routing = routing_of(llama, trained, static, table, [budget], hard=True)
                run(llama, routing, tiny.token_ids(rows, time, seed=seed))
                assert routing.average_cost <= budget * (1 + 1e-5)

    def test_shuffled_it_costs_the_same_and_computes_something_else(self, llama, trained, static, table):
        tokens = tiny.token_ids(8)
        plain = routing_of(llama, trained, static, table, [0.6])
        shuffled = routing_of(llama, trained, static, table, [0.6], shuffled=True)
        assert differs(run(llama, plain, tokens), run(llama, shuffled, tokens))
        assert torch.equal(plain.used_LK[0], shuffled.used_LK[0])  # deeper layers see other hidden states

    @pytest.mark.parametrize("hard", [False, True])
    def test_padding_on_the_left_gets_nothing_and_changes_nothing(self, llama, trained, static, table, hard):
        tokens = tiny.token_ids(2, 8)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
        mask = (torch.arange(11) >= 3).long().expand(2, -1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        alone, beside = (routing_of(llama, trained, static, table, [0.6], hard=hard) for _ in range(2))
        expected = run(llama, alone, tokens)
        with beside.use(), torch.no_grad():
            found = llama(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
        assert_same_function(found, expected)
        assert torch.equal(alone.used_LK, beside.used_LK)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_generated_text_is_that_of_whole_passes(self, llama, trained, static, table, rows):
        tokens = tiny.token_ids(rows, 6)
        routing = routing_of(llama, trained, static, table, [0.6])
        with routing.use(), torch.no_grad():
            found = llama.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
            for _ in range(8):
                tokens = torch.cat([tokens, llama(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, tokens)

    def test_beams_share_their_request_s_budget(self, llama, trained, static, table):
        tokens = tiny.token_ids(2, 6)
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        routing = routing_of(llama, trained, static, table, [0.5, 0.9])
        assert routing.subnets[0].kv_groups != routing.subnets[1].kv_groups
        with routing.use(), torch.no_grad():
            found = llama.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        for row, budget in enumerate([0.5, 0.9]):
            alone = tokens[row : row + 1]
            with routing_of(llama, trained, static, table, [budget]).use(), torch.no_grad():
                expected = llama.generate(alone, attention_mask=torch.ones_like(alone), **options)
            assert torch.equal(found[row], expected[0])

    def test_an_empty_batch(self, llama, trained, static, table):
        for rows, time in ((0, 4), (2, 0)):
            with pytest.raises(ValueError, match=rf"the batch is empty: {rows} rows of {time} tokens"):
                run(llama, routing_of(llama, trained, static, table, [0.6]), tiny.token_ids(rows, time))

    def test_another_number_of_rows_than_budgets(self, llama, trained, static, table):
        routing = routing_of(llama, trained, static, table, [0.6, 0.7])
        with pytest.raises(ValueError, match="2 budgets for a batch of 3 rows"):
            run(llama, routing, tiny.token_ids(3))

    def test_all_is_as_before_after_the_block(self, llama, trained, static, table):
        tokens = tiny.token_ids(2)
        before = logits_of(llama, tokens)
        run(llama, routing_of(llama, trained, static, table, [0.5]), tokens)
        assert torch.equal(logits_of(llama, tokens), before)


@pytest.fixture
def folder(tmp_path, llama, sensitivity, table, static, trained):
    """An elastic checkpoint with a table that names no device, a static router and a token router."""
    folder = tmp_path / "elastic"
    llama.save_pretrained(folder)
    sensitivity.save(folder)
    save_table(folder, table)
    static.save(folder, llama)
    save_token_router(folder, trained, ABOUT_IT, llama)
    return folder


class TestFolder:
    def test_saved_and_loaded_it_routes_the_same(self, folder, trained, static, table):
        model = ElasticModel.from_pretrained(folder)
        again, about = load_token_router(folder, "tpot", model)
        assert about == ABOUT_IT
        tokens = tiny.token_ids(3)
        results = [run(model, routing_of(model, router, static, table, [0.62]), tokens) for router in (trained, again)]
        assert torch.equal(*results)

    def test_that_of_another_checkpoint_is_refused(self, folder):
        other = ElasticModel.from_pretrained(folder)
        with torch.no_grad():
            other.layers[0].mlp.closes.weight.neg_()
        with pytest.raises(RouterError, match=r"trained for another checkpoint.*--per-token"):
            load_token_router(folder, "tpot", other)

    @pytest.mark.parametrize(
        ("name", "change", "problem"),
        [
            ("out_LR", lambda tensor: tensor * float("nan"), "out_LR has numbers that are not finite"),
            ("reads_LRD", lambda tensor: tensor[..., 1:], "reads_LRD is torch.float32 of"),
            ("bias_LR", lambda tensor: tensor.double(), "bias_LR is torch.float64 of"),
            ("budgets_C", lambda tensor: tensor.flip(0), "calibrated budgets do not ascend"),
            ("static.costs_SK", lambda tensor: -tensor, "costs or its lowest budget"),
        ],
    )
    def test_weights_that_are_none(self, folder, name, change, problem):
        file = folder / "routers" / "tpot-per-token" / WEIGHTS
        weights = load_file(file)
        save_file({**weights, name: change(weights[name]).contiguous()}, file)
        with pytest.raises(RouterError, match=rf"cannot read the token router in .*{problem}.*train-router"):
            load_token_router(folder, "tpot", ElasticModel.from_pretrained(folder))

    @pytest.mark.parametrize("damage", ["about", "weights", "version", "keys"])
    def test_a_damaged_one_is_an_error(self, folder, damage):
        source = folder / "routers" / "tpot-per-token"
        about = json.loads((source / ABOUT).read_text())
        if damage == "about":
            (source / ABOUT).write_text("{")
        elif damage == "weights":
            (source / WEIGHTS).write_bytes(b"1234")
        else:
            about |= {"version": 99} if damage == "version" else {}
            about.pop("explained" if damage == "keys" else "text")
            (source / ABOUT).write_text(json.dumps(about))
        with pytest.raises(RouterError, match=r"tpot-per-token.*train-router"):
            load_token_router(folder, "tpot", ElasticModel.from_pretrained(folder))

    def test_a_missing_one_is_an_error(self, folder):
        model = ElasticModel.from_pretrained(folder)
        with pytest.raises(RouterError, match=r"no token router for ttft.*--phase prefill --per-token"):
            load_token_router(folder, "ttft", model)
        with pytest.raises(RouterError, match=r"for ttft or tpot, not parameters"):
            routing.route_tokens(model, "parameters=0.6x")

    def test_too_little_text_and_too_few_tokens(self, folder, tmp_path):
        model = ElasticModel.from_pretrained(folder)
        assert token_training.ROUNDS * token_making.TOKENS_PER_ROUND == config.train_router.LEAST_TOKENS
        with pytest.raises(ValueError, match=r"tokens is 100; a token router needs at least 6144"):
            token_making.make_token_router(model, folder, tokens=100)

    def test_interrupted_it_goes_on_from_the_rounds_that_were_measured(self, folder, monkeypatch):
        model = ElasticModel.from_pretrained(folder)
        blocks, other = tiny.blocks(48), tiny.blocks(16, seed=1)
        monkeypatch.setattr(token_making, "unused_blocks", lambda *_, **__: (blocks, 0))
        monkeypatch.setattr(token_making, "sensitivity_blocks", lambda *_, **__: other)
        monkeypatch.setattr(token_making, "TOKENS_PER_ROUND", 96)
        make = partial(
            token_making.make_token_router, model, folder, tokens=blocks.tokens.numel(), calibrated=[0.5, 0.9]
        )
        expected, _ = make()
        measure, measured = token_training._measure, []

        def measure_two(*arguments):
            if len(measured) == 2:
                raise KeyboardInterrupt
            measured.append(measure(*arguments))
            return measured[-1]

        monkeypatch.setattr(token_training, "_measure", measure_two)
        with pytest.raises(KeyboardInterrupt):
            make()
        assert len(list(folder.glob("routers/slopes-*/round-*"))) == 2
        measured.clear()
        router, _ = make()
        assert len(measured) == 1
        assert not list(folder.glob("routers/slopes-*"))
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(router.state_dict()[name], tensor)

    def test_weights_and_token_router_are_trained_in_turn(
        self, checkpoint, sensitivity, table, static, trained, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(training, "LARGEST_ERROR", 10)  # a random model's loss hardly depends on its widths
        monkeypatch.setattr(training, "_orders", lambda _: True)
        monkeypatch.setattr(token_making, "TOKENS_PER_ROUND", 96)
        monkeypatch.setattr(token_training, "HELD_OUT", 1 / 2)
        folder, out = tmp_path / "elastic", tmp_path / "trained"
        shutil.copytree(checkpoint, folder)
        model = ElasticModel.from_pretrained(folder)
        sensitivity.save(folder)
        save_table(folder, table)
        about = replace(static.about, text="sample/train", tokens=255, pairs=160)
        replace(static, about=about).save(folder, model)
        save_token_router(folder, trained, replace(ABOUT_IT, text="sample/train", tokens=1536), model)
        visit = VisitOptions(router="tpot", per_token=True, visits=(1, 0, 0, 3))
        options = {"text": TextOptions(tokens=512, block_tokens=64), "watch": WatchOptions(evaluate_tokens=0)}
        train(TrainConfig(str(folder), out, visit=visit, **options))
        router, about = load_token_router(out, "tpot", ElasticModel.from_pretrained(out))
        assert about.tokens == 1536
        assert differs(router.out_LR, trained.out_LR)

    def test_visits_of_training_are_routed_token_by_token(self, llama, static, table, trained):
        options = VisitOptions(router="tpot", per_token=True, visits=(0, 0, 0, 1))
        tokens = TokenRouterInUse(trained, table, ABOUT_IT)
        sampler = make_sampler(llama, options, None, router=static, tokens=tokens, seed=0)
        widths = []
        for visit in (sampler.next() for _ in range(4)):
            visit.routing.seen = lambda _, widths_BT: widths.append(widths_BT.unique().numel())
            with visit.use(llama), torch.no_grad():
                llama(tiny.token_ids(4))
            assert abs(visit.routing.average_cost - table.price(visit.subnet) / table.full) < 0.1
        assert max(widths) > 1


class TestRouteTokens:
    def test_budgets_in_any_form(self, folder, table):
        model = ElasticModel.from_pretrained(folder)
        tokens = tiny.token_ids(2)
        for budget in ("0.6x", "tpot=0.6x", f"{0.6 * table.full}ms"):
            with model.use(budget=budget, per_token=True):
                logits = logits_of(model, tokens)
            with routing.route_tokens(model, "0.6x").use():
                assert_same_function(logits, logits_of(model, tokens))
        with model.use(budget=["0.6x", "0.9x"], per_token=True):
            assert_same_function(logits_of(model, tokens)[:1], logits[:1])

    def test_more_than_the_full_model_is_the_full_model(self, folder):
        model = ElasticModel.from_pretrained(folder)
        tokens = tiny.token_ids(2)
        with model.use(budget="1000ms", per_token=True):
            inside = logits_of(model, tokens)
        assert torch.equal(inside, logits_of(model, tokens))

    def test_impossible_budgets(self, folder):
        model = ElasticModel.from_pretrained(folder)
        with pytest.raises(BudgetError, match=r"0\.30x of the full model, below the token router's lowest"):
            routing.route_tokens(model, "0.3x")
        with pytest.raises(BudgetError, match=r"has 2 limits; tokens are routed within one"):
            routing.route_tokens(model, "0.6x,80M")
        with pytest.raises(ValueError, match="needs a budget"):
            routing.route_tokens(model, [])

    def test_a_budget_for_each_row_needs_per_token(self, folder):
        model = ElasticModel.from_pretrained(folder)
        with pytest.raises(ValueError, match="needs per_token=True"), model.use(budget=["0.6x", "0.9x"]):
            pass
        with pytest.raises(ValueError, match="either a sub-network or a budget"), model.use(per_token=True):
            pass


class TestCommands:
    def test_text_and_picture(self, checkpoint, sensitivity, table, static, trained, tmp_path, capsys):
        folder, model = tmp_path / "elastic", ElasticModel.from_pretrained(checkpoint)
        shutil.copytree(checkpoint, folder)
        sensitivity.save(folder)
        save_table(folder, table)
        static.save(folder, model)
        save_token_router(folder, trained, ABOUT_IT, model)
        page, words = tmp_path / "tokens.html", ["generate", str(folder), "The quick brown fox"]
        options = ["--budget", "0.6x", "--per-token", "--max-new-tokens", "4"]
        assert cli.main([*words, *options, "--hard", "--picture", str(page)]) == 0
        said = capsys.readouterr()
        assert "tokens cost 0." in said.err
        assert "wrote" in said.err
        assert page.read_text().startswith("<!DOCTYPE html>")
        with routing.route_tokens(model, "0.6x", folder).use():
            prompt = model.tokenizer("The quick brown fox", return_tensors="pt").input_ids
            expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        routed = routing.route_tokens(model, "0.6x", folder)
        written = generate(model, "The quick brown fox", routing=routed, max_new_tokens=4)
        assert written == model.tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
        with pytest.raises(ValueError, match="only one of them"):
            generate(model, "The quick", routing=routed, budget="0.6x")

    def test_options_that_do_not_go_together(self):
        with pytest.raises(ValueError, match="--per-token needs a budget"):
            EvaluateConfig("model", per_token=True)
        with pytest.raises(ValueError, match="--per-token needs a budget"):
            GenerateConfig("model", "prompt", per_token=True)
        with pytest.raises(ValueError, match="--hard needs --per-token"):
            GenerateConfig("model", "prompt", budget="0.6x", hard=True)
        with pytest.raises(ValueError, match=r"--picture a\.png needs --per-token"):
            GenerateConfig("model", "prompt", budget="0.6x", picture=Path("a.png"))
        with pytest.raises(ValueError, match=r"must end in \.html"):
            EvaluateConfig("model", budget=("0.6x",), per_token=True, picture=Path("a.gif"))
        with pytest.raises(ValueError, match="--token-tokens is 10; it must be at least 6144"):
            TrainRouterConfig("model", token_tokens=10)
