"""What README.md shows runs as it stands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from flextron import cli
from flextron.routers.static import learning as training
from flextron.routers.static import surrogate

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf8")


def test_commands_and_code(checkpoint, tmp_path, monkeypatch, capsys):
    """With a tiny checkpoint where the README has the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "LARGEST_ERROR", 10)  # losses of a random model hardly depend on its widths
    monkeypatch.setattr(training, "LOWEST_RANK", -1)
    monkeypatch.setattr(training, "STEPS", 20)
    monkeypatch.setattr(surrogate, "STEPS", 20)
    commands = re.findall(r"^flextron (.*)$", README, flags=re.MULTILINE)
    verbs = [
        "rank",
        "train",
        "measure-latency",
        "train-router",
        "route",
        "train-router",
        "evaluate",
        "evaluate",
        "generate",
        "generate",
        "export",
        "export",
    ]
    assert [command.split()[0] for command in commands] == verbs
    for command in commands:
        words = re.sub(r"\s+#.*", "", command).replace("neurons=768", "neurons=20")
        words = words.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(checkpoint))
        arguments = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', words)]
        sizes = {"rank": ["--tokens", "512", "--sensitivity-tokens", "256"], "evaluate": ["--tokens", "512"]}
        sizes |= {
            "measure-latency": ["--tokens", "32"],
            "train-router": ["--evaluations", "160", "--tokens", "512", "--token-tokens", "6144"],
        }
        sizes["train"] = ["--tokens", "1024", "--block-tokens", "64", "--evaluate-tokens", "256"]
        assert cli.main([*arguments, *sizes.get(arguments[0], [])]) == 0, command
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(code.replace("out/smollm2-fast", "out/smollm2-again"), {})  # noqa: S102
    assert (tmp_path / "out/smollm2-again/config.json").exists()
    assert capsys.readouterr().out


def test_deploying(checkpoint, tmp_path, monkeypatch, capsys):
    """With equal widths of a tiny checkpoint, whose rows no quantisation fits."""
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf8")
    commands = re.findall(r"^flextron (.*)$", page, flags=re.MULTILINE)
    verbs = ["export", "export", "measure-latency", "export", "generate"]
    assert [command.split()[0] for command in commands] == verbs
    shutil.copytree(checkpoint, "out/trained")
    for command in commands:
        words = shlex.split(_of_tiny(command.replace("--budget 0.6x", "--subnet neurons=24").replace("q8_0", "f16")))
        sizes = ["--tokens", "16", "--rounds", "1"] if words[0] == "measure-latency" else []
        assert cli.main([*words, *sizes]) == 0, command
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(_of_tiny(code).replace("out/fast", "out/again"), names)  # noqa: S102
    assert names["answer"]["choices"][0]["finish_reason"] in ("length", "stop")
    assert names["draft"].written


def _of_tiny(text: str) -> str:
    """Equal widths where the page has shares, for which the tiny checkpoint has no sensitivities."""
    return text.replace("60%", "neurons=24").replace("50%", "neurons=16")


def test_links_lead_somewhere():
    root = Path(__file__).parent.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf8")):
            assert (page.parent / target).exists(), f"{page}: {target}"
