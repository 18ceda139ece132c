"""Where chat templates are found, and which of several wins."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.checkpoint.chat_template import chat_templates, default_chat_template
from ggufmoe.errors import CheckpointError


def write(directory: Path, **files: Any) -> Path:
    """Files of a checkpoint: ``NAME_json=object`` or ``NAME_jinja=bytes``."""
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / f"{stem}.{ending}").write_bytes(data)
    return directory


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ("D", {"default": "D"}),
        ({"tool_use": "T", "default": "D"}, {"default": "D", "tool_use": "T"}),
        ([{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}], {"default": "D", "rag": "R"}),
        ([{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}], {"tool_use": "T", "rag": "R"}),
        ("\ufeffD", {"default": "D"}),
        ({"default": "\ufeffD"}, {"default": "D"}),
        ([{"name": "rag", "template": "\ufeffR"}, {"name": 1, "template": "x"}, "x", None], {"rag": "R"}),
        ({"default": 7}, {}),
        ([], {}),
        (None, {}),
        (7, {}),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config_json", "chat_template_json"])
def test_templates_in_json_files(tmp_path: Path, name: str, stated: Any, found: dict[str, str]) -> None:
    directory = write(tmp_path, **{name: {"chat_template": stated}})
    assert chat_templates(directory) == found
    assert next(iter(chat_templates(directory)), "default") == next(iter(found), "default")


def test_the_newest_place_wins_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write(tmp_path, chat_template_json={"chat_template": "oldest"})
    assert default_chat_template(directory) == "oldest"
    write(tmp_path, tokenizer_config_json={"chat_template": "older"})
    assert default_chat_template(directory) == "older"
    assert caplog.text == ""
    write(tmp_path, chat_template_jinja=b"newest")
    assert default_chat_template(directory) == "newest"
    assert caplog.text == ""
    assert chat_templates(directory) == {"default": "newest"}
    assert "chat_template.jinja is used; tokenizer_config.json has another chat template" in caplog.text


def test_two_places_that_agree_are_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write(tmp_path, tokenizer_config_json={"chat_template": "same"}, chat_template_jinja=b"same")
    assert chat_templates(directory) == {"default": "same"}
    assert caplog.text == ""


def test_named_templates_stand_beside_the_main_one(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_bytes(codecs.BOM_UTF8 + b"R")
    assert chat_templates(tmp_path) == {}
    write(tmp_path, chat_template_jinja=b"D")
    assert chat_templates(tmp_path) == {"default": "D", "rag": "R"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_a_template(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, chat_template_jinja="{{ é }}".encode(encoding))
    assert chat_templates(tmp_path) == {"default": "{{ é }}"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes('{"chat_template": "é"}'.encode(encoding))
    assert chat_templates(tmp_path) == {"default": "é"}


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: not UTF-8 text \(byte 1\)"):
        chat_templates(write(tmp_path, chat_template_jinja=b"x\xff"))


def test_a_pointer_is_no_template(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is a git-lfs pointer in the place of the file"):
        chat_templates(write(tmp_path, chat_template_jinja=pointer))


def test_an_empty_or_broken_optional_file_is_passed_over_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(b" \n")
    (tmp_path / "chat_template.json").write_bytes(b"{")
    assert chat_templates(tmp_path) == {}
    assert "chat_template.json is ignored: it is not JSON" in caplog.text
    assert "tokenizer_config.json" not in caplog.text  # which the reader of the tokenizer tells


def test_a_broken_tokenizer_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        chat_templates(tmp_path)
