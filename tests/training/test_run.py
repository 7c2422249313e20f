"""Training on tiny models: what it learns, keeps and logs, and that every interrupted run resumes exactly."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_worker import (
    STEPS,
    Killed,
    before_step,
    command,
    kill,
    make_checkpoint,
    make_text,
    records,
    run,
    steps_of,
    stopped_in,
    wait_for,
)
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import tiny
from flextron import cli, environment
from flextron.data.blocks import document_end, load_blocks
from flextron.data.corpus import positions
from flextron.errors import CheckpointError, TrainingError
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import Subnet
from flextron.training import distillation, snapshot
from flextron.training import run as training
from flextron.training.optimizer import schedule
from flextron.training.snapshot import latest_snapshot
from folders import files_of_at_most, names

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that tests never modify, except that it caches tokenised text."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def ranked(folder) -> Path:
    return make_checkpoint(folder / "model")


@pytest.fixture(scope="module")
def text(folder) -> Path:
    return make_text(folder / "text.jsonl")


@pytest.fixture(scope="module")
def whole(ranked, text, folder) -> Path:
    """An uninterrupted run."""
    torch.set_num_threads(1)
    return run(ranked, text, folder / "whole")


@pytest.fixture(scope="module")
def taught(ranked, text, folder) -> Path:
    """A model that predicts its text to some degree, trained without a teacher."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "_teacher", lambda *_: pytest.fail("a teacher was made"))
        return run(ranked, text, folder / "taught", text_weight=1, learning_rate=3e-3, tokens=20 * 256)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """Check that metrics.jsonl has each line once, and that all values and weights are equal to the bit."""
    assert records(found) == records(expected)
    mine, others = weights_of(found), weights_of(expected)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in others)
    assert names(found) == names(expected)


def visits_of(out: Path, kind: str) -> list[dict]:
    return [visit for record in steps_of(out) for visit in record["visits"] if visit["kind"] == kind]


class TestSchedule:
    @pytest.mark.parametrize("steps", [1, 2, 3, 10, 101])
    @pytest.mark.parametrize("warmup", [0, 0.05, 0.3, 1])
    def test_up_to_the_highest_rate_once_and_down_to_nearly_nothing(self, steps, warmup):
        rates = [schedule(step, steps, warmup) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) == 1
        top, rise = rates.index(1), max(1, round(warmup * steps))
        assert top == rise - 1
        assert rates[: top + 1] == pytest.approx([(step + 1) / rise for step in range(rise)])
        fall = rates[top:]
        assert fall == sorted(fall, reverse=True)
        assert rates[-1] == pytest.approx(1 / (steps - rise + 1))

    def test_falls_in_a_straight_line(self):
        assert [schedule(step, 10, 0.2) for step in range(1, 10)] == pytest.approx(
            [(9 - step) / 9 for step in range(9)]
        )


class TestWhatIsLearned:
    @pytest.fixture(scope="class")
    @staticmethod
    def longer(ranked, text, folder) -> Path:
        torch.set_num_threads(1)
        return run(ranked, text, folder / "longer", tokens=40 * 256, learning_rate=3e-3)

    def test_small_sub_networks_get_better_and_the_full_model_stays(self, longer):
        small = [visit["divergence"] for visit in visits_of(longer, "smallest")]
        assert sum(small[-5:]) < 0.5 * sum(small[:5])
        between = [visit["divergence"] for visit in visits_of(longer, "random") if visit["share"] < 0.75]
        assert sum(between[-8:]) < 0.75 * sum(between[:8])
        full = [visit["divergence"] for visit in visits_of(longer, "full")]
        assert full[0] == pytest.approx(0, abs=1e-5)
        assert sum(full[-5:]) < 0.5 * sum(small[-5:])

    def test_held_out_losses_are_those_of_the_weights(self, longer, ranked, text):
        first, *_, last = [record["held_out"] for record in records(longer) if "held_out" in record]
        assert set(first) == {"full", "50%"}
        for folder, found in ((ranked, first), (longer, last)):
            model = ElasticModel.from_pretrained(folder)
            with model.use(Sensitivity.load(folder).allocate(0.5)):
                assert held_out_loss(model, text) == pytest.approx(found["50%"], abs=1e-4)
            assert held_out_loss(model, text) == pytest.approx(found["full"], abs=1e-4)
        assert first["50%"] != pytest.approx(last["50%"], abs=1e-2)

    def test_the_text_alone_needs_no_teacher(self, taught):
        visits = [visit for record in steps_of(taught) for visit in record["visits"]]
        assert all(visit["divergence"] == 0 for visit in visits)
        assert all(visit["loss"] == visit["cross_entropy"] for visit in visits)
        losses = [visit["loss"] for visit in visits]
        assert sum(losses[-8:]) < sum(losses[:8]) - 8 * 0.3

    def test_a_mix(self, ranked, text, whole, tmp_path):
        out = run(ranked, text, tmp_path / "out", text_weight=0.25)
        for record in steps_of(out):
            for visit in record["visits"]:
                assert visit["loss"] == pytest.approx(0.75 * visit["divergence"] + 0.25 * visit["cross_entropy"])
        assert steps_of(out)[0]["visits"][0]["divergence"] == steps_of(whole)[0]["visits"][0]["divergence"]
        assert steps_of(out)[0]["gradient_norm"] != steps_of(whole)[0]["gradient_norm"]

    def test_documents_of_a_block_are_kept_apart(self, ranked, text, tmp_path, monkeypatch):
        """Student and teacher see positions per document; held-out text does not have them, as in `evaluate`."""
        seen = []
        real = distillation.hidden_states
        monkeypatch.setattr(
            distillation, "hidden_states", lambda *arguments: seen.append(arguments[1:]) or real(*arguments)
        )
        run(ranked, text, tmp_path / "out", tokens=256, evaluate_tokens=0)
        end = document_end(tiny.tokenizer())
        assert len(seen) == 8
        assert any((tokens[:, :-1] == end).any() for tokens, _ in seen)
        for tokens, places in seen:
            several = (tokens[:, :-1] == end).any()
            assert torch.equal(places, positions(tokens, end)) if several else places is None

    def test_another_teacher(self, ranked, text, folder, tmp_path):
        teacher = make_checkpoint(tmp_path / "teacher", num_hidden_layers=2)
        out = run(ranked, text, tmp_path / "out", teacher=teacher)
        assert visits_of(out, "full")[0]["divergence"] > 0.1

    @pytest.mark.parametrize("lora_rank", [0, 2])
    def test_gradient_checkpointing_changes_no_loss(self, ranked, text, whole, tmp_path, monkeypatch, lora_rank):
        """Also, every layer that runs with gradients is computed twice."""
        calls = []
        forward = LlamaMLP.forward
        monkeypatch.setattr(
            LlamaMLP, "forward", lambda mlp, x: calls.append(torch.is_grad_enabled()) or forward(mlp, x)
        )
        results, counts = [], []
        for name in ("kept", "computed again"):
            calls.clear()
            twice = True if name == "computed again" else None
            results.append(run(ranked, text, tmp_path / name, lora_rank=lora_rank, gradient_checkpointing=twice))
            counts.append(sum(calls))
        assert counts[1] == 2 * counts[0] > 0
        for found, expected in zip(*map(steps_of, results), strict=True):
            assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-5)

    def test_bfloat16_arithmetic_is_near(self, ranked, text, whole, tmp_path):
        out = run(ranked, text, tmp_path / "out", precision="bf16")
        for found, expected in zip(steps_of(out), steps_of(whole), strict=True):
            assert losses_of(found) == pytest.approx(losses_of(expected), rel=0.1, abs=0.01)
        assert losses_of(steps_of(out)[0]) != losses_of(steps_of(whole)[0])
        assert weights_of(out)["model.norm.weight"].dtype == torch.float32

    def test_dropout_is_off(self, text, tmp_path):
        """Dropout would make teacher and student differ, and a resumed run differ from an uninterrupted one."""
        model = make_checkpoint(tmp_path / "gpt2", "gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
        out = run(model, text, tmp_path / "out", tokens=256, evaluate_tokens=0)
        assert visits_of(out, "full")[0]["divergence"] == pytest.approx(0, abs=1e-5)


def losses_of(record: dict) -> list[float]:
    return [visit["loss"] for visit in record["visits"]]


def held_out_loss(model: ElasticModel, text: Path) -> float:
    blocks = load_blocks(model.tokenizer, text, tokens=128, block_tokens=32)
    with torch.no_grad():
        logits = model(blocks.tokens).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, blocks.tokens[:, 1:].flatten()).item()


class TestWhatIsLogged:
    def test_every_step_with_its_visits(self, whole, ranked):
        model, sensitivity = ElasticModel.from_pretrained(ranked), Sensitivity.load(ranked)
        steps = steps_of(whole)
        assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
        assert [record["tokens"] for record in steps] == [256 * step for step in range(1, STEPS + 1)]
        for record in steps:
            assert record["gradient_norm"] > 0
            assert [visit["kind"] for visit in record["visits"]].count("random") == 2
            for visit in record["visits"]:
                subnet = Subnet(tuple(visit["neurons"]), tuple(visit["kv_groups"]))
                model.search_space.check(subnet)
                assert visit["share"] == pytest.approx(model.share(subnet), abs=1e-4)
                assert visit["loss"] == visit["divergence"] >= 0
                assert 0 < visit["cross_entropy"] < 20
                expected = {"full": model.search_space.full, "smallest": sensitivity.allocate(0.5)}
                assert expected.get(visit["kind"], subnet) == subnet

    def test_the_rate_follows_the_schedule(self, whole):
        rates = [record["learning_rate"] for record in steps_of(whole)]
        assert rates == pytest.approx([3e-4 * schedule(step, STEPS, 0.05) for step in range(STEPS)])

    def test_held_out_losses_at_the_start_and_as_often_as_asked(self, whole):
        assert [record["step"] for record in records(whole) if "held_out" in record] == [0, STEPS // 2, STEPS]

    def test_no_held_out_text(self, ranked, text, tmp_path):
        out = run(ranked, text, tmp_path / "out", tokens=256, evaluate_tokens=0, evaluate_text="nowhere")
        assert [set(record) >= {"visits"} for record in records(out)] == [True]

    def test_a_seed_is_another_run(self, ranked, text, whole, tmp_path):
        """Another seed visits other sub-networks, on other blocks."""
        out = run(ranked, text, tmp_path / "out", tokens=256, seed=1)
        assert visits_of(out, "random")[0]["neurons"] != visits_of(whole, "random")[0]["neurons"]
        full = [visits_of(folder, "full")[0] for folder in (out, whole)]
        assert full[0]["neurons"] == full[1]["neurons"]
        assert abs(full[0]["cross_entropy"] - full[1]["cross_entropy"]) > 1e-3

    def test_the_summary(self, ranked, text, tmp_path, capsys):
        run(ranked, text, tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"trained on {STEPS * 256} tokens in ")
        held_out = [record["held_out"] for record in records(tmp_path / "out") if "held_out" in record]
        for line, wish in zip(lines[2:4], ("full", "50%"), strict=True):
            before, after = held_out[0][wish], held_out[-1][wish]
            assert line.split() == [wish, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        assert lines[-1] == f"wrote {tmp_path / 'out'}"

    def test_presets_in_turn(self, ranked, text, tmp_path):
        model = ElasticModel.from_pretrained(ranked)
        preset = model.search_space.uniform(20, 2)
        (tmp_path / "preset.json").write_text(preset.to_json())
        presets = ("70%", tmp_path / "preset.json", "neurons=10")
        out = run(ranked, text, tmp_path / "out", visits=(1, 0, 3, 0), presets=presets, smallest="neurons=0")
        expected = [Sensitivity.load(ranked).allocate(0.7), preset, model.search_space.uniform(10)]
        found = [Subnet(visit["neurons"], visit["kv_groups"]) for visit in visits_of(out, "preset")]
        assert found == (expected * STEPS)[: 3 * STEPS]

    def test_tensorboard(self, ranked, text, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")
        monkeypatch.chdir(tmp_path)
        run(ranked, text, tmp_path / "out", log_with="tensorboard")
        assert list(tmp_path.rglob("events.out.tfevents.*"))


class TestWhatIsKept:
    def test_the_folder_is_an_elastic_and_a_plain_checkpoint(self, whole, ranked):
        tokens = tiny.token_ids(vocab=300)
        elastic, before = ElasticModel.from_pretrained(whole), ElasticModel.from_pretrained(ranked)
        plain = AutoModelForCausalLM.from_pretrained(whole)
        assert torch.equal(tiny.logits_of(elastic, tokens), tiny.logits_of(plain, tokens))
        assert not torch.equal(tiny.logits_of(elastic, tokens), tiny.logits_of(before, tokens))
        assert not any("Elastic" in type(module).__name__ for module in plain.modules())
        assert elastic.search_space == before.search_space
        for order in ("neurons", "kv_groups", "query_heads"):
            assert torch.equal(getattr(elastic.ranking, order), getattr(before.ranking, order))
        assert Sensitivity.load(whole) == Sensitivity.load(ranked)
        assert elastic.tokenizer.get_vocab() == before.tokenizer.get_vocab()
        assert names(whole) == sorted({*names(ranked), "metrics.jsonl", "train.json"})

    @pytest.mark.parametrize("trained", [False, True])
    def test_embeddings_stay_as_they_are_unless_asked_for(self, ranked, text, tmp_path, trained):
        out = run(ranked, text, tmp_path / "out", train_embeddings=trained or None)
        before, after = weights_of(ranked), weights_of(out)
        for name, weight in before.items():
            frozen = name in ("model.embed_tokens.weight", "lm_head.weight") and not trained
            assert torch.equal(weight, after[name]) is frozen, name

    def test_tied_embeddings_stay_tied(self, text, tmp_path):
        model = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
        out = run(model, text, tmp_path / "out", train_embeddings=True)
        lm = ElasticModel.from_pretrained(out).lm
        assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
        assert not torch.equal(
            weights_of(out)["model.embed_tokens.weight"], weights_of(model)["model.embed_tokens.weight"]
        )

    def test_a_checkpoint_of_16_bits_stays_one(self, text, tmp_path):
        model = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
        with stopped_in(2):
            run(model, text, tmp_path / "out", learning_rate=3e-3)
        kept = [
            weight
            for file in (tmp_path / "out" / "checkpoints").rglob("*.safetensors")
            for weight in load_file(file).values()
        ]
        assert {weight.dtype for weight in kept} == {torch.float32}  # so that small updates are not rounded away
        out = run(model, text, tmp_path / "out", learning_rate=3e-3)
        assert {weight.dtype for weight in weights_of(out).values()} == {torch.bfloat16}
        assert (
            ElasticModel.from_pretrained(out).dtype == AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
        )
        before, after = weights_of(model), weights_of(out)
        assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])

    def test_an_unranked_model(self, checkpoint, text, tmp_path):
        """An unranked model accepts any share, with nearly equal widths."""
        out = run(checkpoint, text, tmp_path / "out", smallest="50%")
        (smallest,) = {(*visit["neurons"], *visit["kv_groups"]) for visit in visits_of(out, "smallest")}
        assert 0.4 < visits_of(out, "smallest")[0]["share"] <= 0.5
        assert max(smallest[:3]) - min(smallest[:3]) <= 8
        assert ElasticModel.from_pretrained(out).ranking is None
        assert not Sensitivity.is_in(out)

    def test_adapters_only_on_the_way_and_a_plain_model_in_the_end(self, ranked, text, tmp_path):
        with stopped_in(2):
            run(ranked, text, tmp_path / "out", lora_rank=2, learning_rate=3e-3)
        snapshot_folder = latest_snapshot(tmp_path / "out" / "checkpoints")
        kept = {name for file in snapshot_folder.glob("*.safetensors") for name in load_file(file)}
        assert kept
        assert all(".lora_A." in name or ".lora_B." in name for name in kept)
        out = run(ranked, text, tmp_path / "out", lora_rank=2, learning_rate=3e-3)
        before, after = weights_of(ranked), weights_of(out)
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert torch.equal(weight, after[name]) is not ("proj" in name and name.endswith("weight")), name
        tokens = tiny.token_ids(vocab=300)
        plain = AutoModelForCausalLM.from_pretrained(out)
        tiny.assert_same_function(
            tiny.logits_of(ElasticModel.from_pretrained(out), tokens), tiny.logits_of(plain, tokens)
        )
        assert visits_of(out, "full")[0]["divergence"] == pytest.approx(0, abs=1e-5)
        whole = run(ranked, text, tmp_path / "whole", lora_rank=2, learning_rate=3e-3)
        assert_same_run(out, whole)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_adapters_on_a_checkpoint_of_16_bits(self, text, tmp_path, precision):
        model = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
        options = {"lora_rank": 2, "precision": precision, "learning_rate": 1e-2}
        expected = run(model, text, tmp_path / "whole", **options)
        assert {weight.dtype for weight in weights_of(expected).values()} == {torch.bfloat16}
        assert visits_of(expected, "full")[0]["divergence"] == pytest.approx(0, abs=1e-3)
        small = [visit["divergence"] for visit in visits_of(expected, "smallest")]
        assert small[-1] < 0.9 * small[0]
        with stopped_in(3):
            run(model, text, tmp_path / "out", **options)
        assert_same_run(run(model, text, tmp_path / "out", **options), expected)

    def test_adapters_learn_from_the_teacher_that_is_named(self, ranked, text, tmp_path):
        teacher = make_checkpoint(tmp_path / "teacher", num_hidden_layers=2)
        out = run(ranked, text, tmp_path / "out", lora_rank=2, teacher=teacher, tokens=256)
        assert visits_of(out, "full")[0]["divergence"] > 0.1


class TestTakenUp:
    """A run that was ended in any way continues with the same command as if nothing had happened."""

    @pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 4)])
    def test_stopped_by_a_signal(self, ranked, text, whole, tmp_path, capsys, number, step):
        with stopped_in(step, number):
            run(ranked, text, tmp_path / "out")
        said = capsys.readouterr().err
        assert "stopping after this step and a checkpoint; press Ctrl-C again to stop at once." in said
        assert f"stopped after step {step} of {STEPS}. To continue, run the same command." in said
        assert names(tmp_path / "out" / "checkpoints") == [f"step-{step:08d}"]
        run(ranked, text, tmp_path / "out")
        assert f"resuming from step {step} of {STEPS}" in capsys.readouterr().err
        assert_same_run(tmp_path / "out", whole)

    def test_stopped_again_and_again(self, ranked, text, whole, tmp_path):
        for step in (1, 2, 5):
            with stopped_in(step):
                run(ranked, text, tmp_path / "out")
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_a_signal_in_the_last_step_is_too_late(self, ranked, text, whole, tmp_path):
        with before_step(STEPS, lambda: signal.raise_signal(signal.SIGINT)):
            run(ranked, text, tmp_path / "out")
        assert_same_run(tmp_path / "out", whole)

    def test_asked_twice_it_stops_at_once(self, ranked, text, whole, tmp_path):
        def twice() -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt), before_step(3, twice):
            run(ranked, text, tmp_path / "out")
        assert latest_snapshot(tmp_path / "out" / "checkpoints") is None
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_in_another_thread_than_the_first(self, ranked, text, whole, tmp_path):
        """Outside the main thread, signals are left to the caller."""
        with ThreadPoolExecutor(1) as pool:
            out = pool.submit(lambda: torch.set_num_threads(1) or run(ranked, text, tmp_path / "out")).result()
        assert_same_run(out, whole)

    def test_stopped_after_it_replaced_another(self, ranked, text, whole, tmp_path, capsys):
        with stopped_in(2):
            run(ranked, text, tmp_path / "out", resume="never")
        assert "To continue, run the same command without --resume never." in capsys.readouterr().err
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_handlers_are_as_before(self, whole, ranked, text, tmp_path):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with stopped_in(1):
            run(ranked, text, tmp_path / "out")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    @pytest.mark.parametrize("save_minutes", [10, 0])  # saves only the start, or every step
    @pytest.mark.parametrize("step", [1, 4])
    def test_killed_before_a_step(self, ranked, text, whole, tmp_path, save_minutes, step):
        with pytest.raises(Killed), before_step(step, kill):
            run(ranked, text, tmp_path / "out", save_minutes=save_minutes)
        assert len(steps_of(tmp_path / "out")) == step - 1
        kept = () if save_minutes or step == 1 else (step - 2, step - 1)
        saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoints/*"))
        assert saved == [f"step-{number:08d}" for number in kept]
        assert_same_run(run(ranked, text, tmp_path / "out", save_minutes=save_minutes), whole)

    def test_killed_while_the_metrics_were_written(self, ranked, text, whole, tmp_path):
        with pytest.raises(Killed), before_step(4, kill):
            run(ranked, text, tmp_path / "out", save_minutes=0)
        with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "tokens": 10')
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_killed_while_a_checkpoint_was_written(self, ranked, text, whole, tmp_path, monkeypatch):
        """The run is killed after a step is in the metrics, and before it is in a checkpoint."""
        with (
            monkeypatch.context() as patch,
            before_step(3, lambda: patch.setattr(snapshot, "_finish", lambda *_: kill())),
            pytest.raises(Killed),
        ):
            run(ranked, text, tmp_path / "out", save_minutes=0)
        assert len(steps_of(tmp_path / "out")) == 3
        assert latest_snapshot(tmp_path / "out" / "checkpoints").name == "step-00000002"
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "flextron.json"])
    def test_killed_while_the_trained_model_was_written(self, ranked, text, whole, tmp_path, monkeypatch, name):
        """The run is killed before one of the final files is in its place."""
        replace = Path.replace

        def killed(self, target):
            return kill() if self.name == name and self.parent.name == ".final" else replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(Killed):
                run(ranked, text, tmp_path / "out")
        assert not (tmp_path / "out" / "flextron.json").exists()
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_killed_when_all_was_there(self, ranked, text, whole, tmp_path, monkeypatch):
        """The trained model exists, and the next start deletes the leftovers next to it."""
        with monkeypatch.context() as patch:
            patch.setattr(os, "sync", kill)
            with pytest.raises(Killed):
                run(ranked, text, tmp_path / "out")
        assert (tmp_path / "out" / "checkpoints").exists()
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_the_newest_checkpoint_is_garbled(self, ranked, text, whole, tmp_path):
        """The error says what to do; after that, the run resumes from the checkpoint before."""
        with pytest.raises(Killed), before_step(4, kill):
            run(ranked, text, tmp_path / "out", save_minutes=0)
        newest = latest_snapshot(tmp_path / "out" / "checkpoints")
        file = next(newest.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        with pytest.raises(CheckpointError, match=r"step-00000003.*Delete the snapshot to resume from an earlier one"):
            run(ranked, text, tmp_path / "out")
        shutil.rmtree(newest)
        assert_same_run(run(ranked, text, tmp_path / "out"), whole)

    def test_in_the_type_of_arithmetic_that_it_began_with(self, ranked, text, tmp_path, monkeypatch):
        """The dtype stays, even if another is faster now."""
        expected = run(ranked, text, tmp_path / "whole", precision="bf16")
        with monkeypatch.context() as patch:
            patch.setattr(environment, "faster_dtype", lambda _: torch.bfloat16)
            with stopped_in(3):
                run(ranked, text, tmp_path / "out", precision="auto")
            patch.setattr(environment, "faster_dtype", lambda _: torch.float32)
            out = run(ranked, text, tmp_path / "out", precision="auto")
        assert_same_run(out, expected)

    def test_with_a_trained_head_and_a_mixed_loss(self, ranked, text, tmp_path):
        options = {"train_embeddings": True, "text_weight": 0.5, "weight_decay": 0.1, "spread": 1, "seed": 3}
        expected = run(ranked, text, tmp_path / "whole", **options)
        with stopped_in(3):
            run(ranked, text, tmp_path / "out", **options)
        assert_same_run(run(ranked, text, tmp_path / "out", **options), expected)

    def test_with_dropout_in_the_config(self, text, tmp_path):
        model = make_checkpoint(tmp_path / "gpt2", "gpt2", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
        expected = run(model, text, tmp_path / "whole")
        with stopped_in(3):
            run(model, text, tmp_path / "out")
        assert_same_run(run(model, text, tmp_path / "out"), expected)


class TestProcess:
    """Interruptions through the command line and the operating system."""

    def start(self, *arguments) -> subprocess.Popen:
        line = [sys.executable, "-m", "flextron.cli", *arguments]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_ended_by_a_signal(self, ranked, text, tmp_path, number):
        steps, minutes = 30, 0 if number == signal.SIGKILL else 10
        line = command(ranked, text, tmp_path / "out", tokens=steps * 256, save_minutes=minutes)
        metrics = tmp_path / "out" / "metrics.jsonl"
        with self.start(*line) as process:
            wait_for(
                lambda: process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) > 3)
            )
            process.send_signal(number)
            _, errors = process.communicate(timeout=240)
        assert "Traceback" not in errors
        kept = latest_snapshot(tmp_path / "out" / "checkpoints")
        if number == signal.SIGINT:
            assert process.returncode == 130
            stopped_at = int(kept.name[-8:])
            assert f"stopped after step {stopped_at} of {steps}. To continue, run the same command." in errors
            assert errors.splitlines()[-1] == "interrupted; finished work is kept."
            assert len(steps_of(tmp_path / "out")) == stopped_at
        else:
            assert process.returncode == -signal.SIGKILL
        assert 2 <= int(kept.name[-8:]) < steps  # the step of the last line may not be saved yet
        assert cli.main(line) == 0
        assert_same_run(tmp_path / "out", run(ranked, text, tmp_path / "whole", tokens=steps * 256))


class TestTwice:
    def test_a_finished_run_is_left_alone(self, ranked, text, whole, tmp_path, capsys):
        out = tmp_path / "out"
        shutil.copytree(whole, out)
        before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
        assert cli.main(command(ranked, text, out)) == 0
        assert f"{out} is already trained. Name another folder, or pass --resume never" in capsys.readouterr().err
        assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before

    def test_resume_never_trains_anew(self, ranked, text, whole, tmp_path):
        out = tmp_path / "out"
        run(ranked, text, out, seed=1, tokens=512)
        with stopped_in(2):
            run(ranked, text, tmp_path / "half")
        for folder in (out, tmp_path / "half"):
            assert_same_run(run(ranked, text, folder, resume="never"), whole)

    def test_what_no_weight_depends_on_may_change(self, ranked, text, whole, tmp_path):
        with stopped_in(2):
            run(ranked, text, tmp_path / "out")
        out = run(
            ranked, text, tmp_path / "out", keep_last=1, save_minutes=5, evaluations=6, evaluate_on=("full", "70%")
        )
        assert steps_of(out) == steps_of(whole)
        assert set(records(out)[-1]["held_out"]) == {"full", "70%"}

    def test_another_held_out_text_is_not_compared(self, ranked, text, whole, tmp_path, capsys):
        other = tmp_path / "other.txt"
        other.write_text(tiny.TEXT * 20)
        with stopped_in(4):
            run(ranked, text, tmp_path / "out")
        capsys.readouterr()
        out = run(ranked, text, tmp_path / "out", evaluate_text=other)
        assert steps_of(out) == steps_of(whole)
        shown = capsys.readouterr()
        last = records(out)[-1]["held_out"]["full"]
        assert f"held-out nats per token (change): full {last:.3f}, 50%" in shown.err
        assert ["full", "nan", f"{last:.3f}", "+nan"] in [line.split() for line in shown.out.splitlines()]

    def test_a_trained_model_can_be_trained_further(self, whole, text, tmp_path):
        out = run(whole, text, tmp_path / "out", tokens=256)
        assert names(out) == names(whole)


def error_of(capsys, line: list[str]) -> str:
    """Return the one line of the error; the exit code is 2."""
    capsys.readouterr()
    assert cli.main(line) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(shown) == 1
    return shown[0].removeprefix("error: ")


def assert_nothing_done(out: Path) -> None:
    """Check that the folder has at most settings and first measurements, which do not stop the next command."""
    assert not out.exists() or set(names(out)) <= {"train.json", "metrics.jsonl"}


class TestBadInput:
    """The command line prints one clear line and leaves nothing behind."""

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("empty.txt", "", "empty.txt is empty"),
            ("blank.jsonl", '{"text": " "}\n\n', "blank.jsonl is empty"),
            (
                "garbled.jsonl",
                '{"text": "fine"}\n{"text": "fi',
                'garbled.jsonl, line 2: not a JSON object with a "text"',
            ),
            ("other.jsonl", '{"title": "x"}\n', 'other.jsonl, line 1: not a JSON object with a "text" field'),
            ("number.jsonl", '{"text": 5}\n', '"text" is a int, not a string'),
            ("binary.txt", b"\xff\xfe\x00", "cannot read"),
            ("short.txt", "Too short.", "less than one block of 32"),
            (None, None, "no text at"),
        ],
    )
    def test_text(self, ranked, text, tmp_path, capsys, name, content, message):
        file = tmp_path / (name or "nowhere.txt")
        if name:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        line = command(ranked, text, tmp_path / "out", data=file, cache=tmp_path / "cache")
        error = error_of(capsys, line)
        assert message in error
        assert file.name in error
        assert_nothing_done(tmp_path / "out")

    def test_held_out_text(self, ranked, text, tmp_path, capsys):
        (tmp_path / "short.txt").write_text("Too short.")
        line = command(ranked, text, tmp_path / "out", evaluate_text=tmp_path / "short.txt")
        assert "less than one block of 32" in error_of(capsys, line)
        assert_nothing_done(tmp_path / "out")

    def test_documents_longer_than_a_block_are_fine(self, ranked, text, tmp_path):
        (tmp_path / "long.txt").write_text(tiny.TEXT * 50)
        out = run(ranked, text, tmp_path / "out", data=tmp_path / "long.txt", tokens=512)
        assert len(steps_of(out)) == 2

    def test_a_model_without_a_tokenizer(self, text, tmp_path, capsys):
        ElasticModel(tiny.plain_model("llama")).save_pretrained(tmp_path / "model")
        assert "has no tokenizer" in error_of(capsys, command(tmp_path / "model", text, tmp_path / "out"))
        assert_nothing_done(tmp_path / "out")

    def test_the_tokenizer_of_another_model(self, text, tmp_path, capsys):
        ElasticModel(tiny.plain_model("llama"), tiny.tokenizer()).save_pretrained(tmp_path / "model")
        error = error_of(capsys, command(tmp_path / "model", text, tmp_path / "out"))
        assert f"the tokenizer has {len(tiny.tokenizer())} tokens, the model's vocabulary {tiny.VOCAB}" in error
        assert_nothing_done(tmp_path / "out")

    @pytest.mark.parametrize("model", ["nowhere/at/all", "text.jsonl"])
    def test_no_model(self, text, tmp_path, capsys, model):
        line = command(text.parent / model, text, tmp_path / "out")
        assert "no such checkpoint" in error_of(capsys, line)
        assert_nothing_done(tmp_path / "out")

    def test_a_teacher_of_another_vocabulary(self, ranked, text, tmp_path, capsys):
        ElasticModel(tiny.plain_model("llama")).save_pretrained(tmp_path / "teacher")
        error = error_of(capsys, command(ranked, text, tmp_path / "out", teacher=tmp_path / "teacher"))
        assert f"has a vocabulary of {tiny.VOCAB}, the model one of 300" in error
        assert_nothing_done(tmp_path / "out")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"smallest": "100%"}, "a search space with more than one size"),
            ({"smallest": "0.1"}, "cannot read the sub-network '0.1'"),
            ({"smallest": "130%"}, "a share of 130%"),
            ({"smallest": "neurons=7"}, "not a choice of the search space"),
            ({"visits": (1, 1, 1, 1)}, "presets have weight 1.0, but none is named"),
            ({"presets": "70%"}, "presets are named, but have weight 0"),
            ({"evaluate_on": ("full", "tiny")}, "cannot read the sub-network 'tiny'"),
            ({"device": "nonsense"}, "cannot run on device 'nonsense'"),
            ({"log_with": "nonsense"}, "nonsense"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_options(self, ranked, text, tmp_path, capsys, options, message):
        line = command(ranked, text, tmp_path / "out", **options)
        assert message in error_of(capsys, line)
        assert_nothing_done(tmp_path / "out")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"visits": (0, 0, 0, 0)}, "--visits must be four weights"),
            ({"block_tokens": 1}, "--block-tokens is 1; it must be at least 2"),
            ({"tokens": 16}, "tokens is 16; it must be at least 32"),
            ({"learning_rate": 0}, "--learning-rate is 0"),
            ({"text_weight": 1, "teacher": "other"}, "--teacher is other, but --text-weight 1 leaves no weight for it"),
            ({"text_weight": 1.5}, "--text-weight is 1.5; it must lie between 0 and 1"),
            ({"lora_rank": 2, "train_embeddings": True}, "--train-embeddings and --lora-rank exclude each other"),
            ({"seed": -1}, "seed is -1; it must be at least 0"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_numbers(self, ranked, text, tmp_path, capsys, options, message):
        """The parser of the command line refuses these numbers."""
        with pytest.raises(SystemExit) as stop:
            cli.main(command(ranked, text, tmp_path / "out", **options))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert_nothing_done(tmp_path / "out")

    def test_a_tracker_that_is_not_installed(self, ranked, text, tmp_path, capsys):
        missing = next(name for name in ("wandb", "mlflow", "aim") if not is_installed(name))
        assert missing in error_of(capsys, command(ranked, text, tmp_path / "out", log_with=missing))
        assert_nothing_done(tmp_path / "out")

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_a_folder_that_is_something_else(self, ranked, text, tmp_path, capsys, resume):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
        (tmp_path / "file").write_text("years of work")
        for name in ("thesis", "file"):
            line = command(ranked, text, tmp_path / name, resume=resume)
            assert f"{name} exists and is not a training run. Name another folder." in error_of(capsys, line)
        assert (tmp_path / "thesis" / "chapter1.txt").read_text() == (tmp_path / "file").read_text() == "years of work"

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_out_is_the_model_itself(self, whole, text, tmp_path, capsys, resume):
        """A trained folder holds a run, but a run that reads it must not replace it."""
        model = tmp_path / "model"
        shutil.copytree(whole, model)
        before = {path.name: path.read_bytes() for path in model.iterdir()}
        error_of(capsys, command(model, text, model, resume=resume))
        assert {path.name: path.read_bytes() for path in model.iterdir()} == before

    def test_other_settings_or_another_model(self, ranked, checkpoint, text, tmp_path, capsys):
        with stopped_in(2):
            run(ranked, text, tmp_path / "out")
        before = records(tmp_path / "out")
        line = command(ranked, text, tmp_path / "out", seed=1, learning_rate=1e-3)
        error = error_of(capsys, line)
        assert "holds a run with other settings: learning_rate was 0.0003, now 0.001; seed was 0, now 1." in error
        assert "--resume never" in error
        shutil.copytree(ranked, tmp_path / "model")
        ElasticModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "model", overwrite=True)
        assert "the training of another model" in error_of(capsys, command(tmp_path / "model", text, tmp_path / "out"))
        assert records(tmp_path / "out") == before
        assert names(tmp_path / "out" / "checkpoints") == ["step-00000002"]

    def test_a_failed_start_can_be_started_again(self, ranked, text, tmp_path, capsys):
        """After the mistake is corrected, the same command works."""
        (tmp_path / "empty.txt").write_text("")
        error_of(capsys, command(ranked, text, tmp_path / "out", data=tmp_path / "empty.txt"))
        assert cli.main(command(ranked, text, tmp_path / "out", tokens=256)) == 0

    def test_a_mistake_replaces_nothing(self, ranked, text, whole, tmp_path, capsys):
        shutil.copytree(whole, tmp_path / "out")
        (tmp_path / "empty.txt").write_text("")
        for options in ({"data": tmp_path / "empty.txt"}, {"smallest": "100%"}, {"teacher": "no/such/teacher"}):
            error_of(capsys, command(ranked, text, tmp_path / "out", resume="never", **options))
            assert_same_run(tmp_path / "out", whole)


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class TestOnTheWay:
    def test_a_loss_that_is_no_longer_a_number(self, ranked, text, tmp_path, capsys):
        options = {"learning_rate": 1e15, "clip_norm": 1e15, "save_minutes": 0}
        error = error_of(capsys, command(ranked, text, tmp_path / "out", **options))
        step = len(steps_of(tmp_path / "out")) + 1
        assert f"the loss or its gradient is not a number in step {step} of {STEPS}" in error
        assert "Start again with a learning rate below 1e+15 and --resume never." in error
        assert 2 <= step <= STEPS
        with pytest.raises(TrainingError):
            run(ranked, text, tmp_path / "out", **options)
        assert latest_snapshot(tmp_path / "out" / "checkpoints").name == f"step-{step - 1:08d}"
        assert not (tmp_path / "out" / "flextron.json").exists()
        assert cli.main(command(ranked, text, tmp_path / "out", resume="never", tokens=256)) == 0

    def test_nothing_changes_in_a_step_whose_gradient_is_no_number(self, ranked, text, tmp_path, monkeypatch):
        made = []
        real = training.TrainingRun._clip
        monkeypatch.setattr(
            training.TrainingRun,
            "_clip",
            lambda run: made.append(run) or real(run) * (float("nan") if run.step == 2 else 1),
        )
        with pytest.raises(TrainingError, match=r"step 3 of 6.*gradient norm nan"):
            run(ranked, text, tmp_path / "out", save_minutes=0)
        kept = {}
        for file in latest_snapshot(tmp_path / "out" / "checkpoints").glob("*.safetensors"):
            kept.update(load_file(file))
        now = dict(made[0].distiller.named_parameters())
        found = {name.removeprefix("model."): weight for name, weight in kept.items() if name.startswith("model.")}
        assert found
        assert all(torch.equal(now[name], weight) for name, weight in found.items())

    def test_a_gradient_that_jumps_is_told_of(self, ranked, text, tmp_path, monkeypatch, capsys):
        real = training.TrainingRun._clip
        monkeypatch.setattr(training.TrainingRun, "_clip", lambda run: real(run) * (100 if run.step in (5, 24) else 1))
        few = {"visits_per_step": 1, "blocks_per_visit": 1, "visits": (0, 1, 0, 0), "evaluate_tokens": 0}
        run(ranked, text, tmp_path / "out", **few, tokens=27 * 32, learning_rate=1e-6)
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: in step" in line]
        assert len(warnings) == 1  # at step 6, too few norms were known
        assert "warning: in step 25 the gradient norm is " in warnings[0]

    def test_text_that_begins_again_is_told_of(self, ranked, tmp_path, capsys):
        (tmp_path / "short.txt").write_text(tiny.TEXT * 12)
        run(ranked, tmp_path / "short.txt", tmp_path / "out", evaluate_tokens=0)
        assert "short.txt has been read 1 times; reading it again in another order" in capsys.readouterr().err

    def test_a_full_disk(self, ranked, text, whole, tmp_path, capsys):
        """The system refuses the checkpoint of step 3; that of step 2 stays, and the run resumes later."""
        limits = []

        def fill() -> None:
            limits.append(files_of_at_most(50_000))
            limits[0].__enter__()

        line = command(ranked, text, tmp_path / "out", save_minutes=0)
        try:
            with before_step(3, fill):
                error = error_of(capsys, line)
        finally:
            limits[0].__exit__(None, None, None)
        assert "cannot write" in error
        assert "step-00000003" in error
        assert names(tmp_path / "out" / "checkpoints") == ["step-00000001", "step-00000002"]
        assert cli.main(line) == 0
        assert_same_run(tmp_path / "out", whole)

    def test_a_full_disk_at_the_end(self, ranked, text, whole, tmp_path, monkeypatch, capsys):
        real = training.RunFolder.finish

        def finish(*arguments):
            with files_of_at_most(50_000):
                real(*arguments)

        line = command(ranked, text, tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(training.RunFolder, "finish", finish)
            assert "cannot write" in error_of(capsys, line)
        assert latest_snapshot(tmp_path / "out" / "checkpoints").name == f"step-{STEPS:08d}"
        assert cli.main(line) == 0
        assert_same_run(tmp_path / "out", whole)

    def test_a_full_model_that_gets_worse_is_told_of(self, taught, text, tmp_path, capsys):
        run(taught, text, tmp_path / "out", learning_rate=1, visits=(0, 1, 0, 0))
        assert "warning: the full model's loss has risen by " in capsys.readouterr().err
        run(taught, text, tmp_path / "other", learning_rate=1e-5)
        assert "warning" not in capsys.readouterr().err
