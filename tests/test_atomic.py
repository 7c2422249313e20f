"""Files and folders appear whole or not at all, whatever ends the writing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flextron.atomic import check_new, new_folder, write_text
from flextron.errors import CheckpointError
from folders import content, files_of_at_most, names


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
    assert all(path.name.startswith(f".{target.name}.partial-") for path in left)
    with new_folder(target, overwrite=overwrite) as partial:  # what was left is in nobody's way
        (partial / "second.txt").write_text("second")
    assert content(target) == {"second.txt": "second"}


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
