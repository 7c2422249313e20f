"""What commands write: never over what they read, one at a time, and refused before any work where it cannot be."""

import shutil

import gguf
import pytest

import tiny
from flextron import cli
from flextron.elastic.source import METADATA_FILE
from folders import files_of_at_most, names, writer, writer_inside


@pytest.fixture
def model(checkpoint, tmp_path):
    """A copy of a checkpoint that is not ranked."""
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture
def rank(model, tmp_path):
    """Run `flextron rank MODEL OUT` with further arguments, on little text."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 20)

    def run(out, *arguments, sensitivity_tokens=0):
        sizes = ["--text", str(text), "--tokens", "512", "--sensitivity-tokens", str(sensitivity_tokens)]
        return cli.main(["rank", str(model), str(out), *sizes, *arguments])

    return run


def refused(capsys, *arguments) -> str:
    """The one line with which a command ends before it loads anything."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


class TestOverwrite:
    def test_tells_what_it_deletes_before_any_work(self, rank, tmp_path, capsys):
        out = tmp_path / "out"
        assert rank(out) == 0
        for name in ("routers", "latency"):
            (out / name).mkdir()
        (out / "my notes.txt").write_text("")
        capsys.readouterr()
        assert rank(out, "--overwrite") == 0
        first, second, *_ = capsys.readouterr().err.splitlines()
        assert first == f"note: --overwrite deletes in {out}: latency, my notes.txt, routers"
        assert second.startswith("loading")
        assert rank(out, "--overwrite") == 0
        assert "note" not in capsys.readouterr().err

    def test_of_an_export(self, model, tmp_path, capsys):
        export = ["export", str(model), str(tmp_path / "small"), "--subnet", "neurons=16"]
        assert cli.main(export) == 0
        (tmp_path / "small" / "prompts.txt").write_text("")
        assert cli.main([*export, "--overwrite"]) == 0
        assert f"note: --overwrite deletes in {tmp_path / 'small'}: prompts.txt\n" in capsys.readouterr().err


class TestOutIsModel:
    @pytest.mark.parametrize(
        "command",
        [
            ["rank", "{model}", "{out}", "--overwrite"],
            ["export", "{model}", "{out}", "--overwrite"],
            ["train", "{model}", "{out}", "--resume", "never"],
        ],
        ids=lambda command: command[0],
    )
    @pytest.mark.parametrize("out", ["model", "model/", "link", "gone/../model", "model/inner/.."])
    def test_it_stays(self, model, tmp_path, command, out, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(model)
        (model / "inner").mkdir()
        (model / "train.json").write_text("{}")
        before = names(model)
        assert cli.main([word.format(model="model", out=out) for word in command]) == 2
        assert "OUT is model itself, which this run reads, so it is not replaced." in capsys.readouterr().err
        assert names(model) == before

    def test_a_gguf_file(self, tmp_path, capsys):
        file = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        before = file.read_bytes()
        said = refused(capsys, "export", file, file, "--to", "gguf", "--overwrite")
        assert "itself, which this run reads" in said
        assert file.read_bytes() == before

    @pytest.mark.parametrize("command", [["rank", "{inner}", "{model}"], ["export", "{inner}", "{model}"]], ids=str)
    def test_a_model_below_out(self, model, command, capsys):
        inner = shutil.copytree(model, model / "inner")
        arguments = [word.format(model=model, inner=inner) for word in command]
        assert f"{model} holds a file that this run reads: {inner}." in refused(capsys, *arguments, "--overwrite")
        assert (inner / METADATA_FILE).is_file()

    def test_of_a_quickstart(self, tmp_path, model, capsys):
        (tmp_path / "settings.json").write_text('{"quickstart": 4}')
        for fresh in ([], ["--fresh"]):
            said = refused(capsys, "quickstart", "--model", model, "--out", tmp_path, *fresh)
            assert "holds a file that this run reads" in said
        assert (model / METADATA_FILE).is_file()

    def test_a_text_below_out(self, rank, model, tmp_path, capsys):
        out = shutil.copytree(model, tmp_path / "out")
        (out / "text.txt").write_text(tiny.TEXT)
        assert rank(out, "--overwrite", "--text", str(out / "text.txt")) == 2
        assert "holds a file that this run reads" in capsys.readouterr().err
        assert (out / "text.txt").is_file()

    def test_another_json_file_is_no_sub_network_to_replace(self, model, capsys):
        before = (model / "config.json").read_text()
        said = refused(capsys, "route", model, "--budget", "0.6x", "--out", model / "config.json")
        assert "config.json is not a sub-network that flextron wrote. Name another file." in said
        assert (model / "config.json").read_text() == before


class TestOneAtATime:
    @pytest.mark.parametrize(
        ("command", "target"),
        [
            (["rank", "model", "out"], "out"),
            (["export", "model", "out", "--subnet", "60%"], "out"),
            (["export", "model", "out.gguf", "--to", "gguf", "--subnet", "60%"], "out.gguf"),
            (["route", "model", "--budget", "0.6x", "--picture", "out.png"], "out.png"),
            (["evaluate", "model", "--tasks", "piqa", "--out-dir", "out"], "out/results.json"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_the_second_is_told_who_writes(self, model, tmp_path, command, target, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / target).parent.mkdir(exist_ok=True)
        with writer(tmp_path / target) as process:
            said = refused(capsys, *command)
        assert f"{tmp_path / target} is being written by process {process.pid} on " in said
        assert "Wait for it, stop it, or name another folder." in said

    @pytest.mark.parametrize(
        ("command", "target"),
        [
            (["measure-latency", "model"], "model/latency"),
            (["quickstart", "--model", "model", "--out", "out"], "out"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_also_inside_a_folder(self, model, tmp_path, command, target, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        if target == "out":
            (tmp_path / "out").mkdir()
            settings = (
                '{"quickstart": 4, "model": "model", "tokens": %d, "thorough": false, "from_scratch": true, '
                '"prompt": "%s"}'
            )
            config = cli.QuickstartConfig()
            (tmp_path / "out" / "settings.json").write_text(settings % (config.rank_tokens, config.prompt))
        with writer_inside(tmp_path / target) as process:
            assert f"{target} is being written by process {process.pid} on " in refused(capsys, *command)

    def test_a_folder_in_which_another_writes_is_not_replaced(self, rank, tmp_path, capsys):
        assert rank(tmp_path / "out") == 0
        capsys.readouterr()
        with writer_inside(tmp_path / "out" / "routers") as process:
            assert rank(tmp_path / "out", "--overwrite") == 2
        assert f"out is being written by process {process.pid}" in capsys.readouterr().err
        assert (tmp_path / "out" / METADATA_FILE).is_file()


class TestPlacesThatCannotBeWritten:
    @pytest.mark.parametrize("place", ["file/out", "/proc/out"])
    @pytest.mark.parametrize(
        "command",
        [
            ["rank", "model", "{}"],
            ["export", "model", "{}", "--subnet", "60%"],
            ["export", "model", "{}.gguf", "--to", "gguf", "--subnet", "60%"],
            ["route", "model", "--budget", "0.6x", "--out", "{}.json"],
            ["route", "model", "--budget", "0.6x", "--picture", "{}.png"],
            ["evaluate", "model", "--tasks", "piqa", "--out-dir", "{}"],
            ["evaluate", "model", "--budget", "0.6x", "--per-token", "--picture", "{}.html"],
            ["generate", "model", "Hello", "--budget", "0.6x", "--per-token", "--picture", "{}.html"],
            ["quickstart", "--model", "model", "--out", "{}"],
        ],
        ids=lambda command: " ".join(command[:1] + [word for word in command if word.startswith("--")]),
    )
    def test_are_told_before_any_work(self, model, tmp_path, command, place, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("")
        said = refused(capsys, *(word.format(place) for word in command))
        assert said.startswith(f"error: cannot write {place}")
        assert any(reason in said for reason in ("file is a file, not a folder", "Not a directory", "No such file"))
        assert names(tmp_path) == ["file", "model"]

    def test_a_model_that_takes_no_tables(self, model, tmp_path, capsys):
        (model / "latency").write_text("a file where a folder should be")
        assert "latency is a file, not a folder." in refused(capsys, "measure-latency", model)


def test_a_full_disk_after_ranking_keeps_the_ranked_model(rank, tmp_path, capsys):
    out = tmp_path / "out"
    assert rank(out) == 0
    with files_of_at_most(300):
        assert rank(out, sensitivity_tokens=256) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "sensitivity.json: File too large. Nothing of it was kept. The ranked model is kept" in said
    assert rank(out, sensitivity_tokens=256) == 0
    assert "only its sensitivities are measured" in capsys.readouterr().err
