"""What README.md and the pages of docs/ show runs as it stands, with a tiny checkpoint in place of the real one."""

import lzma
import re
import shlex
import shutil
from pathlib import Path

import pytest

import flextron
import tiny
from flextron import cli
from flextron.model import ElasticModel
from flextron.routers.static import learning, surrogate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
VERBS = {
    "README.md": ["rank", "train", "measure-latency", "train-router", "generate", "export"],
    "docs/install.md": ["env"],
    "docs/rank.md": ["rank"],
    "docs/training.md": ["train", "evaluate"],
    "docs/budgets.md": ["route", "route"],
    "docs/routing.md": ["measure-latency", "train-router", "route", "evaluate"],
    "docs/per_token.md": ["train-router", "evaluate", "generate"],
    "docs/evaluate.md": ["evaluate", "evaluate"],
    "docs/generate.md": ["generate", "generate", "quantize", "generate", "generate"],
    "docs/deploy.md": ["export", "export", "measure-latency", "export"],
}
"""The commands of each page."""
ELSEWHERE = re.compile(r"smollm2-elastic|out/quickstart|llama-[78]b")
"""Commands that these tests do not run: real models have tests of their own."""
SIZES = {
    "rank": "--tokens 512 --refit-tokens 512 --sensitivity-tokens 256",
    "train": "--tokens 512 --block-tokens 64 --evaluate-tokens 128",
    "measure-latency": "--tokens 16 --rounds 1",
    "train-router": "--evaluations 160 --tokens 256 --token-tokens 6144",
    "evaluate": "--tokens 128 --block-tokens 64",
    "generate": "--max-new-tokens 8",
    "quantize": "--tokens 512",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model deep enough that its layers take most of a token's time, so that 0.6x can be met."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    lm = tiny.plain_model("llama", vocab_size=300, num_hidden_layers=24, hidden_size=192)
    ElasticModel(lm, tiny.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(checkpoint, tmp_path_factory):
    """A folder where the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(learning, "LARGEST_ERROR", 10)  # losses of a random model hardly depend on its widths
        patch.setattr(learning, "_orders", lambda _: True)
        patch.setattr(learning, "STEPS", 20)
        patch.setattr(surrogate, "STEPS", 20)
        run_commands("README.md", checkpoint)
        yield folder


@pytest.fixture
def work(done, tmp_path, monkeypatch):
    """A copy of that folder to work in, with the texts that pages name."""
    shutil.copytree(done / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Once upon a time there was a very small model. " * 40)
    with lzma.open("corpus.jsonl.xz", "wt") as file:
        file.write('{"text": "Once upon a time there was a very small model."}\n' * 40)
    return tmp_path


def blocks_of(page, language):
    text = (ROOT / page).read_text(encoding="utf8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands_of(page):
    found = re.findall(r"^flextron (.*)$", "\n".join(blocks_of(page, r"\w*")), flags=re.MULTILINE)
    commands = [shlex.split(command, comments=True) for command in found]
    return [words for words in commands if not ELSEWHERE.search(" ".join(words))]


def run_commands(page, checkpoint):
    commands = commands_of(page)
    assert [words[0] for words in commands] == VERBS[page]
    for words in commands:
        if words[0] in ("rank", "train"):
            shutil.rmtree(words[2], ignore_errors=True)
        small = {"HuggingFaceTB/SmolLM2-135M-Instruct": str(checkpoint), "neurons=768": "neurons=20"}
        sizes = SIZES.get(words[0], "").split()
        assert cli.main([*(small.get(word, word) for word in words), *sizes]) == 0, words


def run_code(page, change=str):
    names = {}
    for code in blocks_of(page, "python"):
        exec(change(code), names)  # noqa: S102
    return names


def test_code_of_the_readme(work, capsys):
    run_code("README.md")
    assert (work / "out/fast/config.json").exists()
    assert capsys.readouterr().out


@pytest.mark.real
def test_the_trained_model_of_the_readme(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path))
    found = re.findall(
        r"^flextron (generate +smollm2-elastic .*)$", "\n".join(blocks_of("README.md", "sh")), re.MULTILINE
    )
    (command,) = found
    assert cli.main([*shlex.split(command, comments=True), "--max-new-tokens", "8"]) == 0
    assert len(capsys.readouterr().out.split()) > 4


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page == "docs/per_token.md" else page
        for page in VERBS
        if page not in ("README.md", "docs/deploy.md")
    ],
)
def test_pages(page, work, checkpoint, capsys):
    run_commands(page, checkpoint)
    assert capsys.readouterr().out
    names = run_code(page)
    assert "draft" not in names or names["draft"].written


@pytest.mark.slow
def test_deploying(checkpoint, tmp_path, monkeypatch, capsys):
    """With equal widths of a tiny checkpoint, whose rows no quantisation fits."""
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "out/trained")
    small = {"--budget": "--subnet", "0.8x": "neurons=24", "60%": "neurons=24", "q8_0": "f16"}
    commands = commands_of("docs/deploy.md")
    assert [words[0] for words in commands] == VERBS["docs/deploy.md"]
    for words in commands:
        sizes = SIZES.get(words[0], "").split()
        assert cli.main([*(small.get(word, word) for word in words), *sizes]) == 0, words
    names = run_code("docs/deploy.md", lambda code: code.replace("60%", "neurons=24").replace("out/fast", "out/again"))
    assert names["answer"]["choices"][0]["finish_reason"] in ("length", "stop")


def test_every_page_with_commands_is_run():
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")]
    assert {page for page in pages if commands_of(page)} - set(VERBS) == {
        "docs/tasks.md",  # needs lm-eval's data; tests/tasks runs it
        "docs/serving.md",  # serves without end; tests/serving runs it
        "docs/packs.md",  # needs a trained model and its base; tests/exporting/test_pack.py runs them
    }


def test_the_reference_has_every_public_name():
    shown = " ".join(blocks_of("docs/reference.md", r"\{api\}")).split()
    assert sorted(shown) == sorted(flextron.__all__)


def test_the_architecture_names_what_is_there():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf8")
    named = re.findall(r"^[├└]── (\w+(?:\.py)?)", page, flags=re.MULTILINE)
    inner = re.findall(r"^│   [├└]── (\w+(?:\.py|/))", page, flags=re.MULTILINE)
    source = ROOT / "src/flextron"
    assert sorted(named) == sorted(
        path.name for path in source.iterdir() if path.name not in ("py.typed", "__pycache__")
    )
    assert [name for name in inner if not list(source.glob(f"*/{name}"))] == []


def test_the_picture_finds_its_figures():
    import readme_picture

    page = (ROOT / "docs/results.md").read_text(encoding="utf8")
    assert len(readme_picture.draw(page).axes[0].get_legend().get_texts()) == len(readme_picture.LINES)
    assert re.search(r"pack of [\d,]{9,} training tokens", readme_picture.caption(page))
    with pytest.raises(ValueError, match=r"is this docs/results\.md\?"):
        readme_picture.draw("another page")


def test_decisions_open_with_context_decision_and_cost():
    for page in (ROOT / "docs/decisions").glob("0*.md"):
        opening = page.read_text(encoding="utf8").split("\n\n")[1]
        assert re.findall(r"^- \*\*(\w+):\*\* .+", opening, re.MULTILINE) == ["Context", "Decision", "Cost"], page


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf8")):
            assert (page.parent / target).exists(), f"{page}: {target}"
