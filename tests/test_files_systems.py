"""Files on systems that differ from Linux: what the calls are there, simulated, and once for real on Windows."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ggufmoe import files
from ggufmoe.errors import OutputError
from ggufmoe.files import delete, delete_directory, move, replacing, set_size, sync, sync_directory

SHARING_VIOLATION = 32


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of ``files``, which believes to be on Windows."""
    clock = Clock()
    monkeypatch.setattr(files, "time", clock)
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    return clock


def held(path: Path, number: int = SHARING_VIOLATION) -> PermissionError:
    """What Windows says of a file that another program has open."""
    error = PermissionError(errno.EACCES, "The process cannot access the file", str(path))
    error.winerror = number  # type: ignore[attr-defined, unused-ignore]
    return error


def held_for(call: Callable[..., None], times: int, number: int = SHARING_VIOLATION) -> Callable[..., None]:
    """``call``, which Windows refuses ``times`` times."""
    left = [times]

    def refused(path: Path, *others: Any, **keywords: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise held(path, number)
        call(path, *others, **keywords)

    return refused


@pytest.mark.parametrize("number", [5, 32, 33])
def test_a_file_that_a_scanner_holds_is_replaced_when_it_is_released(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", held_for(os.replace, 4, number))
    move(source, target)
    assert target.read_bytes() == b"new"
    assert clock.pauses == [0.01, 0.02, 0.04, 0.08]


def test_deletions_wait_for_a_scanner_too(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (folder / "inside").touch()
    monkeypatch.setattr(Path, "unlink", held_for(Path.unlink, 2))
    delete(file)
    delete(file)
    monkeypatch.setattr(shutil, "rmtree", held_for(shutil.rmtree, 3))
    delete_directory(folder)
    assert list(tmp_path.iterdir()) == []
    assert len(clock.pauses) == 5


def test_a_file_that_stays_open_is_an_error_that_says_so_after_two_seconds(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", held_for(os.replace, 10**6))
    with (
        pytest.raises(
            OutputError,
            match=r"a\.gguf: the model cannot be written: The process cannot access the file, for 2 s now: another "
            r"program .*has a\.gguf\.\S+\.partial or a\.gguf open",
        ),
        replacing(tmp_path / "a.gguf", "the model"),
    ):
        pass
    assert 2 <= sum(clock.pauses) < 4.1
    assert (tmp_path / "a.gguf").read_bytes() == b"old"


def test_other_refusals_are_not_repeated(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    write_protected_disk = 19
    monkeypatch.setattr(os, "replace", held_for(os.replace, 1, write_protected_disk))
    with pytest.raises(PermissionError):
        move(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "a", tmp_path / "b")
    assert clock.pauses == []


@pytest.mark.skipif(sys.platform == "win32", reason="the refusal of another system")
def test_other_systems_refuse_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(files, "time", clock)
    monkeypatch.setattr(os, "replace", held_for(os.replace, 1))
    with pytest.raises(PermissionError):
        move(tmp_path / "a", tmp_path / "b")
    assert clock.pauses == []


class Kernel32:
    """Windows's library as far as ``set_size`` calls it; handles are file descriptors plus 1000."""

    def __init__(self) -> None:
        self.refusal = 0

    def SetFileInformationByHandle(self, handle: Any, kind: int, value: Any, n_bytes: int) -> int:  # noqa: N802
        assert (kind, n_bytes) == (6, 8)  # FileEndOfFileInfo, the size of a LARGE_INTEGER
        if not self.refusal:
            os.truncate(handle.value - 1000, value._obj.value)
        return not self.refusal


@pytest.fixture
def kernel32(monkeypatch: pytest.MonkeyPatch) -> Kernel32:
    fake = Kernel32()

    def library(name: str, *, use_last_error: bool) -> Kernel32:
        assert (name, use_last_error) == ("kernel32", True)
        return fake

    def refuse_ftruncate(*_: object) -> None:
        raise AssertionError("it would write all zeros")

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(ctypes, "WinDLL", library, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: fake.refusal, raising=False)
    monkeypatch.setattr(ctypes, "WinError", lambda number: OSError(errno.ENOSPC, f"number {number}"), raising=False)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda descriptor: descriptor + 1000))
    monkeypatch.setattr(os, "ftruncate", refuse_ftruncate)
    return fake


def test_windows_sets_the_size_without_writing_zeros(tmp_path: Path, kernel32: Kernel32) -> None:
    with open(tmp_path / "a", "wb") as file:
        set_size(file.fileno(), 5 * 2**32 + 1)
        assert os.fstat(file.fileno()).st_size == 5 * 2**32 + 1
        set_size(file.fileno(), 7)
        assert os.fstat(file.fileno()).st_size == 7
        kernel32.refusal = 112
        with pytest.raises(OSError, match="number 112") as caught:
            set_size(file.fileno(), 10)
        assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that ``files`` makes to flush on macOS."""
    fcntl = pytest.importorskip("fcntl", reason="macOS has the module, and so has every system but Windows")
    calls: list[str] = []

    def full(descriptor: int, command: int) -> None:
        assert command == 51
        calls.append("full")

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    return calls


def test_macos_empties_the_cache_of_the_disk_too(tmp_path: Path, macos: list[str]) -> None:
    with replacing(tmp_path / "a", "the note") as file:
        file.write(b"new")
    assert macos == ["full", "full"], "the file and the directory that names it"
    sync_directory(tmp_path)
    assert macos == ["full", "full", "full"]


def test_a_file_system_without_a_full_flush_gets_a_plain_one(
    tmp_path: Path, macos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with open(tmp_path / "a", "wb") as file:
        sync(file.fileno())
    assert macos == ["fsync"]


@pytest.mark.skipif(sys.platform == "win32", reason="directories are not flushed there")
@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_disk_that_fails_fails_the_flush_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_raised: bool
) -> None:
    asked: list[int] = []

    def refuse(descriptor: int) -> None:
        asked.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "sync", refuse)
    if is_raised:
        with pytest.raises(OSError, match=os.strerror(number)):
            sync_directory(tmp_path)
    else:
        sync_directory(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(asked[0])


@pytest.mark.skipif(sys.platform != "win32", reason="asks Windows itself")
def test_windows_itself(tmp_path: Path) -> None:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new")
    with open(target, "wb") as file:
        set_size(file.fileno(), 2**32 + 5)
        sync(file.fileno())
        assert os.fstat(file.fileno()).st_size == 2**32 + 5
        with pytest.raises(PermissionError, match="for 2 s now: another program"):
            move(source, target)
    move(source, target)
    sync_directory(tmp_path)
    assert target.read_bytes() == b"new"
    delete(target)
    assert list(tmp_path.iterdir()) == []
