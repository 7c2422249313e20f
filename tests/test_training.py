"""Training on tiny models: what is learned, kept and logged, and that a run ended by anything goes on to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from flextron import checkpoint as checkpoint_module
from flextron import cli, snapshot, training
from flextron.elastic import ElasticModel
from flextron.errors import CheckpointError, FlextronError, TrainingError
from flextron.sensitivity import Sensitivity
from flextron.snapshot import latest_snapshot
from flextron.subnet import Subnet
from flextron.training import schedule
from test_atomic import files_of_at_most, names
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

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """To read, never to change; tokenised text is kept in it."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def ranked(folder) -> Path:
    return make_checkpoint(folder / "model")


@pytest.fixture(scope="module")
def text(folder) -> Path:
    return make_text(folder / "text.jsonl")


@pytest.fixture(scope="module")
def whole(ranked, text, folder) -> Path:
    """A run that nothing interrupts."""
    torch.set_num_threads(1)
    return run(ranked, text, folder / "whole")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """To the bit: each line of metrics.jsonl once, and all weights."""
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
        assert max(full[-5:]) < 0.2 * small[-1]

    def test_held_out_losses_tell_the_same(self, longer, ranked, text):
        first, *_, last = [record["held_out"] for record in records(longer) if "held_out" in record]
        assert set(first) == {"full", "50%"}
        assert abs(last["full"] - first["full"]) < 0.05 < first["50%"] - last["50%"]
        model = ElasticModel.from_pretrained(ranked)
        losses = []
        for folder in (ranked, longer):
            model = ElasticModel.from_pretrained(folder)
            with model.use(Sensitivity.load(folder).allocate(0.5)):
                losses.append(held_out_loss(model, text))
        assert losses == pytest.approx([first["50%"], last["50%"]], abs=1e-4)

    def test_the_text_alone_needs_no_teacher(self, ranked, text, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "_teacher", lambda *_: pytest.fail("a teacher was made"))
        out = run(ranked, text, tmp_path / "out", text_weight=1, learning_rate=3e-3, tokens=20 * 256)
        visits = [visit for record in steps_of(out) for visit in record["visits"]]
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

    def test_another_teacher(self, ranked, text, folder, tmp_path):
        teacher = make_checkpoint(tmp_path / "teacher", num_hidden_layers=2)
        out = run(ranked, text, tmp_path / "out", teacher=teacher)
        assert visits_of(out, "full")[0]["divergence"] > 0.1

    def test_gradient_checkpointing_changes_no_loss(self, ranked, text, whole, tmp_path, monkeypatch):
        calls = []
        real = torch.utils.checkpoint.checkpoint
        monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
        out = run(ranked, text, tmp_path / "out", gradient_checkpointing=True)
        for found, expected in zip(steps_of(out), steps_of(whole), strict=True):
            assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-5)

    def test_bfloat16_arithmetic_is_near(self, ranked, text, whole, tmp_path):
        out = run(ranked, text, tmp_path / "out", precision="bf16")
        for found, expected in zip(steps_of(out), steps_of(whole), strict=True):
            assert losses_of(found) == pytest.approx(losses_of(expected), rel=0.1, abs=0.01)
        assert losses_of(steps_of(out)[0]) != losses_of(steps_of(whole)[0])
        assert weights_of(out)["model.norm.weight"].dtype == torch.float32

    def test_dropout_is_off(self, text, tmp_path):
        """It would make teachers and students differ, and a run that goes on another than one that never stopped."""
        model = make_checkpoint(tmp_path / "gpt2", "gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
        out = run(model, text, tmp_path / "out", tokens=256, evaluate_tokens=0)
        assert visits_of(out, "full")[0]["divergence"] == pytest.approx(0, abs=1e-5)


def losses_of(record: dict) -> list[float]:
    return [visit["loss"] for visit in record["visits"]]


def held_out_loss(model: ElasticModel, text: Path) -> float:
    from flextron.data import load_blocks

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
        out = run(ranked, text, tmp_path / "out", tokens=256, seed=1)
        assert steps_of(out)[0]["visits"] != steps_of(whole)[0]["visits"]

    def test_the_summary(self, ranked, text, tmp_path, capsys):
        run(ranked, text, tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"trained on {STEPS * 256} tokens in 0.")
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
        assert {weight.dtype for weight in kept} == {torch.float32}  # small updates are not rounded away on the way
        out = run(model, text, tmp_path / "out", learning_rate=3e-3)
        assert {weight.dtype for weight in weights_of(out).values()} == {torch.bfloat16}
        assert (
            ElasticModel.from_pretrained(out).dtype == AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
        )
        before, after = weights_of(model), weights_of(out)
        assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])

    def test_an_unranked_model(self, checkpoint, text, tmp_path):
        """Its units are not in an order of worth, but any share can be asked for, of nearly equal widths."""
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

    def test_adapters_learn_from_the_teacher_that_is_named(self, ranked, text, tmp_path):
        teacher = make_checkpoint(tmp_path / "teacher", num_hidden_layers=2)
        out = run(ranked, text, tmp_path / "out", lora_rank=2, teacher=teacher, tokens=256)
        assert visits_of(out, "full")[0]["divergence"] > 0.1
