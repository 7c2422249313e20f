"""A run resumed from a snapshot continues as if it had never stopped, whatever stopped it."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from snapshot_worker import Run

import tiny
from flextron.errors import CheckpointError
from flextron.training import snapshot
from flextron.training.snapshot import latest_snapshot, load_snapshot, save_snapshot
from folders import files_of_at_most, names

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.fixture
def saved(tmp_path):
    """A snapshot of step 2."""
    return Run().train(2).save(tmp_path / "runs")


class TestTakenUp:
    @pytest.mark.parametrize("muon", [False, True])
    def test_goes_on_to_the_bit(self, tmp_path, muon):
        run = Run(muon=muon).train(2)
        folder = run.save(tmp_path / "runs")
        assert folder == tmp_path / "runs" / "step-00000002"
        loaded = Run(muon=muon).load(folder)
        assert_equal(loaded.tensors(), run.tensors())
        assert_equal(loaded.train(3).tensors(), run.train(3).tensors())

    def test_an_elastic_model_with_frozen_embeddings(self, llama, tmp_path):
        llama.lm.get_input_embeddings().requires_grad_(False)
        tokens, subnet = tiny.token_ids(), tiny.random_subnet(llama.search_space, seed=1)

        def train(model, optimizer):
            for _ in range(2):
                with model.use(subnet):
                    model(tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        def optimizer_of(model):
            return torch.optim.AdamW([weight for weight in model.lm.parameters() if weight.requires_grad])

        other, optimizer = copy.deepcopy(llama), optimizer_of(llama)
        train(llama, optimizer)
        folder = save_snapshot(tmp_path, step=2, model=llama.lm, optimizers=[optimizer], state={}, keep_last=1)
        assert not any("embed" in name for name in stored(folder))
        optimizers = [optimizer_of(other)]
        load_snapshot(folder, model=other.lm, optimizers=optimizers)
        train(llama, optimizer)
        train(other, optimizers[0])
        assert_equal(other.lm.state_dict(), llama.lm.state_dict())

    def test_back_to_an_earlier_step(self, tmp_path):
        """Earlier optimizer states are dropped; before the first step there are none."""
        run = Run()
        first = run.save(tmp_path)
        before = run.tensors()
        assert_equal(run.train(2).load(first).tensors(), before)

    def test_weights_of_any_layout_and_type(self, tmp_path):
        run, other = Run(), Run()
        for each in (run, other):
            each.model.transposed = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
            each.model.small = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16) / 3)
            each.model.number = torch.nn.Parameter(torch.tensor(1.5))
        with torch.no_grad():
            for weight in (run.model.transposed, run.model.small, run.model.number):
                weight.mul_(-2)
        assert_equal(other.load(run.save(tmp_path)).tensors(), run.tensors())
        assert not other.model.transposed.is_contiguous()

    def test_more_than_one_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(snapshot, "_FILE_BYTES", 300)
        run = Run().train(1)
        folder = run.save(tmp_path)
        assert len(list(folder.glob("*.safetensors"))) > 3
        assert_equal(Run().load(folder).tensors(), run.tensors())

    def test_what_is_stored(self, saved):
        found = stored(saved)
        assert "model.0.weight" not in found  # frozen
        assert "model.3.weight" not in found  # tied to 1.weight
        assert not any("unused" in name for name in found if name.startswith("optimizer"))
        assert {name for name in found if "1.weight" in name} == {
            "model.1.weight",
            *(f"optimizer.0.1.weight.{key}" for key in ("step", "exp_avg", "exp_avg_sq")),
        }
        assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
        record = json.loads((saved / "state.json").read_text())
        assert (record["version"], record["step"], record["optimizers"]) == (1, 2, ["AdamW", "AdamW"])
        with safe_open(saved / next(iter(record["files"])), "pt") as file:
            assert set(file.keys()) == found.keys()


class TestFolders:
    def test_keeps_the_newest(self, tmp_path):
        run = Run()
        for kept in (["step-00000001"], ["step-00000001", "step-00000002"], ["step-00000002", "step-00000003"]):
            run.train(1).save(tmp_path, keep_last=2)
            assert names(tmp_path) == kept
        assert latest_snapshot(tmp_path) == tmp_path / "step-00000003"
        run.step = 100_000_000
        run.save(tmp_path, keep_last=1)
        assert names(tmp_path) == ["step-100000000"]

    def test_the_latest_is_a_complete_one(self, saved):
        runs = saved.parent
        for name in ("step-00000007", ".step-00000009.partial"):
            shutil.copytree(saved, runs / name)
        (runs / "step-00000007" / "state.json").write_text('{"version": 1, "st')
        (runs / "step-00000008").mkdir()
        (runs / "step-last").mkdir()
        told: list[str] = []
        assert latest_snapshot(runs, warn=told.append) == saved
        (said,) = told
        assert said.startswith(f"warning: {runs / 'step-00000008'}: state.json cannot be read (")
        assert said.endswith("). Going on from the older step-00000002.")
        run = Run().load(saved).train(6)
        assert run.save(runs) == runs / "step-00000008"  # what was incomplete there, or left by a killed run, is gone
        assert names(runs) == ["step-00000002", "step-00000007", "step-00000008", "step-last"]
        assert_equal(Run().load(runs / "step-00000008").tensors(), run.tensors())

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 2}'])
    def test_none_that_can_be_read_is_no_new_beginning(self, saved, text):
        (saved / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"no snapshot can be read; .*step-00000002: state\.json"):
            latest_snapshot(saved.parent)

    def test_no_snapshot(self, tmp_path):
        assert latest_snapshot(tmp_path) is None
        assert latest_snapshot(tmp_path / "gone") is None

    @pytest.mark.parametrize("step", [1, 2])
    def test_never_replaces_a_complete_one(self, saved, step):
        run = Run()
        run.step = step
        before = saved.stat().st_mtime_ns
        message = rf"cannot write .*step-0000000{step}: .*step-00000002 is not older\. Resume from it"
        with pytest.raises(CheckpointError, match=message):
            run.save(saved.parent)
        assert names(saved.parent) == [saved.name]
        assert saved.stat().st_mtime_ns == before


def test_at_no_moment_without_a_complete_snapshot(tmp_path, monkeypatch):
    """Check the folder before each change of the disk, except for new hidden files."""
    run = Run().train(1)
    run.save(tmp_path, keep_last=1)
    expected = {1: run.tensors(), 2: run.train(1).tensors()}
    seen = []

    def watched(work):
        def look_then_work(*args, **kwargs):
            found = Run().load(latest_snapshot(tmp_path))
            assert_equal(found.tensors(), expected[found.step])
            seen.append(found.step)
            return work(*args, **kwargs)

        return look_then_work

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    run.save(tmp_path, keep_last=1)
    assert names(tmp_path) == ["step-00000002"]
    assert seen == sorted(seen)
    assert seen.count(1) >= 4
    assert seen.count(2) >= 3


SAVE_AND_WAIT = """
import sys, time
sys.argv[0] = "flextron"  # as on the command line: `import flextron` leaves transformers out
from pathlib import Path
from flextron.training import snapshot
from snapshot_worker import Run

run = Run().train(2)
run.save(Path(sys.argv[1]))

def wait(*_):
    print("writing", flush=True)
    time.sleep(60)

snapshot._checksums = wait
run.train(2).save(Path(sys.argv[1]), keep_last=1)
"""


def test_killed_while_writing(tmp_path):
    command = [sys.executable, "-c", SAVE_AND_WAIT, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".step-00000004.partial", "step-00000002"]
    assert list((tmp_path / ".step-00000004.partial").glob("*.safetensors"))
    run = Run().load(latest_snapshot(tmp_path)).train(2)
    assert_equal(run.tensors(), Run().train(4).tensors())
    run.save(tmp_path)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


class TestFailedWrites:
    @pytest.fixture
    def run(self, saved):
        return Run().load(saved).train(1)

    @pytest.fixture(autouse=True)
    def nothing_changes(self, saved):
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        yield
        assert names(saved.parent) == [saved.name]
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    def test_a_write_that_the_system_refuses(self, run, saved):
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*step-00000003: .*File too large"),
            files_of_at_most(1_000),
        ):
            run.save(saved.parent, keep_last=1)

    @pytest.mark.parametrize("name", ["write_text", "_sync", "_checksums"])
    def test_a_failure_after_the_tensors(self, run, saved, monkeypatch, name):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(snapshot, name, full)
        with pytest.raises(CheckpointError, match=r"cannot write .*step-00000003: .*No space left on device"):
            run.save(saved.parent, keep_last=1)

    def test_ctrl_c(self, run, saved, monkeypatch):
        """DCP wraps Ctrl-C as if it were a failure."""

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("safetensors.torch.save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save(saved.parent, keep_last=1)

    def test_a_state_that_is_not_json(self, run, saved):
        with pytest.raises(TypeError, match="set is not JSON serializable"):
            save_snapshot(
                saved.parent, step=3, model=run.model, optimizers=run.optimizers, state={"a": {1}}, keep_last=1
            )

    def test_keeping_none(self, run, saved):
        with pytest.raises(
            ValueError, match=r"keep_last is 0, but the newest snapshot is always kept\. Pass 1 or more"
        ):
            run.save(saved.parent, keep_last=0)

    def test_optimizers_that_do_not_fit(self, run, saved):
        run.optimizers[0].state[run.model[1].weight]["count"] = 3
        with pytest.raises(
            TypeError, match=r"'optimizer\.0\.1\.weight\.count' has the type int, .* only tensors\. Use AdamW"
        ):
            run.save(saved.parent)
        run.optimizers.append(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
        with pytest.raises(ValueError, match="AdamW trains 1 parameters that the model does not have"):
            run.save(saved.parent)


def test_an_old_one_that_cannot_be_deleted(saved, monkeypatch):
    rename = Path.rename

    def refused(self, to):
        if self == saved:
            raise PermissionError(13, "Permission denied")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match=r"step-00000003 is written, but older .* cannot be deleted: .*denied"):
        Run().train(3).save(saved.parent, keep_last=1)
    assert latest_snapshot(saved.parent).name == "step-00000003"


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def state_file(text: str):
    return lambda path: path.with_name("state.json").write_text(text)


DAMAGE = {
    r"shard-.* has 100 of \d+ bytes\. Delete the snapshot to resume from an earlier one": lambda path: os.truncate(
        path, 100
    ),
    r"shard-.* is damaged: its CRC-32 checksum differs": flip,
    r"shard-.* is missing": Path.unlink,
    r"shard-more does not belong there": lambda path: shutil.copy(path, path.with_name("shard-more")),
    r"state.json cannot be read \(.*No such file.*\)": lambda path: path.with_name("state.json").unlink(),
    r"state.json cannot be read \(.*No such .*": lambda path: shutil.rmtree(path.parent),
    r"state.json cannot be read \(Unterminated string": state_file('{"version": 1, "st'),
    r"state.json does not describe a snapshot": state_file("[]"),
    r"it has version 2; this flextron reads 1\. Update": state_file('{"version": 2}'),
}


class TestFailedLoads:
    @pytest.fixture
    def other(self):
        """A run that must not change."""
        run = Run().train(1)
        before = run.tensors()
        yield run
        after = run.tensors()
        assert_equal({name: after[name] for name in before}, before)

    @pytest.mark.parametrize("problem", DAMAGE)
    def test_damaged(self, saved, other, problem):
        DAMAGE[problem](next(saved.glob("*.safetensors")))
        with pytest.raises(CheckpointError, match=f"cannot load {saved}: {problem}"):
            other.load(saved)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (
                lambda model: setattr(model, "new", torch.nn.Parameter(torch.ones(2))),
                r"'model\.new' is trainable, but missing from the snapshot",
            ),
            (
                lambda model: model.unused.requires_grad_(False),
                r"'model\.unused' is in the snapshot, but not trainable",
            ),
            (
                lambda model: setattr(model, "unused", torch.nn.Parameter(torch.ones(5))),
                r"'model\.unused' is \(4,\) in the snapshot, \(5,\) in the model",
            ),
            (
                lambda model: setattr(model, "unused", torch.nn.Parameter(torch.ones(4).bfloat16())),
                r"'model\.unused' is torch.float32 in the snapshot, torch.bfloat16 in the model",
            ),
        ],
    )
    def test_another_model(self, saved, change, problem):
        run = Run()
        change(run.model)
        message = (
            f"cannot load {saved}: it belongs to another model: {problem}. Pass the model and optimizers of that run"
        )
        with pytest.raises(CheckpointError, match=message):
            run.load(saved)

    def test_other_optimizers(self, saved, other):
        with pytest.raises(
            CheckpointError,
            match=r"to the optimizers \['AdamW', 'AdamW'\], not \['Muon', 'AdamW'\]\. Build those",
        ):
            Run(muon=True).load(saved)
        with pytest.raises(
            CheckpointError,
            match=r"'optimizer\.\d\..*' is in the snapshot, but optimizer \d does not train '.*'\.",
        ):
            load_snapshot(saved, model=other.model, optimizers=other.optimizers[::-1])


ONE_OF_TWO = """
import sys
from pathlib import Path
sys.argv[0] = "flextron"
from snapshot_worker import main
main(int(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder and gathered tensors of a job of two processes."""
    folder = tmp_path_factory.mktemp("two")
    torch.set_num_threads(1)
    Run().train(2).save(folder / "one")
    shutil.copytree(folder / "one", folder / "garbled")
    flip(next((folder / "garbled").rglob("*.safetensors")))
    command = [sys.executable, "-c", ONE_OF_TWO]
    ranks = [
        subprocess.Popen([*command, str(rank), folder], stderr=subprocess.PIPE, env=ENVIRONMENT) for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder, load_file(folder / "results.safetensors")


def part(results: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}: "): value for key, value in results.items() if key.startswith(f"{name}: ")}


class TestTwoProcesses:
    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_saved_by_two_and_loaded_by_one(self, two, kind):
        folder, results = two
        run = Run(muon=kind == "muon").load(folder / kind / "step-00000002")
        assert_equal(run.tensors(), part(results, kind))

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_saved_and_loaded_by_two(self, two, kind):
        _, results = two
        assert_equal(part(results, f"{kind} saved"), part(results, kind))
        assert_equal(part(results, f"{kind} loaded"), part(results, kind))

    def test_goes_on_as_one_process_from_the_start(self, two):
        folder, results = two
        expected = Run().train(4).tensors()
        by_one = Run().load(folder / "adamw" / "step-00000002").train(2).tensors()
        for found in (by_one, part(results, "from one"), part(results, "adamw continued")):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)

    def test_each_wrote_its_shards(self, two):
        folder, _ = two
        files = sorted((folder / "adamw" / "step-00000002").glob("*.safetensors"))
        shards = [load_file(path) for path in files]
        assert [path.name[:11] for path in files] == ["shard-00001", "shard-00002"]
        assert [shard["model.1.weight"].shape[0] for shard in shards] == [4, 4]
        assert [shard["model.4.weight"].shape[0] for shard in shards] == [2, 1]

    def test_a_failure_of_one_is_an_error_of_all(self, two):
        folder, _ = two
        problems = [(folder / f"problems-{rank}").read_text().splitlines() for rank in range(2)]
        assert problems[0] == problems[1]
        full, old, garbled = problems[0]
        assert "step-00000003: rank 1: [Errno 27] File too large" in full
        assert names(folder / "muon") == ["step-00000002"]
        assert "step-00000002: rank 0: " in old
        assert "is not older" in old
        damaged = "shard-00001-model-00001-of-00001.safetensors is damaged: its CRC-32 checksum differs"
        assert f"step-00000002: rank 0: {damaged}" in garbled
