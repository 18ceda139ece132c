"""Two writers of one output: the second is told who writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggufmoe.errors import OutputError
from ggufmoe.writing import lock
from ggufmoe.writing.lock import lock_path, output_lock


def test_a_second_writer_in_this_process_is_told_who_writes(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    with output_lock(output):
        with (
            pytest.raises(OutputError, match=f"is being written by process {os.getpid()}; wait for it"),
            output_lock(output),
        ):
            pass
        with output_lock(tmp_path / "b.gguf"):
            pass
    with output_lock(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    code = (
        "import sys, time; from pathlib import Path; from ggufmoe.writing.lock import output_lock\n"
        "with output_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"is being written by process {other.pid}"), output_lock(output):
            pass
        other.kill()
    assert lock_path(output).exists()
    with output_lock(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_says_nothing_still_locks(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    with output_lock(output):
        lock_path(output).write_bytes(b"\xff rubbish")
        with pytest.raises(OutputError, match="is being written by another process"), output_lock(output):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process's files")
def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path) -> None:
    """A limit of zero bytes a file stands for the disk: whose the lock is cannot be written."""
    code = (
        "import resource, sys; from pathlib import Path; from ggufmoe.writing.lock import lock_path, output_lock\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "with output_lock(Path(sys.argv[1])): print(lock_path(Path(sys.argv[1])).stat().st_size)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.gguf")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    lock_path(tmp_path / "a.gguf").symlink_to(mine)
    with pytest.raises(OutputError, match="cannot be written"), output_lock(tmp_path / "a.gguf"):
        pass
    assert mine.read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="flock is not Windows's")
def test_a_file_system_without_locks_is_written_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.output_lock(tmp_path / "a.gguf"):
        pass
    assert list(tmp_path.iterdir()) == []


class Msvcrt:
    """Windows's locks: a byte of a file is locked until its descriptor is closed, and an open file is not deleted."""

    LK_NBLCK = 2

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.owners: dict[int, int] = {}
        close, unlink = os.close, Path.unlink

        def release(descriptor: int) -> None:
            self.owners.pop(descriptor, None)
            close(descriptor)

        def refuse_open(path: Path, missing_ok: bool = False) -> None:
            if path.stat().st_ino in self.owners.values():
                raise PermissionError(errno.EACCES, "in use")
            unlink(path, missing_ok)

        monkeypatch.setattr(os, "close", release)
        monkeypatch.setattr(Path, "unlink", refuse_open)
        monkeypatch.setattr(lock, "sys", SimpleNamespace(platform="win32"))
        monkeypatch.setitem(sys.modules, "msvcrt", self)

    def locking(self, descriptor: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes, os.lseek(descriptor, 0, os.SEEK_CUR)) == (self.LK_NBLCK, 1, 2**30)
        file = os.fstat(descriptor).st_ino
        if file in self.owners.values():
            raise PermissionError(errno.EACCES, "Permission denied")
        self.owners[descriptor] = file


@pytest.mark.skipif(sys.platform == "win32", reason="there the other tests ask Windows itself")
def test_the_locks_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, msvcrt = tmp_path / "a.gguf", Msvcrt(monkeypatch)
    with output_lock(output):
        with pytest.raises(OutputError, match=f"is being written by process {os.getpid()}"), output_lock(output):
            pass
        assert len(msvcrt.owners) == 1
    with output_lock(output):
        pass
    assert msvcrt.owners == {}
    assert list(tmp_path.iterdir()) == []
