"""Compiled kernels on disk: what is kept, what is believed, and that nothing goes wrong where nothing can be kept."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import folders
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import machine, trust
from ggufmoe.quant.kernels.code_cache import Code, CodeCache, source_hash
from ggufmoe.quant.kernels.trust import Kernels, compile_format
from tests.quant.kernels.corpora import rows

MAKER = {"processor": "p", "sources": "s"}
CODE = Code(b"\x00code\n\xff" * 50, 640)


def entry_of(folder: Path) -> Path:
    (entry,) = (path for path in folder.rglob("*") if path.is_file())
    return entry


def test_code_is_kept_for_the_same_maker_and_name_only(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path / "made" / "here", MAKER)
    assert cache.load("Q4_K") is None
    cache.save("Q4_K", CODE)
    assert cache.has("Q4_K")
    again = CodeCache(tmp_path / "made" / "here", dict(reversed(MAKER.items())))
    assert again.load("Q4_K") == CODE
    assert again.load("Q5_K") is None
    assert CodeCache(tmp_path / "made" / "here", MAKER | {"sources": "other"}).load("Q4_K") is None


def test_an_entry_under_a_false_name_or_maker_is_ignored(tmp_path: Path) -> None:
    one, other = CodeCache(tmp_path, MAKER), CodeCache(tmp_path, MAKER | {"processor": "q"})
    one.save("Q4_K", CODE)
    entry = entry_of(tmp_path)
    entry.with_name("Q5_K").write_bytes(entry.read_bytes())
    other.save("Q4_K", Code(b"other", 1))
    (theirs,) = (path for path in tmp_path.rglob("Q4_K") if path != entry)
    theirs.write_bytes(entry.read_bytes())
    assert one.load("Q4_K") == CODE
    assert one.load("Q5_K") is None
    assert other.load("Q4_K") is None


@pytest.mark.parametrize("kept_bytes", [0, 5, 17, 40, 49, 60, -1])
def test_a_shortened_entry_is_ignored_and_written_anew(tmp_path: Path, kept_bytes: int) -> None:
    cache = CodeCache(tmp_path, MAKER)
    cache.save("Q4_K", CODE)
    entry = entry_of(tmp_path)
    entry.write_bytes(entry.read_bytes()[:kept_bytes])
    assert cache.load("Q4_K") is None
    cache.save("Q4_K", CODE)
    assert cache.load("Q4_K") == CODE


def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, MAKER)
    cache.save("Q4_K", CODE)
    entry = entry_of(tmp_path)
    whole = entry.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        entry.write_bytes(damaged)
        assert cache.load("Q4_K") is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of files")
def test_what_others_could_have_written_is_not_run(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, MAKER)
    cache.save("Q4_K", CODE)
    entry = entry_of(tmp_path)
    assert (entry.stat().st_mode & 0o777, entry.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    for path in (entry, entry.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        assert cache.load("Q4_K") is None
        path.chmod(mode)
        assert cache.load("Q4_K") == CODE
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to(entry.with_name("elsewhere"))
    assert cache.load("Q4_K") is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of files")
def test_the_file_that_was_checked_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, theirs = CodeCache(tmp_path / "ours", MAKER), CodeCache(tmp_path / "theirs", MAKER)
    cache.save("Q4_K", CODE)
    theirs.save("Q4_K", Code(b"other", 1))
    is_file, swap = stat.S_ISREG, [(entry_of(tmp_path / "theirs"), entry_of(tmp_path / "ours"))]

    def swap_after_check(mode: int) -> bool:
        if swap:
            os.replace(*swap.pop())
        return is_file(mode)

    monkeypatch.setattr(stat, "S_ISREG", swap_after_check)
    assert cache.load("Q4_K") == CODE
    assert swap == []
    assert cache.load("Q4_K") == Code(b"other", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in folders")
def test_a_pipe_or_a_linked_folder_in_the_place_of_ours_is_ignored(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, MAKER)
    cache.save("Q4_K", CODE)
    entry = entry_of(tmp_path)
    entry.parent.rename(tmp_path / "elsewhere")
    entry.parent.symlink_to(tmp_path / "elsewhere")
    assert cache.load("Q4_K") is None
    entry.parent.unlink()
    (tmp_path / "elsewhere").rename(entry.parent)
    assert cache.load("Q4_K") == CODE
    entry.unlink()
    os.mkfifo(entry)
    assert cache.load("Q4_K") is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no owners as numbers")
def test_another_users_files_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CodeCache(tmp_path, MAKER)
    cache.save("Q4_K", CODE)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache.load("Q4_K") is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = CodeCache(tmp_path / "file" / "kernels", MAKER)
    cache.save("Q4_K", CODE)
    assert cache.load("Q4_K") is None
    assert not cache.has("Q4_K")


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", refuse)
    CodeCache(tmp_path, MAKER).save("Q4_K", CODE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_makers_that_were_not_used_for_long_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "not ours").mkdir()
    caches = [CodeCache(tmp_path, MAKER | {"sources": str(i)}) for i in range(6)]
    for age, cache in enumerate(caches[:5]):
        cache.save("Q4_K", CODE)
        os.utime(cache._folder, (time.time() - 100 + age,) * 2)
    assert caches[1].load("Q4_K") == CODE, "and using it makes it the last one used"
    caches[5].save("Q4_K", CODE)
    kept = [cache.load("Q4_K") is not None for cache in caches]
    assert kept == [False, True, False, True, True, True]
    assert (tmp_path / "not ours").is_dir()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, MAKER)
    cache.save("Q4_K", CODE)
    old, new = (entry_of(tmp_path).with_name(name) for name in (".old", ".new"))
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    cache.save("Q5_K", CODE)
    assert (old.exists(), new.exists()) == (False, True)


def test_the_hash_of_the_sources_sees_every_change(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return source_hash(folder)

    found = [hash_of(a="1", b="2"), hash_of(a="1", b="3"), hash_of(a="1", c="2"), hash_of(a="12", b=""), hash_of(a="1")]
    assert len(set(found)) == 5
    assert hash_of(a="1", b="2") == found[0]
    assert hash_of() is None


def test_a_kernel_is_compiled_once_and_then_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = machine.maker(machine.host())
    assert maker is not None
    cache = CodeCache(tmp_path, maker)
    made = compile_format(GGMLType.Q4_0, "F32", True, cache=cache)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "q4_0-Q4_0-F32-weighted",
        "row_energies-F32",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_compiled", lambda *_: pytest.fail("compiled again"))
        loaded = compile_format(GGMLType.Q4_0, "F32", True, cache=cache)
    src, imatrix = rows(0, "normal"), np.ones(512, np.float32)
    ours, theirs = (np.zeros((len(src), GGMLType.Q4_0.row_bytes(512)), np.uint8) for _ in range(2))
    trust.run(made, src, ours, imatrix)
    trust.run(loaded, src, theirs, imatrix)
    assert ours.any()
    assert np.array_equal(ours, theirs)


def test_a_kept_kernel_is_used_at_once_unless_the_cache_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFMOE_CACHE", str(tmp_path))
    key = GGMLType.Q8_0, "float32", False
    assert Kernels().worthwhile(*key) is None
    assert Kernels().judged(*key, cache=False)[0] is not None
    assert list(tmp_path.rglob("*")) == []
    assert Kernels().judged(*key)[0] is not None
    assert entry_of(tmp_path).is_relative_to(tmp_path / "kernels")
    assert Kernels().worthwhile(*key) is not None
    assert Kernels().worthwhile(*key, cache=False) is None


def test_a_damaged_kept_kernel_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFMOE_CACHE", str(tmp_path))
    key = GGMLType.Q8_0, "float32", False
    Kernels().judged(*key)
    entry = entry_of(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    assert Kernels().judged(*key)[1].routine == "fast"
    assert entry.read_bytes() == whole


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GGUFMOE_CACHE", str(tmp_path))
    assert folders.cache_directory() == tmp_path
    monkeypatch.delenv("GGUFMOE_CACHE")
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = {
        "linux": tmp_path / "xdg",
        "darwin": tmp_path / "HOME" / "Library" / "Caches",
        "win32": tmp_path / "LOCALAPPDATA",
    }
    for platform, folder in expected.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert folders.cache_directory() == folder / "ggufmoe"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert folders.cache_directory() == tmp_path / "HOME" / ".cache" / "ggufmoe"


NO_HOME = """
from pathlib import Path
Path.home = classmethod(lambda kind: (_ for _ in ()).throw(RuntimeError("no home")))
from ggufmoe.folders import cache_directory
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import prepare
print(cache_directory(), prepare(GGMLType.Q8_0).routine)
"""


def test_a_user_without_a_home_compiles_in_each_process() -> None:
    hidden = ("GGUFMOE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME], capture_output=True, text=True, check=True, env=environment
    )  # fmt: skip
    assert done.stdout == "None fast\n"


def test_sources_that_cannot_be_read_mean_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "source_hash", lambda folder: None)
    monkeypatch.setenv("GGUFMOE_CACHE", str(tmp_path))
    assert machine.maker(machine.host()) is None
    assert Kernels().judged(GGMLType.Q8_0, "float32", False)[1].routine == "fast"
    assert list(tmp_path.rglob("*")) == []
