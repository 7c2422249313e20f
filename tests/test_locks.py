"""Locks: one process at a time, whatever ended the last one."""

import os
import signal
import time

import pytest

from flextron.errors import CheckpointError
from flextron.locks import check_unlocked, locked
from folders import names, writer, writer_inside


@pytest.mark.parametrize("inside", [False, True])
def test_leaves_nothing_and_can_be_taken_again(tmp_path, inside):
    target = tmp_path / "made"
    target.mkdir()
    for _ in range(2):
        with locked(target, inside=inside) as alone:
            assert alone
            assert names(target if inside else tmp_path) == ([".lock"] if inside else [".made.lock", "made"])
            with locked(target, inside=inside) as alone_too:
                assert not alone_too
        assert names(tmp_path) == ["made"]
        assert names(target) == []


@pytest.mark.parametrize("inside", ["beside", "inside"])
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_another_process_is_named_and_blocks_until_it_dies(tmp_path, inside, way):
    target = tmp_path / "made"
    target.mkdir()
    hold = writer_inside(target) if inside == "inside" else writer(target)
    with hold as process:
        host = os.uname().nodename
        with (
            pytest.raises(CheckpointError, match=rf"being written by process {process.pid} on {host} since 20\d\d-"),
            locked(target, inside=inside == "inside"),
        ):
            pytest.fail("the block must not run")
        process.send_signal(way)
        process.wait()
    with locked(target, inside=inside == "inside") as alone:
        assert alone
    assert names(tmp_path) == ["made"]


def test_a_dead_owners_file_is_taken_over(tmp_path):
    (tmp_path / ".made.lock").write_text("process 1 on another host")
    started = time.monotonic()
    with locked(tmp_path / "made") as alone:
        assert alone
        assert f"process {os.getpid()}" in (tmp_path / ".made.lock").read_text()
    assert time.monotonic() - started < 1
    assert names(tmp_path) == []


def test_what_other_tools_call_a_lock_is_in_nobodys_way(tmp_path):
    (tmp_path / "uv.lock").write_text("")
    (tmp_path / "sub.lock").mkdir()
    check_unlocked(tmp_path)
    with writer_inside(tmp_path / "deep" / "below"), pytest.raises(CheckpointError, match="process"):
        check_unlocked(tmp_path)
    check_unlocked(tmp_path)


def test_where_the_system_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("flextron.locks.fcntl", None)
    with locked(tmp_path / "made") as alone:
        assert not alone
    check_unlocked(tmp_path)
