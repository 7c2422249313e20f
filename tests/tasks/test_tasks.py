"""Accuracy on tasks: a hand-written loop over logits agrees; samples, resumption, errors, and the command."""

import json
import math
import statistics
import sys

import datasets
import huggingface_hub
import pytest
import torch
from lm_eval.models.huggingface import HFLM

import tiny
from flextron import cli
from flextron.choosing.routing import route_tokens
from flextron.config import EvaluateConfig
from flextron.costs.saved import save_table
from flextron.costs.table import linear_table
from flextron.errors import FlextronError, SubnetError
from flextron.model import ElasticModel
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.router import Router, RouterAbout
from flextron.routers.static.surrogate import Surrogate, SurrogateError
from flextron.routers.token import learning as token_training
from flextron.routers.token.making import TokenRouterAbout, save_token_router
from flextron.routers.token.net import TokenRouter
from flextron.subnet import Subnet
from flextron.tasks import harness, local
from flextron.tasks.harness import evaluate_tasks, sample
from flextron.tasks.lm import LEAST_SHARED, ElasticLM
from flextron.tasks.names import PAPER
from flextron.tasks.results import HEADLINE, TaskResult, averages, floored

WORDS = tiny.TEXT.lower().replace(".", "").split()


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + place * (seed % 5 + 1)) % len(WORDS)] for place in range(count))


def rows(count: int, make) -> str:
    return "".join(json.dumps({"id": number, **make(number)}) + "\n" for number in range(count))


def question(number: int, options: int = 4) -> dict:
    choices = [words(number + option, 1 + (number + option) % 4) for option in range(options)]
    return {"question": words(number, 3 + number % 3) + "?", "choices": choices, "label": number % options}


def sentence(number: int) -> dict:
    before, after = words(number, 4), words(number + 1, 3) + "."
    return {
        "context_options": [f"{before} {WORDS[0]}", f"{before} {WORDS[1]}"],
        "continuation": after,
        "label": number % 2,
    }


def story(number: int) -> dict:
    endings = [words(number + option, 2 + option) for option in range(4)]
    return {"activity_label": "A fox", "ctx": words(number, 5 + number % 3), "endings": endings, "label": number % 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of every task's schema."""
    folder = tmp_path_factory.mktemp("data")

    def goal(number):
        return {"goal": words(number, 4), "choices": question(number)["choices"][:2], "label": number % 2}

    def subject(number):
        return {**question(number), "subject": ("old_dogs", "new_foxes", "jugs")[number % 3]}

    contents = {
        "arc_easy_test": rows(12, lambda number: question(number, 3 + number % 3)),
        "lambada_openai_test": rows(6, lambda number: {"text": words(number, 9)}),
        "piqa_val": rows(8, goal),
        "winogrande_xl_dev": rows(6, sentence),
        "mmlu_dev": rows(15, lambda number: subject(number + 100)),
        "mmlu_test": rows(9, lambda number: subject(3 * number + number // 3)),
        "hellaswag_val": rows(16, story),
    }
    for name, content in contents.items():
        (folder / f"{name}.jsonl").write_text(content, encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    lm = tiny.plain_model("llama", vocab_size=300, max_position_embeddings=2048)
    return ElasticModel(lm, tiny.tokenizer())


@pytest.fixture
def runs(model) -> dict[str, Subnet]:
    return {"full": model.search_space.full, "narrow": model.search_space.uniform(20, 2)}


def read(data, name):
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf8").splitlines()]


@torch.no_grad()
def log_probability(model, context: str, continuation: str) -> tuple[float, bool]:
    """Plainly: one forward pass over all, and the sum over the tokens that the continuation adds."""
    before = len(model.tokenizer(context).input_ids)
    tokens = torch.tensor(model.tokenizer(context + continuation).input_ids)
    log = model(tokens[None], use_cache=False).logits[0, before - 1 : -1].log_softmax(-1)
    targets = tokens[before:]
    return log[torch.arange(len(targets)), targets].sum().item(), bool((log.argmax(-1) == targets).all())


def by_hand(model, prompts, label) -> tuple[float, float]:
    """1 or 0 for acc and acc_norm: the answers as (context, continuation, text whose characters count)."""
    scores = [log_probability(model, context, continuation)[0] for context, continuation, _ in prompts]
    per_character = [score / len(text) for score, (_, _, text) in zip(scores, prompts, strict=True)]
    return tuple(float(values.index(max(values)) == label) for values in (scores, per_character))


def multiple_choice(template, choices_of):
    return lambda row: [(template(row), f" {choice}", choice) for choice in row[choices_of]]


def mmlu_text(row) -> str:
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question']}{options}\nAnswer:"


class TestAgreesWithAPlainLoop:
    @pytest.mark.parametrize(
        ("task", "file", "prompts"),
        [
            ("arc_easy", "arc_easy_test", multiple_choice(lambda r: f"Question: {r['question']}\nAnswer:", "choices")),
            ("piqa", "piqa_val", multiple_choice(lambda r: f"Question: {r['goal']}\nAnswer:", "choices")),
            (
                "winogrande",
                "winogrande_xl_dev",
                lambda r: [(context, " " + r["continuation"], "1") for context in r["context_options"]],
            ),
        ],
    )
    def test_without_examples(self, model, runs, data, task, file, prompts):
        for result in evaluate_tasks(model, runs, [task], data=data):
            with model.use(runs[result.run]):
                expected = [by_hand(model, prompts(row), row["label"]) for row in read(data, file)]
            assert result.scores["acc"] == tuple(acc for acc, _ in expected)
            if "acc_norm" in result.scores:
                assert result.scores["acc_norm"] == tuple(norm for _, norm in expected)
            assert (result.metric, result.shots, len(result.documents)) == ("acc", 0, len(expected))

    def test_chance_counts_the_choices_of_each_question(self, model, runs, data):
        tasks = ["arc_easy", "piqa", "winogrande", "lambada_openai", "hellaswag", "mmlu"]
        found = {each.task: each.chance for each in evaluate_tasks(model, {"full": runs["full"]}, tasks, data=data)}
        arc_easy = statistics.mean(1 / len(row["choices"]) for row in read(data, "arc_easy_test"))
        expected = {"piqa": 0.5, "winogrande": 0.5, "lambada_openai": 0, "hellaswag": 0.25, "mmlu": 0.25}
        assert found == pytest.approx({"arc_easy": arc_easy, **expected})

    def test_lambada(self, model, runs, data):
        """With words that the model would say, and with others."""
        (first, *_) = evaluate_tasks(model, runs, ["lambada_openai"], data=data)
        texts = [row["text"].rpartition(" ") for row in read(data, "lambada_openai_test")]
        assert first.correct == tuple(float(log_probability(model, before, f" {last}")[1]) for before, _, last in texts)

    def test_mmlu_with_examples_of_the_same_subject(self, model, runs, data):
        results = evaluate_tasks(model, runs, ["mmlu"], data=data)
        dev = read(data, "mmlu_dev")
        for result in results:
            expected = []
            for row in read(data, "mmlu_test"):
                shots = [
                    mmlu_text(each) + f" {'ABCD'[each['label']]}\n\n"
                    for each in dev
                    if each["subject"] == row["subject"]
                ]
                name = row["subject"].replace("_", " ")
                about = f"The following are multiple choice questions (with answers) about {name}.\n\n"
                prompt = about + "".join(shots[:5]) + mmlu_text(row)
                with model.use(runs[result.run]):
                    expected.append(
                        by_hand(model, [(prompt, f" {letter}", letter) for letter in "ABCD"], row["label"])[0]
                    )
            assert (result.shots, len(shots)) == (5, 5)
            assert result.correct == tuple(expected)

    def test_hellaswag_never_scores_its_examples(self, model, runs, data):
        (full, _) = evaluate_tasks(model, runs, ["hellaswag"], data=data)
        documents = read(data, "hellaswag_val")
        splits = local.hellaswag(str(data))
        shots = "".join(f"A fox: {each['ctx']} {each['endings'][each['label']]}\n\n" for each in splits["examples"])
        scored = [row for row in documents if row["ctx"] in splits["test"]["ctx"]]
        assert (len(splits["examples"]), full.shots, full.metric) == (10, 10, "acc_norm")
        assert not set(splits["examples"]["ctx"]) & set(splits["test"]["ctx"])
        expected = [
            by_hand(model, [(f"{shots}A fox: {row['ctx']}", f" {end}", end) for end in row["endings"]], row["label"])
            for row in scored
        ]
        assert full.scores == {"acc": tuple(a for a, _ in expected), "acc_norm": tuple(n for _, n in expected)}

    @pytest.mark.parametrize(
        ("given", "read"),
        [
            ("A man is on a roof. he", "A man is on a roof. He"),
            ("The interior is shown. A man wets it. the man", "The interior is shown. A man wets it. The man"),
            ("How to dress. use what fits.", "How to dress. use what fits."),  # nothing is left to finish
            ("a man sits", "a man sits"),
        ],
    )
    def test_the_sentence_that_hellaswag_finishes_has_a_capital(self, tmp_path, given, read):
        rows = [{**story(number), "ctx": given} if number == 3 else story(number) for number in range(16)]
        (tmp_path / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = local.hellaswag(str(tmp_path))
        assert read in [*splits["examples"]["ctx"], *splits["test"]["ctx"]]

    def test_log_likelihoods_are_those_of_lm_eval(self, model):
        """With shared beginnings, contexts and continuations of several lengths, and small batches."""
        draw = torch.Generator().manual_seed(0)

        def some(length):
            return torch.randint(1, 300, (length,), generator=draw).tolist()

        shared = [some(LEAST_SHARED + 30), [], some(LEAST_SHARED + 5)]
        contexts = [shared[n % 3] + some(2 + n % 4) for n in range(14)]
        requests = [(None, context, some(size)) for context in contexts for size in (1, 3, 2)]
        requests += [(None, some(2100), some(4))]  # longer than the model reads
        lm = ElasticLM(model, batch_tokens=64)
        plain = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
        for own, other in zip(lm._loglikelihood_tokens(requests), plain, strict=True):
            assert own == pytest.approx(other, abs=1e-3)


class TestSample:
    def test_it_is_fixed_nested_and_even(self):
        strata = ["a"] * 100 + ["b"] * 50 + ["c"] * 10
        chosen = sample(strata, 32)
        assert chosen == sample(strata, 32) == sorted(set(chosen))
        assert set(sample(strata, 8)) < set(chosen)
        counts = [sum(strata[place] == stratum for place in chosen) for stratum in "abc"]
        assert counts == pytest.approx([20, 10, 2], abs=1)
        assert chosen[:20] != list(range(20))
        assert sample(strata, None) == sample(strata, 1000) == list(range(160))

    def test_a_limit_is_of_all_subjects_together(self, model, runs, data):
        results = evaluate_tasks(model, runs, ["mmlu", "piqa"], data=data, limit=6)
        subjects = [row["subject"] for row in read(data, "mmlu_test")]
        for result in results:
            assert len(result.documents) == 6
            assert result.documents == next(r for r in results if r.task == result.task).documents
        chosen = {subjects[int(document.rpartition("/")[2])] for document in results[0].documents}
        assert results[0].task == "mmlu"
        assert chosen == set(subjects)


def result(run, task, correct, **changes) -> TaskResult:
    documents = tuple(f"{task}/{place}" for place in range(len(correct)))
    given = {"shots": 0, "metric": "acc", "scores": {"acc": tuple(correct)}, "share": 1.0, "cost": None, **changes}
    return TaskResult(run, task, documents=documents, **given)


class TestNumbers:
    def test_of_one_task(self):
        first, other = result("full", "t", [1, 1, 0, 1, 0, 1]), result("half", "t", [1, 0, 0, 0, 1, 1])
        assert first.accuracy == pytest.approx(4 / 6)
        assert first.standard_error == pytest.approx(statistics.stdev(first.correct) / math.sqrt(6))
        assert other.difference(first) == pytest.approx((-1 / 6, statistics.stdev([0, -1, 0, -1, 1, 0]) / math.sqrt(6)))
        with pytest.raises(ValueError, match="other documents"):
            other.difference(result("full", "t", [1]))

    def test_what_is_kept_has_the_error_of_a_bootstrap(self):
        draw = torch.Generator().manual_seed(0)
        full_TN = (torch.rand(2, 400, generator=draw) < 0.6).double()
        half_TN = torch.where(torch.rand(2, 400, generator=draw) < 0.8, full_TN, 1 - full_TN)
        results = [
            result(run, f"t{t}", rows[t].tolist(), chance=0.25)
            for run, rows in (("full", full_TN), ("half", half_TN))
            for t in (0, 1)
        ]
        full, half = averages(results)
        assert (full.kept, full.kept_standard_error, full.flips) == (1, 0, 0)
        assert half.kept == pytest.approx(float(half_TN.mean() - 0.25) / float(full_TN.mean() - 0.25))
        assert half.flips == pytest.approx(float((half_TN != full_TN).double().mean()))
        places = torch.randint(400, (4000, 2, 400), generator=draw)
        again = [torch.stack([x[t][places[:, t]] for t in (0, 1)], 1).mean((1, 2)) - 0.25 for x in (half_TN, full_TN)]
        assert half.kept_standard_error == pytest.approx((again[0] / again[1]).std().item(), rel=0.1)
        assert half.standard_error == pytest.approx(again[0].std().item(), rel=0.1)

    def test_guessing_keeps_nothing(self):
        """Raw accuracy would say that a coin keeps 50% of a model that knows everything."""
        full, coin = averages(
            [result(run, "t", rows, chance=0.5) for run, rows in (("full", [1] * 8), ("coin", [1, 0] * 4))]
        )
        assert (full.over_chance, coin.over_chance, coin.kept, coin.flips) == (0.5, 0, 0, 0.5)

    def test_tasks_of_the_headline(self):
        results = [result("full", task, rows) for task, rows in (("piqa@0", [1, 1]), ("mmlu", [0, 0]))]
        (piqa,), (both,) = averages(results, ("piqa", "arc_easy")), averages(results)
        assert (piqa.tasks, piqa.accuracy, both.accuracy) == (("piqa@0",), 1, 0.5)
        with pytest.raises(ValueError, match="no result of lambada"):
            averages(results, ["lambada"])

    def test_shares_are_rounded_down(self):
        assert [floored(share) for share in (0.9499, 0.94999, 0.95, 1.0, 0.29)] == [
            "94.9%",
            "94.9%",
            "95.0%",
            "100.0%",
            "29.0%",
        ]


class TestResumption:
    def computed(self, monkeypatch):
        score, done = harness._score, []
        monkeypatch.setattr(
            harness, "_score", lambda model, lm, run, task: done.append(task.name) or score(model, lm, run, task)
        )
        return done

    def test_only_what_is_new_is_computed(self, model, runs, data, tmp_path, monkeypatch):
        done, file = self.computed(monkeypatch), tmp_path / "kept" / "scores.jsonl"
        first = evaluate_tasks(model, runs, ["piqa"], data=data, keep=file)
        assert done == ["piqa", "piqa"]
        assert evaluate_tasks(model, runs, ["piqa"], data=data, keep=file) == first
        assert len(done) == 2
        evaluate_tasks(model, {"again": runs["full"]}, ["piqa", "arc_easy"], data=data, keep=file)
        assert done[2:] == ["arc_easy"]
        evaluate_tasks(model, {"full": runs["full"]}, ["piqa"], data=data, keep=file, limit=3)
        evaluate_tasks(model, {"full": runs["full"]}, ["piqa@0"], data=data, keep=file)
        assert len(done) == 5
        other = ElasticModel(tiny.plain_model("llama", vocab_size=300, intermediate_size=24), tiny.tokenizer())
        evaluate_tasks(other, {"full": other.search_space.full}, ["piqa"], data=data, keep=file)
        assert len(done) == 6

    def test_a_line_that_was_cut_off_is_left_out(self, model, runs, data, tmp_path, monkeypatch):
        file = tmp_path / "scores.jsonl"
        first = evaluate_tasks(model, runs, ["piqa"], data=data, keep=file)
        file.write_text(file.read_text()[:-20])
        done = self.computed(monkeypatch)
        assert evaluate_tasks(model, runs, ["piqa"], data=data, keep=file) == first
        assert done == ["piqa"]
        assert len(file.read_text().splitlines()) == 2

    def test_a_broken_line_is_told_and_left_out(self, model, runs, data, tmp_path, monkeypatch, capsys):
        file = tmp_path / "scores.jsonl"
        first = evaluate_tasks(model, runs, ["piqa"], data=data, keep=file)
        good = file.read_text()
        file.write_text('{"key": 1, "scored": {"scores": {"acc": [NaN]}}}\n' + good)
        done = self.computed(monkeypatch)
        assert evaluate_tasks(model, runs, ["piqa"], data=data, keep=file) == first
        assert not done
        assert "line 1 is left out, because scored" in capsys.readouterr().err
        assert file.read_text().endswith(good)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """An elastic checkpoint with a latency table that names no device, a static router and a token router."""
    folder, space = tmp_path_factory.mktemp("routed") / "elastic", model.search_space
    costs = {"fixed": 1.0, "per_neuron": [0.05] * space.layers, "per_kv_group": [0.8] * space.layers}
    table = linear_table(space, metric="tpot", unit="ms", conditions={}, **costs)
    sensitivity, error = tiny.uneven_sensitivity(model), SurrogateError(0.0, 1.0, 1)
    about = RouterAbout("tpot", {}, "random", 96, 1, error, error, ())
    static = Router(space, StaticRouter.of(sensitivity, table, lowest=0.45), Surrogate.of(sensitivity), about)
    router = TokenRouter(static.net, tiny.HIDDEN)
    token_training.calibrate(model, router, table, static, tiny.blocks(32, vocab=300), [0.45, 0.6, 0.8, 0.97])
    model.save_pretrained(folder)
    sensitivity.save(folder)
    save_table(folder, table)
    static.save(folder, model)
    save_token_router(folder, router, TokenRouterAbout("tpot", {}, "random", 96, 0.5), model)
    return folder


class TestPerToken:
    def test_it_scores_what_it_computes_and_counts_no_padding(self, folder, data):
        model = ElasticModel.from_pretrained(folder)
        routing = route_tokens(model, "0.6x", folder)
        (result,) = evaluate_tasks(model, {"tokens": routing}, ["piqa"], data=data)
        computed = int(routing.used_LK[0].sum())
        assert result.cost == routing.average_cost == pytest.approx(0.6, abs=0.1)
        assert result.share == routing.share
        prompts = multiple_choice(lambda r: f"Question: {r['goal']}\nAnswer:", "choices")
        tokens, correct = 0, []
        for row in read(data, "piqa_val"):
            with routing.use():
                correct.append(by_hand(model, prompts(row), row["label"])[0])
            context = len(model.tokenizer(prompts(row)[0][0]).input_ids)
            tokens += context  # once; of each answer all but the last token goes in
            tokens += sum(len(model.tokenizer(a + b).input_ids) - context - 1 for a, b, _ in prompts(row))
        assert result.correct == tuple(correct)
        assert computed == tokens

    def test_another_router_is_another_run(self, folder):
        model = ElasticModel.from_pretrained(folder)
        one, same, other = (route_tokens(model, budget, folder) for budget in ("0.6x", "0.6x", "0.7x"))
        assert harness._identity(one) == harness._identity(same) != harness._identity(other)
        with torch.no_grad():
            same.router.out_LR += 0.01
        assert harness._identity(one) != harness._identity(same)


class TestErrors:
    def test_lm_eval_is_missing(self, model, runs, data, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        with pytest.raises(FlextronError, match=r'pip install "flextron\[tasks\]"'):
            evaluate_tasks(model, runs, ["piqa"], data=data)

    def test_no_data_and_no_hub(self, model, runs, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.delenv("FLEXTRON_TASK_DATA", raising=False)
        with pytest.raises(
            FlextronError, match=r"cannot load the task piqa: .*pass --task-data DIR or set FLEXTRON_TASK_DATA"
        ):
            evaluate_tasks(model, runs, ["piqa"])

    def test_names(self, model, runs, data, tmp_path, monkeypatch):
        with pytest.raises(FlextronError, match=r"no task 'boolq' among those in .*: arc_easy, lambada_openai"):
            evaluate_tasks(model, runs, ["boolq"], data=data)
        with pytest.raises(FlextronError, match="'piqa@x'; write NAME or NAME@SHOTS"):
            evaluate_tasks(model, runs, ["piqa@x"], data=data)
        with pytest.raises(FlextronError, match=r"no folder .*nowhere"):
            evaluate_tasks(model, runs, data=tmp_path / "nowhere")
        monkeypatch.setenv("FLEXTRON_TASK_DATA", str(tmp_path))
        with pytest.raises(FlextronError, match=r"has no arc_easy_test\.jsonl"):
            evaluate_tasks(model, runs)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{}", "line 1: piqa needs goal, choices, label"),
            ('{"goal": "a", "choices": ["b", "c"], "label": 2}', "label is 2"),
            ('{"goal": 1, "choices": ["b", "c"], "label": 1}', "goal is 1"),
        ],
    )
    def test_another_schema(self, model, runs, tmp_path, row, message):
        (tmp_path / "piqa_val.jsonl").write_text(row + "\n")
        with pytest.raises(FlextronError, match=message):
            evaluate_tasks(model, runs, ["piqa"], data=tmp_path)

    def test_before_anything_is_computed(self, model, data):
        with pytest.raises(SubnetError):
            evaluate_tasks(model, {"x": Subnet((41,) * 3, (3,) * 3)}, ["piqa"], data=data)
        with pytest.raises(ValueError, match="limit is 0"):
            evaluate_tasks(model, {"full": model.search_space.full}, ["piqa"], data=data, limit=0)
        with pytest.raises(ValueError, match="at least one run"):
            evaluate_tasks(model, {}, ["piqa"], data=data)
        without = ElasticModel(tiny.plain_model("llama", vocab_size=300))
        with pytest.raises(FlextronError, match="no tokenizer"):
            evaluate_tasks(without, {"full": model.search_space.full}, ["piqa"], data=data)

    def test_more_examples_than_there_are(self, model, runs, data):
        with pytest.raises(FlextronError, match=r"5 examples of .*; 6 were asked for \(mmlu@6\)"):
            evaluate_tasks(model, runs, ["mmlu@6"], data=data)

    def test_options_that_do_not_go_together(self):
        for options in ({"limit": 5}, {"task_data": "x"}, {"out_dir": "x"}):
            with pytest.raises(ValueError, match="needs --tasks"):
                EvaluateConfig("model", **options)
        with pytest.raises(ValueError, match="limit is 0"):
            EvaluateConfig("model", tasks=("paper",), limit=0)


class TestCommand:
    def test_table_files_and_picture(self, folder, data, tmp_path, capsys):
        out = tmp_path / "out"
        words = ["evaluate", str(folder), "--tasks", "paper", "--budget", "1.0x", "0.6x", "--per-token", "--limit", "4"]
        assert cli.main([*words, "--task-data", str(data), "--out-dir", str(out)]) == 0
        said = capsys.readouterr().out
        assert said.strip() == (out / "results.md").read_text().strip()
        summary = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        names = [row["run"] for row in summary["runs"]]
        assert names == ["full", "1.0x", "0.6x", "1.0x per token", "0.6x per token"]
        assert list(summary["runs"][0]["tasks"]) == list(PAPER)
        by_name = {row["run"]: row for row in summary["runs"]}
        assert by_name["full"]["tasks"] == by_name["1.0x"]["tasks"] == by_name["1.0x per token"]["tasks"]
        assert (by_name["full"]["cost"], by_name["full"]["headline"]["flips"]) == (1, 0)
        assert by_name["full"]["headline"]["tasks"] == ["arc_easy", "lambada_openai", "piqa", "hellaswag"]
        assert by_name["full"]["headline"]["over_chance"] == pytest.approx(
            statistics.mean(by_name["full"]["tasks"][name]["over_chance"] for name in HEADLINE)
        )
        assert by_name["0.6x"]["cost"] <= 0.6 < by_name["1.0x per token"]["cost"]
        for row in summary["runs"]:
            assert row["all"]["accuracy"] == pytest.approx(
                statistics.mean(t["accuracy"] for t in row["tasks"].values())
            )
            assert "divergence" not in row
        assert (out / "results.png").stat().st_size > 10_000
        assert cli.main([*words, "--task-data", str(data), "--out-dir", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == summary

    def test_divergence_from_the_original(self, folder, data, tmp_path, capsys):
        """Of its own full model it is 0, and of a narrower one it is not."""
        text = tmp_path / "text.txt"
        text.write_text(tiny.TEXT * 20)
        words = ["evaluate", str(folder), "--tasks", "piqa", "--subnet", "full", "60%", "--limit", "2", "--json"]
        words += ["--original", str(folder), "--text", str(text), "--tokens", "64", "--block-tokens", "32"]
        assert cli.main([*words, "--task-data", str(data)]) == 0
        full, narrow = json.loads(capsys.readouterr().out)["runs"]
        assert full["divergence"] == pytest.approx(0, abs=1e-6)
        assert narrow["divergence"] > 1e-5

    def test_a_single_document_has_no_error(self, folder, data, capsys):
        words = ["evaluate", str(folder), "--tasks", "piqa", "lambada_openai", "--limit", "1", "--json"]
        assert cli.main([*words, "--task-data", str(data)]) == 0
        (row,) = json.loads(capsys.readouterr().out)["runs"]
        assert row["tasks"]["piqa"]["standard_error"] is row["headline"]["standard_error"] is row["cost"] is None

    def test_what_has_no_price_has_no_columns_for_it(self, folder, data, capsys):
        words = ["evaluate", str(folder), "--tasks", "piqa", "--limit", "1", "--subnet", "full", "--no-measure"]
        assert cli.main([*words, "--task-data", str(data)]) == 0
        said = capsys.readouterr().out
        assert said.startswith("| | over chance | kept |")
        assert "*cost*" not in said
