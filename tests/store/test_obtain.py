"""A MODEL becomes a file: found, converted, downloaded, once and for all that ask, and after an interruption."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.errors import Cancelled, InputError, NoSpaceError
from ggufmoe.store.model_store import ModelStore
from ggufmoe.store.obtain import make_model, obtain
from ggufmoe.store.wanted import locate, plan_model, request_of
from ggufmoe.work import Progress
from ggufmoe.writing.place import PartialFile
from tests.tiny import make_checkpoint


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path / "home"))
    return ModelStore()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_directory_is_converted_once(store: ModelStore, source: Path, tmp_path: Path) -> None:
    path = obtain(source, "Q8_0")
    ggufmoe.convert(source, tmp_path / "expected.gguf", "Q8_0")
    assert path == store.directory / "tiny-Q8_0.gguf"
    assert sha256(path) == sha256(tmp_path / "expected.gguf")
    reports: list[Progress] = []
    assert obtain(str(source), "Q8_0", on_progress=reports.append) == path
    assert not reports
    (model,) = store.models()
    assert model.record is not None
    assert (model.record.source, model.record.file_type) == (str(source.resolve()), "Q8_0")
    assert model.record.files[0].sha256 == sha256(path)
    assert len(model.record.inputs) == len([one for one in source.iterdir() if one.is_file()])


def test_another_type_is_another_model(store: ModelStore, source: Path) -> None:
    assert obtain(source, "Q8_0").name == "tiny-Q8_0.gguf"
    assert obtain(source, "f16").name == "tiny-F16.gguf"


def test_files_and_stored_names_are_taken_as_they_are(store: ModelStore, story_path: Path) -> None:
    assert obtain(story_path) == story_path
    store.directory.mkdir(parents=True)
    stored = store.directory / "mine.gguf"
    stored.write_bytes(story_path.read_bytes())
    assert obtain("mine") == obtain("mine.gguf") == stored
    assert locate("nowhere/mine.gguf", None, store) == Path("nowhere/mine.gguf")


def test_what_is_no_model(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is neither a file, a stored model"):
        obtain("nothing")


def test_a_changed_directory_is_converted_again(store: ModelStore, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny", n_layer=1)
    path = obtain(source, "Q8_0")
    before = sha256(path)
    make_checkpoint(source, n_layer=1, seed=7)
    assert obtain(source, "Q8_0") == path
    assert sha256(path) != before
    assert [model.name for model in store.models()] == ["tiny-Q8_0"]


def test_an_interrupted_conversion_goes_on(store: ModelStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggufmoe.writing.writer.FLUSH_INTERVAL_S", 0)
    cancel = threading.Event()
    write_at = PartialFile.write_at

    def write_and_stop(file: PartialFile, offset: int, data: memoryview) -> None:
        write_at(file, offset, data)
        cancel.set()

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "write_at", write_and_stop)
        with pytest.raises(Cancelled, match="the same command goes on with it"):
            obtain(source, "Q8_0", cancel=cancel)
    assert [left.name for left in store.unfinished()] == ["tiny-Q8_0"]
    first: list[Progress] = []
    path = obtain(source, "Q8_0", on_progress=lambda progress: first.append(progress))
    assert path.is_file()
    assert store.unfinished() == []


def test_two_that_ask_at_once_make_it_once(store: ModelStore, source: Path) -> None:
    plan = plan_model(str(source), "Q8_0", store)
    is_writing, may_go_on, waits = threading.Event(), threading.Event(), threading.Event()
    made: list[Path] = []

    def hold(progress: Progress) -> None:
        if progress.phase == "write":
            is_writing.set()
            may_go_on.wait(60)

    def see(progress: Progress) -> None:
        assert progress.phase == "waiting", "the second one makes nothing"
        waits.set()

    first = threading.Thread(target=lambda: made.append(make_model(plan, store, on_progress=hold)))
    second = threading.Thread(target=lambda: made.append(make_model(plan, store, on_progress=see)))
    first.start()
    assert is_writing.wait(60)
    second.start()
    assert waits.wait(60)
    may_go_on.set()
    first.join()
    second.join()
    assert made == [store.directory / "tiny-Q8_0.gguf"] * 2


def test_one_that_waits_can_be_stopped(store: ModelStore, source: Path) -> None:
    plan = plan_model(str(source), "Q8_0", store)
    cancel = threading.Event()
    cancel.set()
    store.directory.mkdir(parents=True)
    with store.making("tiny-Q8_0"), pytest.raises(Cancelled):
        make_model(plan, store, cancel=cancel)


def test_a_full_disk(store: ModelStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(NoSpaceError, match=r"needs .*has 1.00 kB free"):
        obtain(source, "Q8_0")
    assert (store.models(), store.unfinished()) == ([], [])


def test_requests(source: Path, tmp_path: Path) -> None:
    assert request_of(source, None) == f"{source.resolve()} -q Q4_K_M"
    assert request_of("org/name", None) == "org/name"
    assert request_of("org/name", "Q8_0") == "org/name -q Q8_0"
    assert request_of("org/name@v2:Q8_0", "Q4_K_M") == "org/name@v2:Q8_0"
    assert request_of("org/name/a.gguf", None) == "org/name/a.gguf"
    for no_name in ("name", "models/a.gguf", "./org/name", "recipes/a.yaml", "/org/name"):
        assert request_of(no_name, None) is None
