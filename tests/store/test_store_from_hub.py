"""Models of the hub in the store: downloads that are checked and resumed, conversions, and what is not asked again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer

import ggufmoe
from ggufmoe.cli.app import exit_code
from ggufmoe.errors import Cancelled, HubError, NoSpaceError
from ggufmoe.hub.hub_file import Line
from ggufmoe.hub.hub_models import HubEntry
from ggufmoe.placement import memory_speed
from ggufmoe.store import download as downloads
from ggufmoe.store.model_advice import choose_type
from ggufmoe.store.model_store import ModelStore
from ggufmoe.store.obtain import obtain
from ggufmoe.store.wanted import plan_model
from ggufmoe.work import Progress
from tests.own_hub import talk_with_hub
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint ``tiny``, ``files`` with GGUF files of two types and one of two parts, and ``both``."""
    folder = tmp_path_factory.mktemp("served")
    source = make_checkpoint(folder / "tiny", n_layer=1)
    for quant in ("Q8_0", "F16"):
        (folder / "files").mkdir(exist_ok=True)
        ggufmoe.convert(source, folder / "files" / f"small-{quant}.gguf", quant)
    ggufmoe.convert(source, folder / "files" / "parts-BF16.gguf", "BF16", split_max_size="100K")
    make_checkpoint(folder / "both", n_layer=1)
    (folder / "both" / "small-Q8_0.gguf").write_bytes((folder / "files" / "small-Q8_0.gguf").read_bytes())
    return folder


@pytest.fixture
def hub(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({f"org/{name}": served / name for name in ("tiny", "files", "both")}) as running:
        talk_with_hub(running.url, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(downloads, "Line", lambda: Line(0.01))
        yield running


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path / "home"))
    return ModelStore()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_checkpoint_is_converted_and_the_hub_is_asked_once(hub: HubServer, store: ModelStore, served: Path) -> None:
    path = obtain("org/tiny", "Q8_0")
    assert sha256(path) == sha256(served / "files" / "small-Q8_0.gguf")
    (model,) = store.models()
    assert model.record is not None
    assert (model.record.source, model.record.commits) == ("org/tiny", {"org/tiny": COMMIT})
    hub.reset_counts()
    assert obtain("org/tiny", "Q8_0") == path
    assert not hub.statuses


def test_a_gguf_file_is_downloaded_whole_and_once(hub: HubServer, store: ModelStore, served: Path) -> None:
    path = obtain("org/files:Q8_0")
    assert path == store.directory / "small-Q8_0.gguf"
    assert sha256(path) == sha256(served / "files" / "small-Q8_0.gguf")
    assert 0 <= hub.sent_bytes - path.stat().st_size <= downloads.CONNECTIONS, "one byte where a connection begins"
    (model,) = store.models()
    assert model.record is not None
    assert (model.record.source, model.record.files[0].sha256) == ("org/files/small-Q8_0.gguf", sha256(path))
    hub.reset_counts()
    assert obtain("org/files:Q8_0") == path
    assert not hub.statuses
    assert obtain("org/files/small-Q8_0.gguf") == obtain("org/files") == path
    assert hub.sent_bytes == 0


def test_the_files_of_a_split_model(hub: HubServer, store: ModelStore, served: Path) -> None:
    path = obtain("org/files:BF16")
    parts = sorted(served.glob("files/parts-*.gguf"))
    (model,) = store.models()
    assert path == model.path
    assert [sha256(one) for one in model.paths] == [sha256(one) for one in parts]
    assert len(parts) > 1


def test_a_type_that_a_repository_has_is_downloaded_and_another_one_converted(
    hub: HubServer, store: ModelStore
) -> None:
    assert plan_model("org/both", "Q8_0", store).hub_model is not None
    assert plan_model("org/both", "F16", store).hub_model is None
    plan = plan_model("org/tiny", None, store)
    assert (plan.hub_model, plan.file_type) == (None, "Q4_K_M")
    assert plan.network_bytes > 0


def test_names_that_the_hub_has_not(hub: HubServer, store: ModelStore) -> None:
    with pytest.raises(HubError, match=r"no such GGUF file; org/files has .*Q8_0"):
        obtain("org/files:Q2_K")
    with pytest.raises(HubError, match="org/none"):
        obtain("org/none")
    assert store.models() == []


def test_a_download_goes_on_after_an_interruption(
    hub: HubServer, store: ModelStore, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 1 << 15)
    monkeypatch.setattr(downloads, "CONNECTIONS", 1)
    cancel = threading.Event()

    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            cancel.set()

    with pytest.raises(Cancelled, match="the same command goes on with it"):
        obtain("org/files:F16", on_progress=stop, cancel=cancel)
    assert [left.name for left in store.unfinished()] == ["small-F16"]
    before = hub.sent_bytes
    path = obtain("org/files:F16")
    assert sha256(path) == sha256(served / "files" / "small-F16.gguf")
    assert hub.sent_bytes == path.stat().st_size > before
    assert store.unfinished() == []


def test_faults_of_the_network(
    hub: HubServer, store: ModelStore, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 1 << 15)
    hub.faults.resets = hub.faults.truncations = hub.faults.busy = 0.2
    assert sha256(obtain("org/files:F16")) == sha256(served / "files" / "small-F16.gguf")


def test_a_file_that_is_not_what_the_hub_says_is_deleted(hub: HubServer, store: ModelStore) -> None:
    plan = plan_model("org/files:Q8_0", None, store)
    assert plan.hub_model is not None
    (entry,) = plan.hub_model.entries
    wrong = HubEntry(entry.name, entry.n_bytes, "0" * 64)
    model = type(plan.hub_model)(plan.hub_model.repo_id, plan.hub_model.commit, (wrong,))
    store.directory.mkdir(parents=True)
    target = store.directory / "m.gguf"
    with pytest.raises(HubError, match="the hub says 000000000000"):
        downloads.download(model, [target])
    assert not target.exists()


def test_what_the_disk_cannot_hold_is_not_begun(
    hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(NoSpaceError, match=r"needs .*has 1.00 kB free"):
        obtain("org/files:Q8_0")
    assert hub.sent_bytes == 0


def test_a_disk_that_becomes_full(hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("ggufmoe.writing.place.PartialFile.write_at", refuse)
        with pytest.raises(NoSpaceError, match="became full; make room, and the same command goes on with it"):
            obtain("org/files:Q8_0")
    assert obtain("org/files:Q8_0").is_file()


def test_a_file_in_the_cache_of_the_hub_is_not_fetched(hub: HubServer, store: ModelStore, served: Path) -> None:
    from huggingface_hub import hf_hub_download

    cached = Path(hf_hub_download("org/files", "small-Q8_0.gguf"))
    hub.reset_counts()
    path = obtain("org/files:Q8_0")
    assert path.samefile(cached)
    assert hub.sent_bytes == 0
    store.remove(store.named("small-Q8_0"))
    assert cached.is_file()


def test_gguf_files_of_a_repository_are_planned_by_one_header(
    hub: HubServer, store: ModelStore, served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_speed.MeasuredSpeeds, "_speed", lambda *_: 5e10)
    assert exit_code(["plan", "org/files", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    files = {"BF16": "parts-BF16*", "F16": "small-F16*", "Q8_0": "small-Q8_0*"}
    sizes = {quant: sum(one.stat().st_size for one in served.glob(f"files/{name}")) for quant, name in files.items()}
    found = {one["file_type"]: one for one in planned["types"]}
    assert list(found) == sorted(sizes, key=lambda quant: -sizes[quant])
    assert all(abs(one["n_bytes"] - sizes[quant]) <= 16 for quant, one in found.items())
    assert [quant for quant, one in found.items() if one["is_taken"]] == ["Q8_0"], "F16 gains nothing"
    assert hub.sent_bytes <= max(sizes.values()), "the header of one model"
    assert exit_code(["plan", "org/files:Q8_0", "--json"]) == 0
    (share,) = json.loads(capsys.readouterr().out)["shares"]
    assert exit_code(["plan", str(served / "files" / "small-Q8_0.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shares"] == [share]
    exact, scaled = share["weight_bytes"] + share["kv_bytes"] + share["compute_bytes"], found["Q8_0"]["memory_bytes"]
    assert scaled == pytest.approx(exact, rel=0.1)
    assert exit_code(["plan", "org/files"]) == 0
    assert "> Q8_0" in capsys.readouterr().out
    assert choose_type("org/files") == "Q8_0"


def test_files_of_one_quant_are_told_by_their_names(
    hub: HubServer, store: ModelStore, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_speed.MeasuredSpeeds, "_speed", lambda *_: 5e10)
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a-Q8_0.gguf", "b-Q8_0.gguf"):
        (twice / name).write_bytes((served / "files" / "small-Q8_0.gguf").read_bytes())
    with HubServer({"org/twice": twice}) as other:
        talk_with_hub(other.url, monkeypatch)
        chosen = choose_type("org/twice")
        assert chosen == "a-Q8_0.gguf"
        assert plan_model("org/twice", chosen, store).source == "org/twice/a-Q8_0.gguf"
