"""The trained model that comes with flextron, by its name."""

import pytest

from flextron import cli
from flextron.elastic.smollm2 import ELASTIC, elastic_smollm2
from flextron.elastic.source import PACK


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path))
    return tmp_path


def test_the_pack_is_copied_once_and_keeps_what_is_measured(cache):
    folder = elastic_smollm2()
    assert folder.is_relative_to(cache)
    assert folder.name == ELASTIC
    (folder / "latency").mkdir()
    assert elastic_smollm2() == folder
    assert (folder / "latency").is_dir()


def test_a_cache_that_cannot_be_written_is_one_line(cache, monkeypatch, capsys):
    (cache / "file").touch()
    monkeypatch.setenv("FLEXTRON_CACHE", str(cache / "file"))
    assert cli.main(["generate", ELASTIC, "Hello"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write ")


@pytest.mark.real
def test_it_generates_at_a_share(cache, capsys):
    assert cli.main(["generate", ELASTIC, "The capital of France is", "--subnet", "80%", "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.split()) >= 2
    assert (elastic_smollm2() / PACK).is_file()
