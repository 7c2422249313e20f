"""The wheel, installed away from the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of a virtual environment with the wheel; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source), cwd=folder)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", str(python), "install", "--no-deps", str(*folder.glob("*.whl")), cwd=folder)
    paths = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(paths) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_commands_run_from_an_empty_folder(installed, tmp_path):
    flextron = str(installed / "venv" / "bin" / "flextron")
    assert "quickstart" in run(flextron, "--help", cwd=tmp_path)
    assert "--thorough" in run(flextron, "quickstart", "--help", cwd=tmp_path)
    assert "flextron 0" in run(flextron, "env", cwd=tmp_path)


def test_it_holds_texts_tasks_and_types(installed, tmp_path):
    code = "import flextron, pathlib; print(pathlib.Path(flextron.__file__).parent)"
    package = Path(run(str(installed / "venv" / "bin" / "python"), "-c", code, cwd=tmp_path).strip())
    assert package.is_relative_to(installed / "venv")
    assert (package / "py.typed").is_file()
    assert sorted(path.name for path in package.glob("sample/*.xz")) == ["train.jsonl.xz", "validation.jsonl.xz"]
    for source in (ROOT / "src" / "flextron").rglob("*"):
        if source.is_file() and "__pycache__" not in source.parts:
            assert (package / source.relative_to(ROOT / "src" / "flextron")).is_file(), source


def test_its_metadata_is_whole(installed):
    about = PathDistribution(next((installed / "venv").rglob("flextron-*.dist-info"))).metadata
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Author"]
    assert about["Keywords"]
    assert any("Programming Language :: Python :: 3" in value for value in about.get_all("Classifier"))
    assert about.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2406.10260"]
    assert "smollm2" in about.get_all("Provides-Extra")
