"""Placement held against libllama's own report: RPC workers on loopback are the GPUs."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

import ggufmoe
from ggufmoe import ContextOptions, Engine, OffloadOptions, OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import backends
from ggufmoe.placement.devices import DeviceTable, find_devices, repacked_types
from ggufmoe.placement.load_report import placement_of, read_report
from ggufmoe.placement.model_params import set_parameters
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory, OffloadPlan, Place
from tests.placement.shapes import model_of

TIED: dict[str, Any] = {
    "arch": "llama",
    "tie": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}
"""Embeddings that are the output too, and a tensor of rope frequencies that all layers share."""
ROOT = Path(__file__).parents[2]
MIB = 2**20
Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placement") / "m.gguf"
    ggufmoe.convert(tiny_checkpoint(n_layer=4, n_ff=2048), path, quant="Q4_K_M", threads=1)
    return path


@contextlib.contextmanager
def worker() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.remote.rpc_worker", endpoint]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield endpoint
    finally:
        process.kill()
        process.wait()


def wait_for(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"no worker at {endpoint}")


@pytest.fixture(scope="module")
def outcomes(model: Path) -> Outcomes:
    with worker() as first, worker() as second:
        for endpoint in (first, second):
            wait_for(endpoint)
        command = [sys.executable, "-m", "tests.placement.placed_child", str(model), first, second]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: Outcomes = json.loads(done.stdout)
    return found


CASES = ("cpu", "default", "rpc", "cpu_moe", "n_cpu_moe", "mapped", "ot", "split", "fit", "one_expert")


def weights(outcome: dict[str, Any], device: int = 0) -> tuple[int, int]:
    """Planned and reported bytes of the buffer of a GPU."""
    (buffer,) = outcome["plan"]["shares"][device]["buffers"]
    return buffer["n_bytes"], outcome["report"]["weight_bytes"][buffer["name"]]


@pytest.mark.parametrize("case", CASES)
def test_libllama_reports_what_was_planned(case: str, outcomes: Outcomes) -> None:
    assert outcomes[case]["differences"] == []
    plan, report = outcomes[case]["plan"], outcomes[case]["report"]
    planned = {buffer["name"]: buffer["n_bytes"] for share in plan["shares"] for buffer in share["buffers"]}
    assert planned == pytest.approx(report["weight_bytes"], rel=0.01, abs=0.006 * MIB)
    kv = sum(share["kv_bytes"] for share in plan["shares"])
    assert sum(report["kv_bytes"].values()) == kv == 512 * 4 * 2 * (2 * 64) * 2
    assert report["n_layers_offloaded"] == plan["n_gpu_layers"]


@pytest.mark.parametrize("case", [case for case in CASES if case != "one_expert"])
def test_the_answer_is_that_of_the_cpu(case: str, outcomes: Outcomes) -> None:
    assert outcomes[case]["tokens"] == outcomes["cpu"]["tokens"]
    assert outcomes[case]["logits"] == pytest.approx(outcomes["cpu"]["logits"], abs=0.05)


def test_remote_devices_are_used_only_when_they_are_named(outcomes: Outcomes) -> None:
    assert [share["device"] for share in outcomes["default"]["plan"]["shares"]] == ["CPU"]
    assert [share["device"] for share in outcomes["rpc"]["plan"]["shares"]] == ["RPC0", "CPU"]


def test_experts_stay_with_the_cpu(outcomes: Outcomes) -> None:
    everything, without = weights(outcomes["rpc"]), weights(outcomes["cpu_moe"])
    experts = 4 * 3 * 2 * GGMLType.Q4_K.row_bytes(256) * 2048
    assert everything[0] - without[0] == pytest.approx(experts, rel=0.15)
    assert len(outcomes["cpu_moe"]["report"]["overridden"]) == 12
    named = outcomes["n_cpu_moe"]["report"]["overridden"]
    assert {name.split(".")[1] for name in named} == {"0", "1", "2"}
    assert outcomes["n_cpu_moe"]["plan"]["shares"][0]["expert_layers"] == [3]


def test_the_kv_cache_can_stay_with_the_cpu(outcomes: Outcomes) -> None:
    assert list(outcomes["n_cpu_moe"]["report"]["kv_bytes"]) == ["CPU"]
    assert list(outcomes["cpu"]["report"]["kv_bytes"]) == ["CPU"]
    assert "CPU" not in outcomes["rpc"]["report"]["kv_bytes"]


def test_named_tensors_go_where_they_are_sent(outcomes: Outcomes) -> None:
    overridden = outcomes["ot"]["report"]["overridden"]
    gone = {name for name, buffer in overridden.items() if buffer.startswith("RPC0")}
    assert "blk.0.ffn_up_exps.weight" in gone
    assert {name for name in overridden if "attn_q" in name}.isdisjoint(gone)
    assert outcomes["ot"]["plan"]["shares"][0]["expert_layers"] == [0, 1, 3]


def test_layers_are_split_by_the_shares_given(outcomes: Outcomes) -> None:
    first, second, _ = outcomes["split"]["plan"]["shares"]
    assert (first["layers"], second["layers"]) == ([0, 1, 2], [3, 4])
    assert all(reported > 0 for reported in (weights(outcomes["split"])[1], weights(outcomes["split"], 1)[1]))


def test_experts_are_fitted_to_the_memory(outcomes: Outcomes) -> None:
    plan = outcomes["fit"]["plan"]
    assert plan["fitted"]
    assert plan["n_gpu_layers"] == 5
    assert plan["shares"][0]["expert_layers"] == [2, 3]
    assert plan["shares"][0]["layers"] == [0, 1, 2, 3, 4]


def test_fewer_experts_give_another_answer(outcomes: Outcomes) -> None:
    assert outcomes["one_expert"]["logits"] != pytest.approx(outcomes["cpu"]["logits"], abs=1e-3)
    assert "1 expert for each token instead of 2" in outcomes["one_expert"]["plan"]["warnings"][0]


# ---- the engine, without a GPU


@pytest.mark.parametrize("mode", ["none", "mmap"])
@pytest.mark.parametrize("kind", ["Q2_K", "Q4_0", "Q8_0", "split", "tied", "narrow"])
def test_every_buffer_of_the_cpu_is_foreseen(
    kind: str, mode: Literal["none", "mmap"], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    special: dict[str, dict[str, Any]] = {"tied": TIED, "narrow": {"n_embd": 64, "n_ff": 96}}
    fields = special.get(kind, {})
    quant = kind if kind.startswith("Q") else "Q4_K_M"
    size = "400K" if kind == "split" else None
    ggufmoe.convert(tiny_checkpoint(**fields), tmp_path / "m.gguf", quant=quant, threads=1, split_max_size=size)
    path = min(tmp_path.glob("m*.gguf"))
    with Engine(path, ContextOptions(n_ctx=256, n_threads=1), OffloadOptions(load_mode=mode, device="none")) as engine:
        placement = engine.placement
    planned = {buffer.name: buffer.n_bytes for buffer in placement.plan.host.buffers}
    assert planned == pytest.approx(dict(placement.report.weight_bytes), rel=0.01, abs=0.02 * MIB)
    assert placement.differences == ()


@pytest.mark.parametrize(("n_ctx", "n_seq_max", "share"), [(1000, 3, 512), (300, 1, 512), (257, 2, 256)])
def test_the_context_of_several_sequences_is_foreseen(model: Path, n_ctx: int, n_seq_max: int, share: int) -> None:
    context = ContextOptions(n_ctx=n_ctx, n_seq_max=n_seq_max, n_threads=1)
    with Engine(model, context, OffloadOptions(device="none")) as engine:
        assert (engine.n_ctx, engine.placement.plan.n_ctx) == (share, share * n_seq_max)
        assert sum(engine.placement.report.kv_bytes.values()) == engine.placement.plan.host.kv_bytes
        assert engine.placement.differences == ()


def test_what_was_chosen_with_a_cost_is_a_warning(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "ggufmoe"),
        Engine(model, ContextOptions(n_ctx=256, n_threads=1), OffloadOptions(n_expert_used=1)) as engine,
    ):
        assert engine.placement.plan.n_expert_used == 1
        assert engine.placement.differences == ()
    assert any("1 expert for each token instead of 2" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        (OffloadOptions(device="CUDA7"), r"--device CUDA7: there is no such device"),
        (OffloadOptions(override_tensor=("ffn_upp_exps=CPU",)), r"matches no tensor; near names: .*ffn_up_exps"),
        (OffloadOptions(override_tensor=("exps=CUDA9",)), r"there is no buffer CUDA9; there is CPU"),
        (OffloadOptions(n_expert_used=3), r"--n-expert-used 3: the model has 2 experts"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(model: Path, offload: OffloadOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Engine(model, offload=offload)


def test_this_machine_is_found() -> None:
    machine = find_devices("none")
    assert machine.places == ()
    assert machine.host.total_bytes > 2**28
    assert machine.host.name == "CPU"
    assert "CPU" in machine.buffer_handles
    assert set(repacked_types().values()) <= {4, 8}


def test_an_engine_whose_amx_code_crashes_uses_no_extra_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "has_broken_amx", lambda: True)
    assert repacked_types() == {}
    parameters = SimpleNamespace()
    machine = DeviceTable((), HostMemory(), {}, {}, {})
    plan = plan_offload(model_of(tmp_path / "m.gguf"), ContextOptions(), OffloadOptions(), (), HostMemory(name="CPU"))
    set_parameters(None, parameters, machine, plan, OffloadOptions(), "llama.expert_used_count")
    assert parameters.use_extra_bufts is False
    assert "llama.cpp#20824" in caplog.text


# ---- the comparison


def simple_plan(tmp_path: Path) -> OffloadPlan:
    devices = (Place("GPU0", "GPU0", 2**33, 2**33),)
    return plan_offload(
        model_of(tmp_path / "m.gguf"), ContextOptions(), OffloadOptions(cpu_moe=True), devices, HostMemory(name="CPU")
    )


def test_a_difference_names_both_numbers(tmp_path: Path) -> None:
    plan = simple_plan(tmp_path)
    machine = DeviceTable((Place("GPU0", "GPU0", 2**33, 2**33),), HostMemory(), {}, {}, {})
    lines = [
        "load_tensors: offloaded 3/9 layers to GPU",
        "tensor blk.0.ffn_up_exps.weight (0 MiB q4_K) buffer type overridden to CPU",
        "load_tensors:         GPU0 model buffer size =   100.00 MiB",
        "load_tensors:   CPU_Mapped model buffer size =     1.00 MiB",
        "llama_kv_cache:       GPU0 KV buffer size =     1.00 MiB",
    ]
    differences = placement_of(plan, lines, machine).differences
    assert differences[0] == "24 tensors were to be overridden, libllama did so with 1"
    assert differences[1] == "9 layers were to be offloaded, libllama did so with 3"
    planned = plan.shares[0].weight_bytes / MIB
    assert f"GPU0: weights: planned {planned:.2f} MiB, libllama says 100.00 MiB" in differences
    assert any(line.startswith("GPU0: KV cache: planned 32.00 MiB, libllama says 1.00") for line in differences)
    assert any(line.startswith("CPU: weights: planned") for line in differences)


def test_buffers_of_one_name_are_summed() -> None:
    report = read_report(["x:  CPU_Mapped model buffer size = 1.50 MiB", "x:  CPU_Mapped model buffer size = 2.25 MiB"])
    assert report.weight_bytes == {"CPU_Mapped": round(3.75 * MIB)}
    assert report.n_layers_offloaded is None
