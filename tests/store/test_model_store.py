"""The folder of stored models: what is listed, what survives changes by hand, names, deleting."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from ggufmoe.errors import InputError, OutputError
from ggufmoe.folders import data_directory
from ggufmoe.store.model_store import ModelStore, models_directory
from ggufmoe.store.records import InputState, ModelRecord, StoredFile, read_record


def never(owner: str) -> None:
    raise AssertionError(f"waits for {owner}")


def record(source: str = "org/a", *files: StoredFile) -> ModelRecord:
    return ModelRecord(source, "Q4_K_M", (f"{source} -q Q4_K_M",), files)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    found = ModelStore(tmp_path / "models")
    found.directory.mkdir()
    return found


def put(store: ModelStore, name: str, source: str = "org/a", content: bytes = b"GGUF") -> Path:
    path = store.directory / f"{name}.gguf"
    path.write_bytes(content)
    record(source, StoredFile(path.name, len(content), "00")).write(store.record_path(name))
    return path


def test_models_have_their_records(store: ModelStore) -> None:
    put(store, "b", "org/b")
    put(store, "a")
    assert [(model.name, model.record and model.record.source) for model in store.models()] == [
        ("a", "org/a"),
        ("b", "org/b"),
    ]
    found = store.find_request("org/b -q Q4_K_M")
    assert found is not None
    assert found.path == store.directory / "b.gguf"


def test_a_file_that_was_put_there_by_hand_is_a_model_without_a_record(store: ModelStore) -> None:
    (store.directory / "mine.gguf").write_bytes(b"GGUF")
    assert [(model.name, model.record) for model in store.models()] == [("mine", None)]


def test_the_record_of_a_deleted_file_is_dropped(store: ModelStore) -> None:
    put(store, "a").unlink()
    assert store.models() == []
    assert not store.record_path("a").exists()


def test_a_renamed_file_is_listed_under_its_new_name(store: ModelStore) -> None:
    put(store, "a").rename(store.directory / "other.gguf")
    assert [(model.name, model.record) for model in store.models()] == [("other", None)]


def test_a_record_does_not_count_for_a_file_of_another_size(store: ModelStore) -> None:
    put(store, "a").write_bytes(b"GGUF and more")
    assert [model.record for model in store.models()] == [None]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"source": 1}', '{"files": 7, "source": "x"}', "[" * 10_000])
def test_a_damaged_record_counts_as_absent(store: ModelStore, content: str) -> None:
    path = put(store, "a")
    store.record_path("a").write_text(content)
    assert read_record(store.record_path("a")) is None
    assert [(model.path, model.record) for model in store.models()] == [(path, None)]


def test_shards_are_one_model(store: ModelStore) -> None:
    for number in (1, 2):
        (store.directory / f"m-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    (model,) = store.models()
    assert (model.name, model.path.name, len(model.paths)) == ("m", "m-00001-of-00002.gguf", 2)


def test_a_changed_input_makes_the_model_anew(store: ModelStore, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"1")
    path = store.directory / "a.gguf"
    path.write_bytes(b"GGUF")
    ModelRecord("x", "Q8_0", ("x -q Q8_0",), (StoredFile("a.gguf", 4, "00"),), inputs=(InputState.of(source),)).write(
        store.record_path("a")
    )
    assert store.find_request("x -q Q8_0") is not None
    source.write_bytes(b"22")
    assert store.find_request("x -q Q8_0") is None
    source.unlink()
    assert store.find_request("x -q Q8_0") is None


def test_a_name_that_another_model_has_gets_a_number(store: ModelStore) -> None:
    put(store, "m", "org/m")
    (store.directory / "m-2.gguf").write_bytes(b"GGUF")
    assert store.claim("m", record("other/m"), never) == "m-3"
    assert store.claim("m", record("org/m"), never) == "m"


def test_a_claim_is_found_again_while_its_model_is_unfinished(store: ModelStore) -> None:
    put(store, "m", "org/m")
    name = store.claim("m", record("other/m"), never)
    (store.directory / f"{name}.gguf.partial").write_bytes(b"GG")
    assert [model.name for model in store.models()] == ["m"]
    assert store.claim("m", record("other/m"), never) == name == "m-2"
    assert [(left.name, left.record and left.record.source) for left in store.unfinished()] == [("m-2", "other/m")]


def test_a_claim_of_which_nothing_was_written_is_dropped(store: ModelStore) -> None:
    name = store.claim("m", record(), never)
    with store.making(name):
        store.models()
        assert store.record_path(name).exists()
    store.models()
    assert not store.record_path(name).exists()


def test_deleting(store: ModelStore) -> None:
    path = put(store, "a")
    store.record_path("a").with_name("a.manifest.json").write_text("{}")
    assert store.remove(store.named("a")) == 4
    assert not path.exists()
    assert list(store.directory.iterdir()) == []


def test_what_is_being_made_is_not_deleted(store: ModelStore) -> None:
    put(store, "a")
    with store.making("a"), pytest.raises(OutputError, match=f"being written by process {os.getpid()}"):
        store.remove(store.named("a"))


def test_names_that_are_not_there(store: ModelStore) -> None:
    put(store, "mixtral-Q4_K_M")
    assert store.find("mixtral-Q4_K_M.gguf") is not None
    with pytest.raises(InputError, match="did you mean mixtral-Q4_K_M"):
        store.named("mixtral-Q4_K_S")
    with pytest.raises(InputError, match="`ggufmoe list` shows"):
        store.named("x")


def test_models_that_were_not_used(store: ModelStore) -> None:
    put(store, "old")
    put(store, "new")
    long_ago = time.time() - 40 * 86400
    os.utime(store.record_path("old"), (long_ago, long_ago))
    assert [model.name for model in store.unused(30)] == ["old"]
    store.used(store.named("old"), "another wish")
    assert store.unused(30) == []
    assert store.find_request("another wish") == store.find("old")


def test_a_folder_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "none")
    assert (store.models(), store.unfinished(), store.find("a")) == ([], [], None)


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path))
    assert models_directory() == tmp_path / "models"
    monkeypatch.delenv("GGUFMOE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_directory() == Path("/data/ggufmoe")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/me"))
    assert data_directory() == Path("/Users/me/Library/Application Support/ggufmoe")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError

    monkeypatch.delenv("GGUFMOE_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(InputError, match="GGUFMOE_HOME"):
        models_directory()
