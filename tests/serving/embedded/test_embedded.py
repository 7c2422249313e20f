"""The embedded engine: a mixed batch gives each request the text that it gets alone, whatever happens around it."""

import copy

import pytest
import torch

import tiny
from engines import GREEDY, Answers, alone, make, nested, request
from flextron.elastic.families import FAMILIES
from flextron.elastic.quantized import quantize
from flextron.inference.per_token import TokenWidths, use_token_widths
from flextron.model import ElasticModel
from flextron.serving.engine import CannotMeetError, Phase, QueueFullError, Sampling, StoppedError

LENGTHS = (5, 17, 3, 9, 40, 12)
LEVELS = (3, 0, 1, 2, 1, 0)


def prompts(count: int = 6, seed: int = 0) -> list[list[int]]:
    return [tiny.token_ids(1, LENGTHS[i % len(LENGTHS)], seed=seed + i)[0].tolist() for i in range(count)]


@pytest.fixture(scope="module")
def llama():
    return ElasticModel(tiny.plain_model("llama"))


@pytest.fixture
def running():
    """Start engines, and stop them after the test."""
    engines = []

    def start(model, **options):
        engine = make(model, **options)
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.stop()
        assert engine._pool.held == 0, "pages leak"


def run(engine, requests) -> Answers:
    answers = Answers()
    for asked in requests:
        engine.submit(asked, answers.handler(asked.id))
    answers.wait(*(asked.id for asked in requests))
    return answers


class TestEveryFamily:
    @pytest.mark.parametrize("model_type", sorted(FAMILIES))
    def test_a_mixed_batch_gives_each_text_of_its_own(self, model_type, running):
        """More requests than rows, prompts read in parts of 8 tokens, levels with skipped sub-layers."""
        plain = tiny.plain_model(model_type)
        model = ElasticModel(copy.deepcopy(plain))
        expected = [
            alone(model, prompt, nested(model)[level], 8) for prompt, level in zip(prompts(), LEVELS, strict=True)
        ]
        engine = running(model, max_step_tokens=8)
        answers = run(engine, [request(str(i), prompt, LEVELS[i]) for i, prompt in enumerate(prompts())])
        assert [answers.ids(str(i)) for i in range(6)] == expected
        assert {token.level for token in answers.tokens["1"]} == {0}
        engine.stop()
        assert torch.equal(tiny.logits_of(model, tiny.token_ids()), tiny.logits_of(plain, tiny.token_ids()))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_few_bits_serve_a_mixed_batch(model_type, bits, running):
    """By kernels (llama) and by torch's products (gpt2, and prompts)."""
    model = ElasticModel(tiny.plain_model(model_type))
    quantize(model, bits)
    expected = [alone(model, prompt, nested(model)[level], 8) for prompt, level in zip(prompts(), LEVELS, strict=True)]
    answers = run(running(model), [request(str(i), prompt, LEVELS[i]) for i, prompt in enumerate(prompts())])
    assert [answers.ids(str(i)) for i in range(6)] == expected


class TestOneText:
    def test_equal_beginnings_are_shared_within_a_level_only(self, llama, running):
        prompt = tiny.token_ids(1, 40, seed=3)[0].tolist()
        expected = {level: alone(llama, prompt, nested(llama)[level], 6) for level in (0, 3)}
        assert expected[0] != expected[3]
        engine = running(llama)
        for name, level, cached in (("a", 3, 0), ("b", 0, 0), ("c", 3, 32), ("d", 0, 32)):
            answers = run(engine, [request(name, prompt, level, new=6)])
            assert answers.ids(name) == expected[level]
            assert answers.ends[name].cached_tokens == cached

    def test_texts_give_way_and_come_back_where_the_cache_is_full(self, llama, running):
        """Three pages for three texts of up to 52 tokens."""
        wishes = [(tiny.token_ids(1, 30, seed=i)[0].tolist(), level) for i, level in enumerate((3, 0, 2))]
        expected = [alone(llama, prompt, nested(llama)[level], 22) for prompt, level in wishes]
        engine = running(llama, cache_tokens=96)
        requests = [request(str(i), prompt, level, new=22) for i, (prompt, level) in enumerate(wishes)]
        answers = run(engine, requests)
        assert engine.stats().preempted > 0
        assert [answers.ids(str(i)) for i in range(3)] == expected

    def test_a_cancelled_text_ends_and_leaves_others_alone(self, llama, running):
        prompt = prompts()[0]
        expected = alone(llama, prompt, nested(llama)[1], 30)
        engine, answers = running(llama), Answers()
        for name in ("stays", "goes"):
            engine.submit(request(name, prompt, 1, new=30), answers.handler(name))
        answers.wait_for_tokens("goes", 2)
        engine.cancel("goes")
        answers.wait("stays", "goes")
        assert answers.ends["goes"].reason == "cancelled"
        assert answers.ids("stays") == expected
        assert answers.ids("goes") == expected[: len(answers.ids("goes"))]

    def test_a_text_that_changes_its_level_is_what_masks_say(self, llama, running):
        """Levels go down with a cap and up again with a phase; each token is what its own level's masks give."""
        prompt = prompts()[1]
        first = alone(llama, prompt, nested(llama)[0], 12)
        engine = running(llama)
        switch = Phase(after=tuple(first[2:4]), level=3, floor=3)
        answers = run(engine, [request("x", prompt, 0, new=12, then=switch)])
        levels = [token.level for token in answers.tokens["x"]]
        assert levels[:4] == [0, 0, 0, 0]
        assert set(levels[4:]) == {3}
        engine.stop()
        assert_masks_agree(llama, prompt, answers.tokens["x"])

    def test_a_cap_narrows_what_may_be_narrowed_and_nothing_else(self, llama, running):
        prompt = prompts()[0]
        engine = running(llama)
        engine.set_cap(1)
        answers = run(engine, [request("may", prompt, 3, floor=0), request("fixed", prompt, 3)])
        assert {token.level for token in answers.tokens["may"]} == {1}
        assert {token.level for token in answers.tokens["fixed"]} == {3}
        assert engine.stats().cap == 1
        with pytest.raises(ValueError, match="no level 4; they are 0 to 3"):
            engine.set_cap(4)
        engine.stop()
        assert answers.ids("fixed") == alone(llama, prompt, nested(llama)[3], 8)


def assert_masks_agree(model, prompt, tokens) -> None:
    """Each token is the likeliest one where all before it run at the levels that they ran at."""
    text = [*prompt, *(token.id for token in tokens)]
    levels = [tokens[0].level] * len(prompt) + [token.level for token in tokens[1:]]
    subnets = [nested(model)[level] for level in levels]
    neurons, groups = (
        torch.tensor([subnet[axis] for subnet in subnets]).T[:, None] for axis in ("neurons", "kv_groups")
    )
    heads = torch.full_like(groups, model.layers[0].attention.heads_per_unit)
    with use_token_widths(model, TokenWidths(neurons, groups, heads), masked=True), torch.no_grad():
        logits = model(torch.tensor([text[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == [token.id for token in tokens]


class TestSampling:
    def test_a_seed_gives_one_text_in_any_company(self, llama, running):
        engine, prompt = running(llama), prompts()[0]
        drawn = Sampling(temperature=1.0, seed=5)
        answers = run(engine, [request("a", prompt, 2, sampling=drawn)])
        crowd = [request(f"x{i}", other, i % 4) for i, other in enumerate(prompts(seed=50))]
        again = run(engine, [*crowd, request("b", prompt, 2, sampling=drawn), request("c", prompt, 2)])
        assert answers.ids("a") == again.ids("b") != again.ids("c")

    def test_logprobs_are_the_models_own(self, llama, running):
        prompt = prompts()[0]
        wished = Sampling(temperature=0, top_logprobs=3, logit_bias={7: 100.0})
        engine = running(llama)
        answers = run(engine, [request("a", prompt, 1, new=1, sampling=wished)])
        engine.stop()
        with llama.use(nested(llama)[1]), torch.no_grad():
            expected = llama(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)
        (token,) = answers.tokens["a"]
        assert token.id == 7
        assert token.logprob == pytest.approx(expected[7].item(), abs=1e-4)
        assert [i for i, _ in token.top] == expected.topk(3).indices.tolist()

    def test_penalties_and_narrow_draws(self, llama, running):
        prompt = prompts()[2]
        wishes = {
            "greedy": GREEDY,
            "one": Sampling(temperature=5.0, top_k=1, seed=1),
            "nucleus": Sampling(temperature=5.0, top_p=1e-6, seed=1),
            "never twice": Sampling(temperature=0, frequency_penalty=2.0, presence_penalty=1000.0),
        }
        answers = run(running(llama), [request(name, prompt, 3, new=20, sampling=s) for name, s in wishes.items()])
        assert answers.ids("one") == answers.ids("nucleus") == answers.ids("greedy")
        assert len(set(answers.ids("never twice"))) == 20

    def test_a_constraint_that_fails_ends_its_own_text_only(self, llama, running):
        class Even:
            seen = 0

            def allowed(self):
                if self.seen == 3:
                    raise RuntimeError("the grammar is broken")
                return torch.arange(tiny.VOCAB) % 2 == 0

            def accept(self, token):
                self.seen += 1

        prompt = prompts()[0]
        engine = running(llama)
        answers = run(engine, [request("bad", prompt, 3, constraint=Even()), request("good", prompt, 3)])
        engine.stop()
        assert answers.ends["bad"].reason == "error"
        assert "the grammar is broken" in answers.ends["bad"].error
        assert len(answers.ids("bad")) == 3
        assert all(token % 2 == 0 for token in answers.ids("bad"))
        assert answers.ids("good") == alone(llama, prompt, nested(llama)[3], 8)


class TestEnds:
    def test_stop_tokens_end_a_text_and_are_not_part_of_it(self, llama, running):
        prompt = prompts()[0]
        expected = alone(llama, prompt, nested(llama)[3], 8)
        last = next(i for i, token in enumerate(expected) if token not in expected[:i] and i > 1)
        stop = frozenset({expected[last]})
        answers = run(running(llama), [request("a", prompt, 3, stop_tokens=stop), request("b", prompt, 3)])
        assert answers.ids("a") == expected[:last]
        assert [answers.ends[name].reason for name in "ab"] == ["stop", "length"]

    def test_a_failed_step_ends_its_texts_and_the_engine_goes_on(self, llama, running):
        engine, answers, prompt = running(llama), Answers(), prompts()[0]
        broken = llama.lm.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        engine.submit(request("a", prompt, 3), answers.handler("a"))
        answers.wait("a")
        broken.remove()
        assert answers.ends["a"].reason == "error"
        assert "division by zero" in answers.ends["a"].error
        after = run(engine, [request("b", prompt, 3)])
        assert engine.stats().failed_steps == 1
        assert engine.stats().healthy
        engine.stop()
        assert after.ids("b") == alone(llama, prompt, nested(llama)[3], 8)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_an_engine_whose_every_step_fails_dies_and_says_so(self, llama, running):
        engine, answers, prompt = running(llama), Answers(), prompts()[0]
        broken = llama.lm.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        for name in "abcd":
            try:
                engine.submit(request(name, prompt, 3), answers.handler(name))
            except StoppedError:
                break
            answers.wait(name)
        broken.remove()
        engine._thread.join(10)
        assert not engine.stats().healthy
        with pytest.raises(StoppedError, match="has stopped"):
            engine.submit(request("e", prompt, 3), answers.handler("e"))

    def test_a_handler_that_fails_harms_nobody(self, llama, running, capsys):
        engine, answers = running(llama), Answers()

        def broken(event):
            raise ValueError("no")

        engine.submit(request("a", prompts()[0], 3), broken)
        engine.submit(request("b", prompts()[1], 3), answers.handler("b"))
        answers.wait("b")
        assert len(answers.ids("b")) == 8
        assert "a handler of request a failed" in capsys.readouterr().out

    def test_stopping_drains_then_cancels(self, llama, running):
        engine, answers = running(llama), Answers()
        engine.submit(request("short", prompts()[0], 3, new=4), answers.handler("short"))
        engine.stop(drain_seconds=30)
        assert answers.ends["short"].reason == "length"
        with pytest.raises(StoppedError):
            engine.submit(request("late", prompts()[0], 3), answers.handler("late"))
        other = running(llama)
        other.submit(request("long", prompts()[0], 3, new=50), answers.handler("long"))
        other.stop()
        assert answers.ends["long"].reason == "cancelled"


class TestRefusals:
    def test_what_can_never_be_taken(self, llama, running):
        engine, handler = running(llama, cache_tokens=64), Answers().handler("a")
        for wrong, message in (
            (request("a", [], 3), "the prompt is empty"),
            (request("a", [1], 3, new=0), "max_new_tokens is 0"),
            (request("a", [1] * 60, 3), "60 tokens and 8 more are asked for; this server takes 64 together"),
            (request("a", [tiny.VOCAB], 3), "outside the vocabulary of 101"),
            (request("a", [1], 4), "level is 4; levels are 0 to 3"),
            (request("a", [1], 1, floor=2), "the floor, level 2, is above the level 1"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.submit(wrong, handler)

    def test_a_full_queue_and_objectives_that_cannot_be_met(self, llama, running):
        engine, answers = running(llama, max_waiting=1, max_rows=1), Answers()
        engine.submit(request("a", prompts()[0], 3, new=50), answers.handler("a"))
        answers.wait_for_tokens("a", 1)
        engine.submit(request("b", prompts()[0], 3), answers.handler("b"))
        with pytest.raises(QueueFullError, match="1 requests are waiting") as refused:
            engine.submit(request("c", prompts()[0], 3), answers.handler("c"))
        assert refused.value.retry_after
        answers.wait("a", "b")
        strict = request("d", prompts()[0], 3, floor=0, ttft_ms=1e-6, strict=True)
        with pytest.raises(CannotMeetError, match="over the objective of 1e-06 ms"):
            engine.submit(strict, answers.handler("d"))
        run(engine, [request("e", prompts()[0], 3, floor=0, ttft_ms=1e9, tpot_ms=1e9, strict=True)])
