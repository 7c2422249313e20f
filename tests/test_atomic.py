"""Files and folders appear whole or not at all, whatever ends the writing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flextron.atomic import check_apart, check_new, lost, new_file, new_folder, reserved, write_text
from flextron.errors import CheckpointError
from folders import content, files_of_at_most, names, writer_inside


@pytest.fixture
def old(tmp_path):
    """A folder that must survive whatever fails."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


class TestNewFolder:
    def test_appears_at_the_end_only(self, tmp_path):
        target = tmp_path / "some" / "where" / "made"
        with new_folder(target) as partial:
            (partial / "new.txt").write_text("new")
            assert not target.exists()
            assert partial.parent == target.parent
        assert content(tmp_path) == {"some/where/made/new.txt": "new"}
        assert names(target.parent) == ["made"]
        assert target.stat().st_mode & 0o777 == 0o755

    def test_replaces_the_old_one_whole(self, old):
        with new_folder(old, overwrite=True) as partial:
            (partial / "new.txt").write_text("new")
            assert content(old) == {"config.json": "old"}
        assert content(old.parent) == {"made/new.txt": "new"}
        assert names(old.parent) == ["made"]

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_exception_leaves_what_was(self, old, kind, overwrite):
        target = old if overwrite else old.parent / "other"
        with pytest.raises(kind), new_folder(target, overwrite=overwrite) as partial:  # noqa: PT012
            (partial / "new.txt").write_text("new")
            raise kind
        assert content(old.parent) == {"made/config.json": "old"}
        assert names(old.parent) == ["made"]

    @pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
    def test_a_replacement_that_fails_halfway_restores_the_old(self, old, kind, monkeypatch):
        """Between moving the old folder away and the new one in."""
        rename, calls = Path.rename, []

        def second_fails(self, target):
            calls.append(target)
            if len(calls) == 2:
                raise kind("halfway")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", second_fails)
        with pytest.raises((CheckpointError, KeyboardInterrupt)), new_folder(old, overwrite=True) as partial:
            (partial / "new.txt").write_text("new")
        assert content(old.parent) == {"made/config.json": "old"}

    def test_refuses_what_exists_before_any_work(self, old):
        with pytest.raises(CheckpointError) as error, new_folder(old):
            pytest.fail("the block must not run")
        assert str(error.value) == f"{old} exists. Name another folder or pass --overwrite."

    def test_more_than_the_disk_holds(self, tmp_path):
        with (
            pytest.raises(CheckpointError, match=r"it needs about 1000000000000 MB, \d+ MB are free\. Free some space"),
            new_folder(tmp_path / "made", needs_bytes=10**18),
        ):
            pytest.fail("the block must not run")
        assert names(tmp_path) == []

    def test_a_parent_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*file/made: "),
            new_folder(tmp_path / "file" / "made"),
        ):
            pytest.fail("the block must not run")

    def test_a_write_that_the_system_refuses(self, old):
        message = f"cannot write {old}: .*File too large.*Nothing of it was kept"
        with pytest.raises(CheckpointError, match=message), new_folder(old, overwrite=True) as partial:  # noqa: PT012
            (partial / "first.txt").write_text("fits")
            with files_of_at_most(10_000):
                (partial / "second.bin").write_bytes(bytes(50_000))
        assert content(old.parent) == {"made/config.json": "old"}
        assert names(old.parent) == ["made"]


def test_a_model_that_the_system_refuses_to_write(llama, old):
    """The same through safetensors, which reports failed writes in its own way."""
    with pytest.raises(CheckpointError, match=f"cannot write {old}"), files_of_at_most(10_000):
        llama.save_pretrained(old, overwrite=True)
    assert content(old.parent) == {"made/config.json": "old"}
    assert names(old.parent) == ["made"]


WRITE_AND_WAIT = """
import sys, time
sys.argv[0] = "flextron"  # as on the command line: `import flextron` leaves torch out
from flextron.atomic import new_folder
with new_folder(sys.argv[1], overwrite=True) as partial:
    (partial / "new.txt").write_text("new")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_while_writing(old, overwrite):
    target = old if overwrite else old.parent / "other"
    with subprocess.Popen([sys.executable, "-c", WRITE_AND_WAIT, target], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert content(old) == {"config.json": "old"}
    assert target.exists() is overwrite
    left = [path for path in old.parent.iterdir() if path != old]
    assert all(path.name.startswith((f".{target.name}.partial-", f".{target.name}.lock")) for path in left)
    with new_folder(target, overwrite=overwrite) as partial:  # what was left is in nobody's way, and is removed
        (partial / "second.txt").write_text("second")
    assert content(target) == {"second.txt": "second"}
    assert names(old.parent) == sorted({"made", target.name})


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
sys.argv[0] = "flextron"
from pathlib import Path
from flextron.atomic import new_folder
rename = Path.rename
def rename_once(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename_once
with new_folder(sys.argv[1], overwrite=True) as partial:
    (partial / "new.txt").write_text("new")
"""


class TestKilledBetweenTheRenames:
    @pytest.fixture
    def gone(self, tmp_path):
        """A folder that is moved away, and whose replacement is not there yet."""
        folder = tmp_path / "a [name]*"
        folder.mkdir()
        (folder / "config.json").write_text("old")
        killed = subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, folder], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not folder.exists()
        return folder

    def test_who_reads_it_is_told_how_it_comes_back(self, gone):
        said = lost(gone)
        assert "A killed run left the old one in .a [name]*.old-" in said
        command = said.partition("bring it back: ")[2]
        assert command.startswith("mv ")
        assert command.endswith(str(gone))
        assert lost(gone.with_name("other")) == ""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_who_writes_it_finds_it_back(self, gone, overwrite, capsys):
        if overwrite:
            with new_folder(gone, overwrite=True) as partial:
                assert content(gone) == {"config.json": "old"}
                (partial / "newer.txt").write_text("newer")
            assert content(gone) == {"newer.txt": "newer"}
        else:
            with pytest.raises(CheckpointError, match="exists"), new_folder(gone):
                pytest.fail("the block must not run")
            assert content(gone) == {"config.json": "old"}
        assert f"{gone} is back" in capsys.readouterr().err
        assert names(gone.parent) == [gone.name]
        assert lost(gone) == ""

    def test_an_old_one_beside_the_new_one_goes(self, old):
        (old.parent / ".made.old-abc" / "made").mkdir(parents=True)
        (old.parent / ".made.partial-123").write_text("a file")
        (old.parent / ".made2.partial-abc").mkdir()
        with new_folder(old, overwrite=True) as partial:
            (partial / "new.txt").write_text("new")
        assert names(old.parent) == [".made2.partial-abc", "made"]


class TestTwoWriters:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_the_second_is_told_who_writes(self, old, overwrite):
        target = old if overwrite else old.parent / "other"
        with subprocess.Popen([sys.executable, "-c", WRITE_AND_WAIT, target], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"writing\n"
            before = names(old.parent)
            with (
                pytest.raises(CheckpointError, match=rf"{target.name} is being written by process {process.pid} on "),
                new_folder(target, overwrite=overwrite),
            ):
                pytest.fail("the block must not run")
            assert names(old.parent) == before
            process.kill()

    def test_what_appears_meanwhile_stays(self, tmp_path):
        with pytest.raises(CheckpointError, match="made exists"), new_folder(tmp_path / "made"):  # noqa: PT012
            (tmp_path / "made").mkdir()
            (tmp_path / "made" / "another's").write_text("work")
        with pytest.raises(CheckpointError, match="file exists"), new_file(tmp_path / "file") as partial:  # noqa: PT012
            partial.write_text("mine")
            (tmp_path / "file").write_text("another's")
        assert content(tmp_path) == {"made/another's": "work", "file": "another's"}
        assert names(tmp_path) == ["file", "made"]

    def test_a_folder_in_which_another_process_writes_is_not_replaced(self, old):
        with writer_inside(old / "routers"), pytest.raises(CheckpointError, match="is being written by process"):
            check_new(old, overwrite=True)
        check_new(old, overwrite=True)


class TestReserved:
    def test_leaves_nothing(self, tmp_path):
        with reserved(tmp_path / "some" / "where" / "made"):
            assert (tmp_path / "some" / "where").is_dir()
        assert names(tmp_path) == []

    @pytest.mark.parametrize("place", ["/proc/made", "/proc/some/made", "file/made"])
    def test_a_place_that_cannot_be_written(self, tmp_path, place):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*made: .+\. Nothing"),
            reserved(tmp_path / place),
        ):
            pytest.fail("the block must not run")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path):
        tmp_path.chmod(0o555)
        with pytest.raises(CheckpointError, match="Permission denied"), reserved(tmp_path / "made"):
            pytest.fail("the block must not run")


class TestApart:
    def test_what_is_read_is_never_replaced(self, old, tmp_path):
        (tmp_path / "link").symlink_to(old)
        (old / "inner").mkdir()
        for out in (old, tmp_path / "link", tmp_path / "x" / ".." / "made", old / "inner" / ".."):
            (tmp_path / "x").mkdir(exist_ok=True)
            with pytest.raises(CheckpointError, match="itself, which this run reads"):
                check_apart(out, old)
            with pytest.raises(CheckpointError, match="holds a file that this run reads"):
                check_apart(out, None, "org/name", old / "inner")
        check_apart(old / "inner", old)  # beside the model's own files
        check_apart(tmp_path / "new", old)


class TestCheckNew:
    def test_passes_what_is_free(self, tmp_path, old):
        check_new(tmp_path / "free")
        check_new(old, overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_never_replaces_a_file(self, tmp_path, overwrite):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError) as error:
            check_new(tmp_path / "file", overwrite=overwrite)
        assert str(error.value) == f"{tmp_path / 'file'} exists. Name another folder."


class TestWriteText:
    def test_writes_and_replaces(self, tmp_path):
        for text in ("first", "second é"):
            write_text(tmp_path / "file", text)
            assert (tmp_path / "file").read_text(encoding="utf8") == text
        assert names(tmp_path) == ["file"]

    def test_a_failed_write_keeps_the_old(self, tmp_path):
        write_text(tmp_path / "file", "old")
        with pytest.raises(CheckpointError, match=r"cannot write .*file: "), files_of_at_most(10_000):
            write_text(tmp_path / "file", "new" * 10_000)
        assert content(tmp_path) == {"file": "old"}

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
            write_text(tmp_path / "gone" / "file", "text")


def test_never_replaces_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint \(no config\.json\), so it is not replaced"):
        check_new(tmp_path / "thesis", overwrite=True)
