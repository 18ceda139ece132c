"""Names, licences and base models, out of records, model cards and directory names."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import MappingProxyType

import pytest

from ggufmoe.checkpoint.provenance import base_model, read_provenance, record_json
from ggufmoe.checkpoint.source import BaseModel, Provenance
from ggufmoe.errors import CheckpointError

CARD = """---
license: other
license_name: tongyi
license_link: https://example.org/license
language:
- en
- de
tags: [merge, moe, 7]
base_model:
- mistralai/Mistral-7B-v0.2
- ../models/local-model/
pipeline_tag: text-generation
---
# A model
--- not front matter ---
"""


def card(directory: Path, text: str) -> Path:
    (directory / "README.md").write_text(text, encoding="utf-8")
    return directory


def test_a_model_card_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "some-model"
    directory.mkdir()
    assert read_provenance(card(directory, CARD)) == Provenance(
        name="some-model",
        license="other",
        license_name="tongyi",
        license_link="https://example.org/license",
        tags=("merge", "moe"),
        languages=("en", "de"),
        base_models=(
            BaseModel("Mistral-7B-v0.2", "mistralai", "https://huggingface.co/mistralai/Mistral-7B-v0.2"),
            BaseModel("local-model"),
        ),
    )


def test_single_values_and_windows_line_ends(tmp_path: Path) -> None:
    text = "\ufeff---\r\nlicense: [mit]\r\nlanguage: en\r\nbase_model: a/b\r\n---\r\n"
    (tmp_path / "README.md").write_bytes(text.encode())
    found = read_provenance(tmp_path)
    assert (found.license, found.languages) == ("mit", ("en",))
    assert found.base_models == (BaseModel("b", "a", "https://huggingface.co/a/b"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nlicense: mit\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: 1}\ntags: {b: 2}\nlanguage: 3\nbase_model: [[x]]\n---\n",
        f"---\nlicense: {'x' * 501}\n---\n",
        "---\nlicense: !!bool mit\n---\n",
        "---\nlicense: !!int ''\n---\n",
        "---\nlicense: !!timestamp x\n---\n",
        f"---\nlicense: mit\npadding: {'x' * 300_000}\n---\n",
    ],
)
def test_odd_cards_say_nothing(text: str, tmp_path: Path) -> None:
    assert read_provenance(card(tmp_path, text)) == Provenance(tmp_path.name)


@pytest.mark.parametrize(
    "front_matter",
    [
        "license: !!python/object/apply:os.system ['echo']",
        "a: &a [x, x]\nb: &b [*a, *a]\nlicense: mit",
        "license: [unclosed",
        "license: '\x01'",
        "{" * 200_000,
        "\n".join(" " * i + "a:" for i in range(500)),
    ],
)
def test_hostile_cards_are_ignored_with_one_line(
    front_matter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        assert read_provenance(card(tmp_path, f"---\n{front_matter}\n---\n")) == Provenance(tmp_path.name)
    (record,) = caplog.records
    assert "README.md is ignored" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_names_come_from_the_hub_id_the_cache_or_the_directory(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--the-model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert read_provenance(tmp_path, "org/model").name == "model"
    assert read_provenance(snapshot).name == "the-model"
    assert read_provenance(tmp_path).name == tmp_path.name


def test_a_record_gives_back_the_same(tmp_path: Path) -> None:
    known = Provenance(
        name="merged",
        license="apache-2.0",
        tags=("moe",),
        languages=("en",),
        base_models=(BaseModel("a", "org", "https://example.org/org/a", "v0.2"), BaseModel("b")),
        extra=MappingProxyType({"ggufmoe.recipe": "base_model: a\nexperts: …\n", "ggufmoe.gate_mode": "hidden"}),
    )
    (card(tmp_path, CARD) / "ggufmoe.json").write_bytes(record_json(known))
    assert read_provenance(tmp_path, "org/other") == known


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"name": ""},
        {"name": None},
        {"name": 3},
        {"name": "x", "surprise": "y"},
        {"name": "x", "tags": "moe"},
        {"name": "x", "extra": {"a": 1}},
        {"name": "x", "base_models": [1]},
        {"name": "x", "base_models": [{"title": "y"}]},
        {"name": "x", "base_models": 7},
    ],
)
def test_a_record_of_another_kind_is_an_error(value: object, tmp_path: Path) -> None:
    (tmp_path / "ggufmoe.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"ggufmoe\.json is not a record of ggufmoe"):
        read_provenance(tmp_path)


@pytest.mark.parametrize(("text", "name"), [("x", "x"), ("C:\\models\\y\\", "y"), ("/a/b/c", "c"), ("/", "/")])
def test_base_models_by_path(text: str, name: str) -> None:
    assert base_model(text) == BaseModel(name)
