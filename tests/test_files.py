"""Outputs: nothing is half replaced, and what cannot be written is refused beforehand."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe import files
from ggufmoe.errors import InputError, OutputError, OutputExistsError
from ggufmoe.files import check_output_file, decode_text, followed, partial_path, possible_path, replacing


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 5000, f"folder/{'x' * 5000}"])
def test_what_can_be_no_path_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"is no path: it holds a character|is too long for a path") as caught:
        possible_path(text)
    assert len(str(caught.value)) < 200
    calls = lambda: ggufmoe.Engine(text), lambda: ggufmoe.convert(text, "out.gguf"), lambda: ggufmoe.merge(text, "out")
    for call in calls:
        with pytest.raises(InputError):
            call()


def test_links_in_a_circle_are_no_outputs(tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to("link.gguf")
    with pytest.raises(OutputError, match="is a symbolic link that leads in a circle"):
        followed(link)
    for call in (lambda: ggufmoe.convert(tmp_path, link), lambda: ggufmoe.merge(tmp_path / "r.yaml", link)):
        with pytest.raises(OutputError, match="leads in a circle"):
            call()


@pytest.mark.parametrize("text", ["", "é\r\n", "\ufeff twice", "\u4f60"])
def test_text_as_editors_save_it(text: str) -> None:
    for encoding in ("utf-8-sig", "utf-16-le", "utf-16-be") if text else ("utf-8", "utf-8-sig"):
        mark = "" if encoding.startswith("utf-8") else "\ufeff"
        assert decode_text((mark + text).encode(encoding)) == text
    assert decode_text(text.encode()) == text.removeprefix("\ufeff")


@pytest.mark.parametrize("data", [b"\xff", b"\xff\xfe", b"\xfe\xff\0", b"\xff\xfea", b"a\xff\xfe"])
def test_bytes_that_are_no_text(data: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        decode_text(data)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with replacing(tmp_path / "link", "the text") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "target"}


def test_a_file_is_replaced_when_its_successor_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(b"old")
    with replacing(path, "the note") as file:
        file.write(b"new and longer")
        file.flush()
        assert path.read_bytes() == b"old"
        (partial,) = tmp_path.glob("note.json.*.partial")
        assert partial.read_bytes() == b"new and longer"
    assert path.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path, "the note") as file:  # noqa: PT012
        file.write(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_system_refuses_names_the_file_and_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, reason in ((tmp_path / "no" / "note", "No such file or directory"), (folder, "directory")):
        with (
            pytest.raises(OutputError, match=f"{path}: the note cannot be written: .*{reason}"),
            replacing(path, "the note"),
        ):
            pass
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("fails", [False, True])
def test_two_blocks_for_one_path_do_not_disturb_each_other(tmp_path: Path, fails: bool) -> None:
    path = tmp_path / "note.json"
    with contextlib.ExitStack() as outer:
        first = outer.enter_context(replacing(path, "the note"))
        first.write(b"first, and longer")
        with contextlib.suppress(ValueError), replacing(path, "the note") as second:
            second.write(b"second")
            if fails:
                raise ValueError
        assert [path.read_bytes() for path in [path] if path.exists()] == ([] if fails else [b"second"])
    assert path.read_bytes() == b"first, and longer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_called_like_a_partial_one_stays(tmp_path: Path) -> None:
    mine = partial_path(tmp_path / "note.json")
    mine.write_bytes(b"mine")
    with replacing(tmp_path / "note.json", "the note") as file:
        file.write(b"new")
    assert mine.read_bytes() == b"mine"


def test_what_could_not_be_created_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0")
    taken = tmp_path / f"note.json.{os.getpid()}-0.partial"
    taken.write_bytes(b"mine")
    with (
        pytest.raises(OutputError, match="the note cannot be written: File exists"),
        replacing(tmp_path / "note.json", "the note"),
    ):
        pass
    assert taken.read_bytes() == b"mine"


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with replacing(path, "the note") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_name_is_on_disk_when_the_block_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[Path, bool]] = []
    path = tmp_path / "note.json"
    monkeypatch.setattr(files, "sync_directory", lambda folder: flushed.append((folder, path.exists())))
    with replacing(path, "the note") as file:
        file.write(b"new")
    assert flushed == [(tmp_path, True)]


def test_a_directory_that_may_not_be_read_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    files.sync_directory(tmp_path)


def test_outputs_that_are_refused_before_the_work(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"mine")
    os.link(path, link)
    check_output_file(path, [tmp_path / "gone"], replace=True)
    check_output_file(tmp_path / "new", [path], replace=False)
    with pytest.raises(OutputExistsError, match=r"exists already; .* replace it with --force"):
        check_output_file(path, replace=False)
    with pytest.raises(OutputExistsError, match=f"{link} is {path}, which is read"):
        check_output_file(link, [path], replace=True)
    with pytest.raises(OutputError, match="is a directory; give the name of a file"):
        check_output_file(tmp_path, replace=True)
    with pytest.raises(OutputError, match="no is not a directory; make it first"):
        check_output_file(tmp_path / "no" / "a", replace=True)
