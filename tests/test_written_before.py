"""Files that version 0.1.0 wrote before its source moved into folders still load, and give what they gave then."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flextron import ElasticModel, Subnet, TrainConfig, route
from flextron.config import OptimizerOptions, TextOptions, VisitOptions, WatchOptions
from flextron.ranking.sensitivity import Sensitivity
from flextron.routers.static.pairs import Pairs
from flextron.routers.token.making import load_token_router
from flextron.training import run as training
from flextron.training.folder import RunFolder

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def written():
    return ElasticModel.from_pretrained(WRITTEN / "elastic", dtype="float32")


@pytest.mark.parametrize("budget", EXPECTED)
def test_checkpoint_table_and_router_give_the_same_answer(written, budget):
    subnet = route(written, budget, any_device=True).subnet
    assert subnet == Subnet.from_json(json.dumps(EXPECTED[budget]["subnet"]))
    with written.use(subnet), torch.no_grad():
        logits = written(torch.arange(1, 17)[None]).logits[0, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED[budget]["logits"]), rtol=1e-4, atol=1e-5)


def test_a_subnet_file(written):
    written.search_space.check(Subnet.load(WRITTEN / "subnet.json"))


def test_ranking_and_sensitivities(written):
    assert (written.ranking.score, written.ranking.tokens) == ("reconstruction", 1024)
    assert Sensitivity.load(WRITTEN / "elastic").tokens == 255


def test_a_token_router(written):
    router, about = load_token_router(WRITTEN / "elastic", "tpot", written)
    assert about.tokens == 6144
    assert len(router.budgets_C) == 8


def test_measured_pairs(tmp_path):
    (kept,) = (WRITTEN / "elastic" / "routers").glob("pairs-*.jsonl")
    file = shutil.copy(kept, tmp_path)
    header = json.loads(Path(file).read_text().splitlines()[0])
    assert len(Pairs(file, {key: value for key, value in header.items() if key != "version"})) > 100


def test_a_stopped_training_run_goes_on(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    steps = len(RunFolder(Path("run")).metrics())
    config = TrainConfig(
        "elastic",
        Path("run"),
        text=TextOptions(data=("text.txt",), tokens=1048576, block_tokens=32),
        visit=VisitOptions(visits_per_step=1),
        optimizer=OptimizerOptions(lora_rank=1),
        watch=WatchOptions(evaluate_tokens=0, save_minutes=60),
    )

    def stop(run):
        assert run.step == steps
        raise KeyboardInterrupt

    monkeypatch.setattr(training.TrainingRun, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(config)
    assert len(RunFolder(Path("run")).metrics()) == steps
