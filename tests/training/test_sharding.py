"""Two processes train like one, and a run can move from two processes to one and back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_worker import (
    OPTIONS,
    STEPS,
    make_checkpoint,
    make_mixture,
    make_packed,
    make_text,
    records,
    run,
    steps_of,
    stopped_in,
    wait_for,
)

import tiny
from flextron.elastic.skeleton import Stored, skeleton
from flextron.model import ElasticModel
from flextron.training.snapshot import latest_snapshot
from folders import names

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Folder with a model, a text, and runs of one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharding")
    make_checkpoint(folder / "model")
    ElasticModel(tiny.plain_model("llama", vocab_size=300), tiny.tokenizer()).save_pretrained(folder / "unranked model")
    make_checkpoint(folder / "bf16 model", dtype=torch.bfloat16)
    make_checkpoint(folder / "tied model", tie_word_embeddings=True)
    make_checkpoint(folder / "renamed model", "gpt_neox")  # its files name the output projection otherwise
    make_mixture(folder / "mixture model")
    make_packed(folder / "pack model", folder / "unranked model", folder / "model")
    make_checkpoint(folder / "damaged model")
    weights = load_file(folder / "damaged model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan  # in the second process's shard
    save_file(weights, folder / "damaged model" / "model.safetensors", metadata={"format": "pt"})
    make_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def two(one) -> Path:
    """The same folder after a job of two processes; this process did part of the work in turn."""
    with stopped_in(2):
        run_one(one, "one two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [*launch, TESTS / "training_worker.py", one],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    try:
        wait_for(lambda: job.poll() is not None or all((one / f"waiting-{rank}").exists() for rank in range(2)))
        if job.poll() is None:
            with stopped_in(4):
                run_one(one, "two one two")
            (one / "go on").touch()
            wait_for(lambda: job.poll() is not None or lines(one / "stopped" / "metrics.jsonl") > 3)
            job.send_signal(signal.SIGINT)
        (one / "output").write_text(job.communicate(timeout=240)[0])
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(240)
    return one


def run_one(folder: Path, name: str, model: str = "model", **options) -> Path:
    return run(folder / model, folder / "text.jsonl", folder / name, **{**OPTIONS, **options})


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_close_runs(found: Path, expected: Path, within: float = 1e-4) -> None:
    """Check that steps, sub-networks, losses and final weights are equal, except for rounding by the order of sums."""
    mine, others = records(found), records(expected)
    assert [record["step"] for record in mine] == [record["step"] for record in others]
    for here, there in zip(steps_of(found), steps_of(expected), strict=True):
        assert here["gradient_norm"] == pytest.approx(there["gradient_norm"], abs=within)
        for visit, like in zip(here["visits"], there["visits"], strict=True):
            assert visit == {
                key: pytest.approx(v, abs=within) if isinstance(v, float) else v for key, v in like.items()
            }
    for here, there in zip(mine, others, strict=True):
        if "held_out" in there:
            assert here["held_out"] == pytest.approx(there["held_out"], abs=within)
    weights, like = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert weights.keys() == like.keys()
    for name, weight in like.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=within, msg=name)
    assert names(found) == names(expected)
    mine, others = (json.loads((folder / "generation_config.json").read_text()) for folder in (found, expected))
    assert mine == others


class TestTwoProcesses:
    def test_train_as_one(self, two):
        assert_close_runs(two / "two", run_one(two, "one"))
        assert json.loads((two / "two" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]

    def test_with_a_trained_head_and_activations_computed_twice(self, two):
        options = {"train_embeddings": True, "text_weight": 0.5}
        assert_close_runs(two / "trained head", run_one(two, "one trained head", **options))

    def test_with_tied_embeddings(self, two):
        expected = run_one(two, "one tied", "tied model", train_embeddings=True)
        assert_close_runs(two / "tied", expected)
        assert "lm_head.weight" not in load_file(two / "tied" / "model.safetensors")

    def test_in_bfloat16(self, two):
        assert_close_runs(two / "bf16", run_one(two, "one bf16", "bf16 model", precision="bf16"), within=0.05)
        assert {weight.dtype for weight in load_file(two / "bf16" / "model.safetensors").values()} == {torch.bfloat16}
        assert json.loads((two / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"

    def test_adapters_with_the_model_as_teacher(self, two):
        assert_close_runs(two / "adapters", run_one(two, "one adapters", lora_rank=2))

    def test_adapters_beside_weights_of_16_bits(self, two):
        expected = run_one(two, "one bf16 adapters", "bf16 model", precision="bf16", lora_rank=2)
        assert_close_runs(two / "bf16 adapters", expected, within=0.05)

    def test_adapters_with_another_teacher(self, two):
        options = {"lora_rank": 2, "teacher": two / "tied model"}
        assert_close_runs(two / "taught", run_one(two, "one taught", **options))

    @pytest.mark.parametrize(("name", "options"), [("renamed", {}), ("mixture", {"smallest": "50%"})])
    def test_from_files_with_other_names_for_the_weights(self, two, name, options):
        """The first process reads them and sends the other one its shards."""
        found = skeleton(str(two / f"{name} model"))
        assert not Stored.of(str(two / f"{name} model")).fits(found.lm)
        assert_close_runs(two / name, run_one(two, f"one {name}", f"{name} model", **options))

    def test_the_changes_of_a_pack(self, two):
        assert_close_runs(two / "pack", run_one(two, "one pack", "pack model", train_pack=True))

    def test_with_the_whole_model_in_each(self, two):
        options = {"train_embeddings": True, "text_weight": 0.5}
        assert_close_runs(two / "replicated", run_one(two, "one like replicated", **options))

    def test_adapters_with_the_whole_model_in_each_after_a_stop(self, two):
        assert_close_runs(two / "replicated adapters", run_one(two, "one with adapters", lora_rank=2))

    @pytest.mark.parametrize("name", ["one two", "two one two"])
    def test_go_on_with_what_other_numbers_of_processes_left(self, two, name):
        assert len(steps_of(two / name)) in (4, STEPS)
        if name == "one two":
            run_one(two, name)
        if not (two / "one").exists():
            run_one(two, "one")
        assert_close_runs(two / name, two / "one")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("uneven", "blocks_per_visit is 3, which 2 processes cannot share evenly. Pass --blocks-per-visit 4"),
            ("damaged", "is damaged: model.layers.1.mlp.up_proj.weight has values that are no numbers"),
            ("no text", "no text at "),  # only the first process reads it
        ],
    )
    def test_refuse_in_all_processes(self, two, name, message):
        errors = [(two / f"{name}-{rank}.error").read_text() for rank in range(2)]
        assert errors[0] == errors[1]
        assert message in errors[0]
        assert not (two / name).exists()

    def test_ctrl_c_loses_nothing(self, two):
        """torchrun passes the signal on, and the processes stop after the same step."""
        output = (two / "output").read_text()
        kept = latest_snapshot(two / "stopped" / "checkpoints")
        assert "ready to be stopped" in output
        assert len(steps_of(two / "stopped")) == int(kept.name[-8:]) >= 3, output
        assert f"stopped after step {int(kept.name[-8:])} of " in output
