"""Conversion straight from the hub: the bytes of the directory, nothing stored but the output, and resuming."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import COMMIT, Faults, HubServer, Model

import ggufmoe
from ggufmoe.cli.conversion import show_plan
from ggufmoe.convert import plan_convert
from ggufmoe.errors import Cancelled, CheckpointError
from ggufmoe.hub import hub_http, read_ahead
from ggufmoe.merge.kept_router import KeptRouter
from ggufmoe.work import Progress
from ggufmoe.writing.journal import journalled_commits
from tests.own_hub import talk_with_hub
from tests.sizing.drawn import saved
from tests.tiny import make_checkpoint

HEADER_BYTES = 1 << 16
"""What is asked for first of every tensor file."""

CHILD = """
import json, sys
import huggingface_hub.constants
import ggufmoe, ggufmoe.convert
from ggufmoe.hub import read_ahead
read_ahead.READ_AHEAD_BYTES, read_ahead.CHUNK_BYTES = 1 << 18, 1 << 16
ggufmoe.convert.NETWORK_FLUSH_INTERVAL_S = 0
print(json.dumps(ggufmoe.convert("org/tiny", sys.argv[1], "BF16", resume=True).to_dict()))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("served") / "tiny", max_shard_bytes=2_000_000)


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({"org/tiny": source}) as running:
        talk_with_hub(running.url, monkeypatch, tmp_path / "cache")
        yield running


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def n_shards(directory: Path) -> int:
    return len(list(directory.glob("*.safetensors")))


def test_ranges_give_the_bytes_of_the_directory_and_store_nothing_else(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    expected, output = tmp_path / "expected.gguf", tmp_path / "m.gguf"
    ggufmoe.convert(source, expected)
    result = ggufmoe.convert("org/tiny", output)
    assert digest(output) == digest(expected)
    assert result.to_dict()["commits"] == {"org/tiny": COMMIT}
    assert result.network_bytes == hub.sent_bytes <= weight_bytes(source) + n_shards(source) * HEADER_BYTES
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("direct_bytes", [1 << 15, 1 << 40])
def test_faults_of_the_network_change_no_byte(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_bytes: int
) -> None:
    monkeypatch.setattr(hub_http, "_DIRECT_BYTES", direct_bytes)
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 1 << 16)
    hub.faults = Faults(resets=0.1, truncations=0.05, busy=0.05, wrong_ranges=0.05, seed=5)
    expected, output = tmp_path / "expected.gguf", tmp_path / "m.gguf"
    ggufmoe.convert(source, expected, "BF16")
    ggufmoe.convert("org/tiny", output, "BF16")
    assert digest(output) == digest(expected)
    assert any(one.n_bytes < one.end - one.begin for one in hub.sent), "no connection broke off"
    assert hub.statuses[503] > 0


def test_an_interrupted_run_goes_on_with_its_commit(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C, though the branch has moved meanwhile; what was written is not fetched again."""
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES", 1 << 18)
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 1 << 16)
    expected, output, stop = tmp_path / "expected.gguf", tmp_path / "m.gguf", threading.Event()
    ggufmoe.convert(source, expected, "BF16")
    hub.faults.stall_after = weight_bytes(source) // 2

    def interrupt(progress: Progress) -> None:
        if progress.done:
            stop.set()

    with pytest.raises(Cancelled, match="go on with --resume"):
        ggufmoe.convert("org/tiny", output, "BF16", on_progress=interrupt, cancel=stop)
    assert journalled_commits(tmp_path / "m.gguf.partial.journal") == {"org/tiny": COMMIT}

    hub.faults.stall_after = float("inf")
    hub.models["org/tiny"].commit, hub.models["org/tiny"].revisions = "2" * 40, {"old": COMMIT}
    hub.reset_counts()
    result = ggufmoe.convert("org/tiny", output, "BF16", resume=True)
    assert digest(output) == digest(expected)
    assert result.plan.commits == {"org/tiny": COMMIT}
    assert 0 < result.bytes_read < weight_bytes(source) - 50_000
    assert hub.sent_bytes <= result.bytes_read + n_shards(source) * HEADER_BYTES


def test_after_a_kill_only_what_was_in_flight_is_fetched_again(source: Path, tmp_path: Path) -> None:
    expected, output = tmp_path / "expected.gguf", tmp_path / "m.gguf"
    first = ggufmoe.convert(source, expected, "BF16")
    journal = tmp_path / "m.gguf.partial.journal"
    with HubServer({"org/tiny": source}, Faults(stall_after=weight_bytes(source) * 2 // 3)) as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", CHILD, str(output)]
        with subprocess.Popen(command, env=clean_environment() | own) as process:
            while '"done"' not in (journal.read_text() if journal.exists() else ""):
                assert process.poll() is None, "it has ended by itself"
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
        hub.faults.stall_after = float("inf")
        hub.reset_counts()
        done = subprocess.run(command, env=clean_environment() | own, capture_output=True, text=True, timeout=120)
        report = json.loads(done.stdout)
    assert digest(output) == digest(expected)
    assert 0 < report["bytes_read"] < first.bytes_read
    assert hub.sent_bytes <= report["bytes_read"] + n_shards(source) * HEADER_BYTES


def test_a_recipe_reads_its_models_by_ranges(
    hub: HubServer, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    models = {f"org/{name}": tiny_checkpoint(arch="mistral", seed=seed) for name, seed in (("a", 1), ("b", 2))}
    hub.models |= {name: Model(path) for name, path in models.items()}
    experts = [{"source_model": name, "positive_prompts": [f"about {name}"]} for name in models]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "org/a", "experts": experts, "gate_mode": "hidden"}))
    by_ranges = ggufmoe.convert(recipe, tmp_path / "ranges.gguf")
    assert by_ranges.plan.commits == dict.fromkeys(models, COMMIT)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    merged = ggufmoe.merge(recipe, tmp_path / "merged")
    assert merged.commits == dict.fromkeys(models, COMMIT)
    kept = ggufmoe.convert(recipe, tmp_path / "kept.gguf", keep_source=True)
    assert (kept.plan.commits, kept.network_bytes) == ({}, 0)
    assert digest(tmp_path / "ranges.gguf") == digest(tmp_path / "kept.gguf")
    ggufmoe.convert(tmp_path / "merged", tmp_path / "of-merged.gguf")
    assert digest(tmp_path / "ranges.gguf") == digest(tmp_path / "of-merged.gguf")


def test_a_router_is_not_computed_again_over_the_network(
    hub: HubServer, tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "READ_AHEAD_BYTES", 1 << 18)
    hub.models |= {f"org/{n}": Model(tiny_checkpoint(arch="mistral", seed=n)) for n in (1, 2)}
    experts = [{"source_model": f"org/{n}", "positive_prompts": [f"about {n}"]} for n in (1, 2)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "org/1", "experts": experts, "gate_mode": "hidden"}))
    whole = ggufmoe.convert(recipe, tmp_path / "whole.gguf", "BF16")
    assert whole.plan.network is not None
    embedding_rows = whole.network_bytes - whole.plan.network.n_bytes
    assert 0 <= embedding_rows < 10_000

    output, stop, phases = tmp_path / "m.gguf", threading.Event(), set()
    kept = tmp_path / "m.gguf.partial.router"

    def interrupt(progress: Progress) -> None:
        phases.add(progress.phase)
        if progress.phase == "write" and progress.done:
            stop.set()

    with pytest.raises(Cancelled):
        ggufmoe.convert(recipe, output, "BF16", on_progress=interrupt, cancel=stop)
    assert (phases, kept.exists()) == ({"router", "write"}, True)

    phases.clear()
    resumed = ggufmoe.convert(recipe, output, "BF16", resume=True, on_progress=lambda one: phases.add(one.phase))
    assert (phases, kept.exists()) == ({"write"}, False)
    assert digest(output) == digest(tmp_path / "whole.gguf")
    assert resumed.router_report == whole.router_report


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_the_router_has_read_is_kept_for_the_writing(
    hub: HubServer, tmp_path: Path, tiny_checkpoint: Callable[..., Path], share: float
) -> None:
    """The base is one of the experts, so that all that the router reads is written."""
    hub.models |= {f"org/{n}": Model(tiny_checkpoint(arch="mistral", seed=n)) for n in (1, 2)}
    experts = [{"source_model": f"org/{n}", "positive_prompts": [f"about {n}"]} for n in (1, 2)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "org/1", "experts": experts, "gate_mode": "hidden"}))
    plain = ggufmoe.convert(recipe, tmp_path / "plain.gguf", "BF16")
    reads = plain.plan.network
    assert reads is not None
    assert reads.twice_bytes == reads.router_bytes > 1_000_000
    size = int(share * reads.twice_bytes) // 1000
    kept = ggufmoe.convert(recipe, tmp_path / "kept.gguf", "BF16", source_cache=f"{size}K")
    assert plain.network_bytes - kept.network_bytes == size * 1000
    assert digest(tmp_path / "kept.gguf") == digest(tmp_path / "plain.gguf")
    merged = ggufmoe.merge(recipe, tmp_path / "merged", source_cache="1G")
    assert merged.network_bytes == plain.network_bytes - reads.twice_bytes
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "kept.gguf", "plain.gguf", "recipe.yaml"
    ]  # fmt: skip


def test_a_router_that_was_left_damaged_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.gguf.partial.router"
    assert KeptRouter(path, "key", read=True).load() is None
    path.write_bytes(b"PK\x03\x04 cut short")
    assert KeptRouter(path, "key", read=True).load() is None
    assert "the router is computed again" in caplog.text


def test_a_plan_tells_what_comes_over_the_network(
    hub: HubServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_convert("org/tiny", tmp_path / "m.gguf", "BF16")
    assert plan.network is not None
    assert plan.network.file_bytes == weight_bytes(source)
    done = ggufmoe.convert("org/tiny", tmp_path / "m.gguf", "BF16")
    assert done.network_bytes == plan.network.n_bytes
    show_plan(plan, as_json=False)
    told = capsys.readouterr().out
    assert f"read from the hub by ranges: org/tiny@{COMMIT[:12]}\n" in told
    assert "over the network 4.54 MB: 1 s at 50 Mbit/s, 0 s at 500 Mbit/s\n" in told
    assert "with --keep-source 4.35 MB more, in the hub's cache, and 4.35 MB over the network\n" in told
    show_plan(plan, as_json=False, line_mbit=1)
    assert "over the network 4.54 MB: 36 s at 1 Mbit/s\n" in capsys.readouterr().out
    assert plan_convert(source, tmp_path / "n.gguf", "BF16").network is None


def test_a_plan_downloads_nothing_and_counts_what_is_cached(
    hub: HubServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_convert("org/tiny", tmp_path / "m.gguf", "BF16", keep_source=True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    ggufmoe.convert("org/tiny", tmp_path / "m.gguf", "BF16", keep_source=True)
    hub.reset_counts()
    plan = plan_convert("org/tiny", tmp_path / "m.gguf", "BF16")
    assert hub.sent_bytes == 0
    show_plan(plan, as_json=False)
    told = capsys.readouterr().out
    assert "read from the hub's cache: 4.35 MB\n" in told
    assert "over the network nothing; on disk 4." in told


@pytest.mark.parametrize(("share", "told"), [(None, "come twice; --source-cache 1G keeps them"), ("500K", "500 kB of")])
def test_a_plan_tells_what_comes_twice(
    hub: HubServer,
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    share: str | None,
    told: str,
) -> None:
    hub.models |= {f"org/{n}": Model(tiny_checkpoint(arch="mistral", seed=n)) for n in (1, 2)}
    experts = [{"source_model": f"org/{n}", "positive_prompts": [f"about {n}"]} for n in (1, 2)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "org/1", "experts": experts, "gate_mode": "hidden"}))
    plan = plan_convert(recipe, tmp_path / "m.gguf", source_cache=share)
    assert plan.network is not None
    assert plan.network.kept_bytes == (500_000 if share else 0)
    assert plan.network.n_bytes == plan.network.write_bytes + plan.network.router_bytes - plan.network.kept_bytes
    show_plan(plan, as_json=False)
    assert told in capsys.readouterr().out


def test_a_damaged_header_is_refused_as_that_of_a_local_file_is(hub: HubServer, tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(9)
        file.write(b"\xff")
    hub.models["org/broken"] = Model(broken)
    for name in ("org/broken", str(broken)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the header is not UTF-8 JSON"):
            ggufmoe.convert(name, tmp_path / "m.gguf")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}


def test_a_size_reads_weights_over_the_network_and_the_next_one_only_writes(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    shapes = {tensor.name: tensor.shape for tensor in plan_convert(source, tmp_path / "x.gguf", "BF16").tensors}
    words = {"sensitivity": saved(tmp_path / "s.gguf", shapes), "types": "k", "quantizer": "ggml"}
    expected, first, second = (tmp_path / name for name in ("expected.gguf", "first.gguf", "second.gguf"))
    ggufmoe.convert(source, expected, "6bpw", **words)  # type: ignore[arg-type]
    result = ggufmoe.convert("org/tiny", first, "6bpw", **words)  # type: ignore[arg-type]
    assert digest(first) == digest(expected)
    once = weight_bytes(source) + n_shards(source) * HEADER_BYTES
    assert once < result.network_bytes == hub.sent_bytes <= 2 * once
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    again = ggufmoe.convert("org/tiny", second, "6.5bpw", **words)  # type: ignore[arg-type]
    assert again.network_bytes <= once
