"""The folder of a run: what it may contain, how it forgets steps, and how the trained model gets there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import folders
import tiny
from flextron.config import TrainConfig, VisitOptions
from flextron.elastic.source import METADATA_FILE
from flextron.errors import CheckpointError
from flextron.locks import INSIDE
from flextron.model import ElasticModel
from flextron.ranking.sensitivity import Sensitivity
from flextron.training.folder import RunFolder
from flextron.training.sampling import even_sensitivity
from folders import content, files_of_at_most, writer_inside


def names(path: Path) -> list[str]:
    """What lies in a folder, apart from the lock that these tests' runs hold."""
    return [name for name in folders.names(path) if name != INSIDE]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig("somewhere/model", tmp_path / "out", visit=VisitOptions(visits_per_step=4))


def changed(config: TrainConfig, changes: dict) -> TrainConfig:
    """Return the config with other values of fields, and of fields of its groups."""
    values = {
        key: replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return replace(config, **values)


@pytest.fixture
def folder(config) -> RunFolder:
    """The folder of a run that has just begun."""
    folder = RunFolder(config.out)
    folder.open(config, "f00d")
    return folder


@pytest.fixture
def begun(folder) -> RunFolder:
    """The folder of a run with a snapshot."""
    folder.log({"step": 1})
    (folder.snapshots / "step-00000001").mkdir(parents=True)
    (folder.snapshots / "step-00000001" / "state.json").write_text('{"version": 1}')
    return folder


class TestOpen:
    def test_writes_what_was_asked_for(self, folder):
        settings = json.loads((folder.path / "train.json").read_text())
        assert (settings["version"], settings["fingerprint"], settings["model"]) == (1, "f00d", "somewhere/model")
        assert settings["optimizer"]["learning_rate"] == 3e-4
        assert settings["text"]["data"] == ["sample/train"]
        assert not {"out", "watch", "resume", "device", "dry_run", "cache"} & {*settings, *settings["text"]}
        assert names(folder.path) == ["train.json"]
        assert not folder.is_finished

    def test_makes_folders_above_and_takes_an_empty_one(self, config, tmp_path):
        RunFolder(tmp_path / "some" / "where").open(config, "f00d")
        (tmp_path / "empty").mkdir()
        RunFolder(tmp_path / "empty").open(config, "f00d")
        assert names(tmp_path / "some" / "where") == names(tmp_path / "empty") == ["train.json"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"watch": {"evaluations": 1, "save_minutes": 0, "keep_last": 5, "log_with": ("wandb",)}},
            {"device": "cuda:0"},
            {"dry_run": True},
            {"text": {"cache": Path("elsewhere")}},
            {},
        ],
        ids=str,
    )
    def test_takes_up_the_same_run(self, begun, config, changes):
        before = content(begun.path)
        begun.open(changed(config, changes), "f00d")
        assert content(begun.path) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 3}, "seed was 0, now 3"),
            ({"model": "other/model"}, "model was 'somewhere/model', now 'other/model'"),
            ({"optimizer": {"warmup": 0.1}}, "warmup was 0.05, now 0.1"),
            ({"text": {"data": ("a", "b@2")}}, "data was ['sample/train'], now ['a', 'b@2']"),
            ({"visit": {"visits": (1, 1, 0, 3)}}, "visits was [1, 1, 0, 2], now [1, 1, 0, 3]"),
            (
                {"visit": {"smallest": "40%", "spread": 0, "visits_per_step": 2, "blocks_per_visit": 2}},
                "smallest was '50%', now '40%'; spread was 0.5, now 0; visits_per_step was 4, now 2",
            ),
        ],
    )
    def test_refuses_other_settings(self, begun, config, changes, message):
        before = content(begun.path)
        with pytest.raises(CheckpointError) as error:
            begun.open(changed(config, changes), "f00d")
        assert str(error.value) == (
            f"{begun.path} holds a run with other settings: {message}. "
            "Pass the same settings, name another folder, or pass --resume never to replace that run."
        )
        assert content(begun.path) == before

    def test_every_setting_but_the_free_ones_is_compared(self, begun, config):
        """Every field counts: train.json differs whichever field changes."""
        settings = json.loads((begun.path / "train.json").read_text())
        for group in (settings, settings["text"], settings["visit"], settings["optimizer"]):
            for key, value in group.items():
                if isinstance(value, dict):
                    continue
                group[key] = "something else"
                (begun.path / "train.json").write_text(json.dumps(settings))
                with pytest.raises(CheckpointError):
                    begun.open(config, "f00d")
                group[key] = value

    def test_refuses_another_model(self, begun, config):
        with pytest.raises(CheckpointError, match=r"holds the training of another model\. Name another folder"):
            begun.open(config, "beef")

    def test_a_run_without_a_snapshot_gives_way(self, folder, config):
        folder.log({"step": 0})
        other = replace(config, seed=3)
        folder.open(other, "beef")
        folder.open(other, "beef")
        settings = json.loads((folder.path / "train.json").read_text())
        assert (settings["seed"], settings["fingerprint"]) == (3, "beef")

    def test_never_replaces_what_is_no_run(self, config, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "chapter1.txt").write_text("years of work")
        for resume in ("auto", "never"):
            with pytest.raises(CheckpointError, match="out exists and is not a training run"):
                RunFolder(config.out).open(replace(config, resume=resume), "f00d")
        assert content(tmp_path) == {"out/chapter1.txt": "years of work"}

    @pytest.mark.parametrize("finished", [False, True])
    def test_replaces_a_run_where_asked_to(self, begun, config, finished):
        folder = begun
        if finished:
            (folder.path / METADATA_FILE).write_text('{"version": 1}')
        assert folder.is_finished is finished
        with pytest.raises(CheckpointError):
            folder.open(replace(config, seed=5), "beef")
        folder.open(replace(config, seed=5, resume="never"), "beef")
        assert names(folder.path) == ["train.json"]
        assert not folder.is_finished
        folder.open(replace(config, seed=5), "beef")

    @pytest.mark.parametrize("inside", [".", "sub/folder"])
    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_never_holds_what_the_run_reads(self, folder, config, inside, resume):
        source = folder.path / inside
        source.mkdir(parents=True, exist_ok=True)
        (source / "config.json").write_text("{}")
        before = content(folder.path)
        for reads in ({"model": str(source)}, {"optimizer": {"teacher": str(source)}}):
            with pytest.raises(
                CheckpointError, match=r"OUT is .* itself, which this run reads|holds a file that this run reads"
            ):
                folder.open(changed(config, {**reads, "resume": resume}), "f00d")
        assert content(folder.path) == before

    def test_another_process_that_trains_there_is_named(self, config, folder):
        folder.close()
        for resume in ("auto", "never"):
            with (
                writer_inside(folder.path) as process,
                pytest.raises(CheckpointError, match=rf"out is being written by process {process.pid} on"),
            ):
                folder.open(replace(config, resume=resume), "f00d")
        assert names(folder.path) == ["train.json"]
        folder.open(config, "f00d")

    def test_says_what_it_deletes(self, begun, config, capsys):
        (begun.path / "routers").mkdir()
        begun.open(replace(config, resume="never"), "f00d")
        said = "note: --resume never deletes in {}: checkpoints, metrics.jsonl, routers, train.json\n"
        assert capsys.readouterr().err == said.format(begun.path)

    def test_snapshots_that_cannot_be_read_are_no_new_beginning(self, begun, config):
        (begun.snapshots / "step-00000001" / "state.json").write_text('{"vers')
        before = content(begun.path)
        with pytest.raises(CheckpointError, match=r"no snapshot can be read; .*step-00000001: state.json cannot"):
            begun.open(config, "f00d")
        assert content(begun.path) == before
        begun.open(replace(config, resume="never"), "f00d")
        assert names(begun.path) == ["train.json"]

    def test_a_trained_model_that_is_not_whole_is_written_again(self, begun, config, llama):
        begun.finish(llama, None, None)
        assert begun.is_finished
        (begun.path / "config.json").unlink()
        assert not begun.is_finished

    def test_garbled_settings(self, folder, config):
        (folder.path / "train.json").write_text('{"version": 1, "se')
        with pytest.raises(CheckpointError, match=r"cannot read .*train.json.*Name another folder, or remove this one"):
            folder.open(config, "f00d")

    def test_a_folder_that_cannot_be_made(self, config, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"file/out"):
            RunFolder(tmp_path / "file" / "out").open(config, "f00d")


class TestMetrics:
    def test_lines_in_order(self, folder):
        for step in range(3):
            folder.log({"step": step, "loss": step / 3})
        assert folder.metrics() == [{"step": step, "loss": step / 3} for step in range(3)]
        assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 3

    def test_none_yet(self, folder):
        assert folder.metrics() == []
        folder.forget_after(2)
        assert names(folder.path) == ["train.json"]

    @pytest.mark.parametrize("step", [-1, 0, 2, 5])
    def test_forgets_later_steps_and_what_was_cut_short(self, folder, step):
        for number in range(5):
            folder.log({"step": number})
        file = folder.path / "metrics.jsonl"
        file.write_text(file.read_text() + '{"step": 2, "vis')
        folder.forget_after(step)
        expected = [{"step": number} for number in range(5) if number <= step]
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected
        folder.log({"step": step + 1})
        assert folder.metrics() == [*expected, {"step": step + 1}]

    def test_reads_past_a_line_that_was_cut_short(self, folder):
        (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n[1]\n"x"\n{"step": 2}\n')
        assert folder.metrics() == [{"step": 1}, {"step": 2}]

    def test_counts_a_line_once(self, folder):
        for record in ({"step": 1, "loss": 3}, {"step": 1, "held_out": {}}, {"step": 1, "loss": 2}):
            folder.log(record)
        assert folder.metrics() == [{"step": 1, "loss": 2}, {"step": 1, "held_out": {}}]

    def test_a_full_disk(self, folder):
        with files_of_at_most(1000), pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl"):
            folder.log({"step": 1, "text": "x" * 2000})


class TestFinish:
    @pytest.mark.parametrize("sensitive", [False, True])
    def test_puts_the_model_there_and_removes_the_snapshots(self, folder, llama, sensitive):
        (folder.snapshots / "step-00000001").mkdir(parents=True)
        (folder.path / ".final").mkdir()
        (folder.path / ".final" / "left").write_text("by a run that was killed")
        folder.log({"step": 1})
        sensitivity = even_sensitivity(llama) if sensitive else None
        folder.finish(llama, None, sensitivity)
        assert folder.is_finished
        files = {"config.json", "model.safetensors", "flextron.json", "metrics.jsonl", "train.json"}
        assert files <= set(names(folder.path)) <= {*files, "generation_config.json", "sensitivity.json"}
        assert Sensitivity.is_in(folder.path) is sensitive
        loaded, tokens = ElasticModel.from_pretrained(folder.path), tiny.token_ids()
        assert torch.equal(tiny.logits_of(loaded, tokens), tiny.logits_of(llama, tokens))

    def test_takes_other_weights_than_the_models_own(self, folder, llama):
        weights = {name: weight * 2 for name, weight in llama.lm.state_dict().items()}
        folder.finish(llama, weights, None)
        found = ElasticModel.from_pretrained(folder.path).lm.state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())

    def test_writes_the_type_of_those_weights(self, folder, llama):
        """The given weights are saved, not the model's own, which are fp32 during training."""
        folder.finish(llama, {name: weight.bfloat16() for name, weight in llama.lm.state_dict().items()}, None)
        assert json.loads((folder.path / "config.json").read_text())["dtype"] == "bfloat16"
        assert ElasticModel.from_pretrained(folder.path).dtype == torch.bfloat16

    def test_a_full_disk_leaves_the_snapshots(self, folder, llama):
        (folder.snapshots / "step-00000001").mkdir(parents=True)
        before = names(folder.path)
        with pytest.raises(CheckpointError, match="cannot write"), files_of_at_most(10_000):
            folder.finish(llama, None, None)
        assert names(folder.path) == before
        assert not folder.is_finished


class TestFingerprint:
    def test_the_same_for_the_same_weights(self, llama, plain_llama):
        assert llama.fingerprint() == ElasticModel(tiny.plain_model("llama")).fingerprint()

    @pytest.mark.parametrize("layer", [0, -1])
    @pytest.mark.parametrize("axis", ["mlp", "attention"])
    def test_another_for_other_weights(self, llama, layer, axis):
        """A fingerprint is made of signs, and this noise changes few: with a seed, at least four."""
        before = llama.fingerprint()
        with torch.no_grad():
            weight = getattr(llama.layers[layer], axis).closes.weight
            weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        assert llama.fingerprint() != before

    def test_the_type_of_the_weights_does_not_matter(self, llama):
        before = llama.fingerprint()
        llama.lm.bfloat16()
        assert llama.fingerprint() == before

    def test_the_subnet_in_use_does_not_matter(self, llama):
        before = llama.fingerprint()
        with llama.use(llama.search_space.smallest):
            assert llama.fingerprint() == before
