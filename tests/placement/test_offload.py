"""Plans for imagined devices: who gets which layers, how many bytes, what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.errors import GGUFError, OptionError
from ggufmoe.gguf.header import GGUFValue, padded
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.names import experts_pattern
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.options import ALL_LAYERS, ContextOptions, OffloadOptions
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory, OffloadPlan, Place
from ggufmoe.placement.rules import chosen_devices
from tests.placement.shapes import N_EMBD, N_FF, N_HEAD_KV, model_of

MIB, GIB = 2**20, 2**30
CPU = HostMemory(16 * GIB, 16 * GIB, {GGMLType.Q4_K: 8})
EXPERT = 3 * 2 * N_FF * GGMLType.Q4_K.row_bytes(N_EMBD)
"""Bytes of the two experts of a layer."""
KV = 2 * 2 * 4096 * N_HEAD_KV * 64
"""Bytes of keys and values of a layer: two tables in float16."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelHeader:
    return model_of(tmp_path_factory.mktemp("plan") / "m.gguf", n_layer=8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelHeader:
    return model_of(tmp_path_factory.mktemp("plan") / "dense.gguf", n_layer=8, n_expert=0, tied=True)


def gpu(n_mib: float, number: int = 0, **more: Any) -> Place:
    n_bytes = int(n_mib * MIB)
    return Place(f"GPU{number}", f"GPU{number}", n_bytes, n_bytes, **more)


def plan_of(
    model: ModelHeader, devices: Sequence[Place] = (), n_ctx: int | None = None, host: HostMemory = CPU, **offload: Any
) -> OffloadPlan:
    options = OffloadOptions(**{"fit_target": 0, **offload})
    return plan_offload(model, ContextOptions(n_ctx=n_ctx), options, devices, host)


def all_bytes(model: ModelHeader) -> int:
    return sum(padded(tensor.n_bytes, 32) for tensor in model.tensors)


# ---- the CPU alone


def test_without_devices_all_is_in_the_cpu(model: ModelHeader) -> None:
    plan = plan_of(model, load_mode="none")
    assert [share.device for share in plan.shares] == ["CPU"]
    assert {buffer.name for buffer in plan.host.buffers} == {"CPU", "CPU_REPACK"}
    assert plan.host.weight_bytes == all_bytes(model)
    assert plan.host.kv_bytes == 8 * KV
    assert plan.host.layers == tuple(range(9))
    assert (plan.overrides, plan.tensor_split) == ((), ())


def test_a_mapped_file_counts_as_a_range_and_repacking_as_a_copy(model: ModelHeader) -> None:
    plan = plan_of(model, load_mode="mmap")
    mapped, repacked = plan.host.buffers
    assert (mapped.name, mapped.is_mapped) == ("CPU_Mapped", True)
    assert mapped.n_bytes == model.shards[0].header.data_bytes
    assert repacked.n_bytes == 8 * (EXPERT + 3 * N_EMBD * GGMLType.Q4_K.row_bytes(N_EMBD))
    assert any("--no-repack" in note for note in plan.notes)
    plain = plan_of(model, load_mode="mmap", repack=False)
    assert [(buffer.name, buffer.n_bytes) for buffer in plain.host.buffers] == [
        ("CPU_Mapped", model.shards[0].header.data_bytes)
    ]


def test_tied_embeddings_are_there_twice_only_where_they_must(dense: ModelHeader) -> None:
    embedding = next(tensor.n_bytes for tensor in dense.tensors if tensor.name == "token_embd.weight")
    once = plan_of(dense, load_mode="none", repack=False)
    assert once.host.weight_bytes == all_bytes(dense)
    on_gpu = plan_of(dense, [gpu(4096)], load_mode="none")
    assert on_gpu.host.weight_bytes == embedding
    assert on_gpu.shares[0].weight_bytes >= all_bytes(dense)


@pytest.mark.parametrize(("asked", "n_ctx"), [(None, 4096), (0, 32768), (1, 256), (257, 512)])
def test_the_context_is_rounded_as_llama_cpp_rounds_it(model: ModelHeader, asked: int | None, n_ctx: int) -> None:
    plan = plan_of(model, n_ctx=asked)
    assert plan.n_ctx == n_ctx
    assert plan.host.kv_bytes == 8 * KV * n_ctx // 4096


def test_quantized_caches_are_smaller(model: ModelHeader) -> None:
    context = ContextOptions(cache_type_k="q8_0", cache_type_v="q4_0")
    plan = plan_offload(model, context, OffloadOptions(), (), CPU)
    assert plan.host.kv_bytes == 8 * 4096 * N_HEAD_KV * 64 // 32 * (34 + 18)


# ---- explicit flags


def test_the_last_layers_go_to_the_gpu(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(4096)], n_gpu_layers=3)
    assert plan.shares[0].layers == (6, 7, 8)
    assert plan.host.layers == (0, 1, 2, 3, 4, 5)
    assert plan.shares[0].kv_bytes == 2 * KV
    assert not plan.fitted


@pytest.mark.parametrize("split", [(1, 1), (3, 1), (0, 1), (1, 2)])
def test_shares_divide_the_layers(model: ModelHeader, split: tuple[int, int]) -> None:
    plan = plan_of(model, [gpu(4096), gpu(4096, 1)], tensor_split=",".join(map(str, split)))
    expected = [min(layer for layer in range(10) if layer >= 9 * split[0] / sum(split)), 9]
    assert plan.shares[0].layers == tuple(range(expected[0]))
    assert plan.shares[1].layers == tuple(range(expected[0], 9))


def test_without_shares_free_memory_decides(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(1000), gpu(2000, 1)])
    assert [len(share.layers) for share in plan.shares] == [3, 6, 0]


def test_experts_are_left_out_by_flags(model: ModelHeader) -> None:
    everything = plan_of(model, [gpu(4096)]).shares[0]
    for offload, kept in (({"cpu_moe": True}, ()), ({"n_cpu_moe": 5}, (5, 6, 7)), ({"n_cpu_moe": 99}, ())):
        plan = plan_of(model, [gpu(4096)], **offload)
        assert plan.shares[0].expert_layers == kept
        assert everything.weight_bytes - plan.shares[0].weight_bytes == (8 - len(kept)) * EXPERT
        assert sum(override.n_tensors for override in plan.overrides) == 3 * (8 - len(kept))
    assert plan_of(model, [gpu(4096)], n_cpu_moe=0).overrides == ()


def test_the_first_override_wins(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(4096)], override_tensor=(r"blk\.3\..*exps=GPU0,attn_q=CPU",), cpu_moe=True)
    assert [(item.buffer, item.n_tensors) for item in plan.overrides] == [("GPU0", 3), ("CPU", 8), ("CPU", 21)]
    assert plan.shares[0].expert_layers == (3,)


def test_the_cache_stays_behind_on_request(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(4096)], kv_offload=False)
    assert (plan.shares[0].kv_bytes, plan.host.kv_bytes) == (0, 8 * KV)


def test_pinned_memory_takes_the_cpus_share(model: ModelHeader) -> None:
    place = gpu(4096, host_buffer="GPU_Host")
    pinned = plan_of(model, [place], cpu_moe=True, load_mode="none")
    assert {buffer.name for buffer in pinned.host.buffers} == {"CPU", "GPU_Host"}
    assert {b.name for b in plan_of(model, [place], cpu_moe=True, load_mode="mmap").host.buffers} == {"CPU_Mapped"}
    unpinned = plan_of(model, [place], cpu_moe=True, load_mode="none", no_host=True)
    assert {buffer.name for buffer in unpinned.host.buffers} == {"CPU", "CPU_REPACK"}
    named = plan_of(model, [place], override_tensor=("attn_q=GPU_Host",), load_mode="none")
    assert "GPU_Host" in {buffer.name for buffer in named.host.buffers}
    mapped = plan_of(model, [place], override_tensor=("attn_q=GPU_Host",), load_mode="mmap")
    assert {buffer.name for buffer in mapped.host.buffers} == {"CPU_Mapped"}


def test_devices_that_map_files_hold_ranges(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(4096, maps_files=True)])
    assert plan.shares[0].buffers[0].name == "GPU0_Mapped"
    assert plan.shares[0].buffers[0].is_mapped
    assert not plan_of(model, [gpu(4096, supports_mmap=False)]).uses_mmap


def test_devices_are_chosen_by_name(model: ModelHeader) -> None:
    devices = [gpu(4096), gpu(2048, 1)]
    assert [place.name for place in chosen_devices(OffloadOptions(device="GPU1,GPU0"), devices)] == ["GPU1", "GPU0"]
    assert chosen_devices(OffloadOptions(device="none"), devices) == ()
    assert [place.name for place in chosen_devices(OffloadOptions(split_mode="none", main_gpu=1), devices)] == ["GPU1"]
    assert not plan_of(model, devices, split_mode="row").is_exact


# ---- what fits


def test_what_fits_is_left_alone(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(4096)])
    assert (plan.n_gpu_layers, plan.overrides, plan.fitted, plan.warnings) == (9, (), False, ())


@pytest.mark.parametrize("n_mib", [64, 67, 70])
def test_experts_go_before_layers(model: ModelHeader, n_mib: int) -> None:
    plan = plan_of(model, [gpu(n_mib)])
    share = plan.shares[0]
    assert plan.fitted
    assert share.layers == tuple(range(9))
    n_moved = len(plan.host.expert_layers)
    assert 0 < n_moved <= 8
    assert plan.host.expert_layers == tuple(range(n_moved))
    assert [item.pattern for item in plan.overrides] == [experts_pattern(range(n_moved))]
    assert n_mib * MIB - EXPERT < share.n_bytes + EXPERT
    assert share.n_bytes <= n_mib * MIB


@pytest.mark.parametrize("n_mib", [20, 30, 40, 50])
def test_layers_follow_when_no_expert_is_left(model: ModelHeader, n_mib: int) -> None:
    plan = plan_of(model, [gpu(n_mib)])
    assert plan.n_gpu_layers < 9
    assert plan.shares[0].expert_layers == ()
    assert plan.shares[0].n_bytes <= n_mib * MIB
    assert not plan.warnings


def test_a_dense_model_gives_up_whole_layers(dense: ModelHeader) -> None:
    plan = plan_of(dense, [gpu(50)])
    assert 0 < plan.n_gpu_layers < 9
    assert plan.overrides == ()
    assert plan.shares[0].n_bytes <= 50 * MIB


def test_more_memory_never_holds_less(model: ModelHeader) -> None:
    held = [plan_of(model, [gpu(n_mib)]).shares[0].weight_bytes for n_mib in range(10, 110, 5)]
    assert all(before <= after for before, after in itertools.pairwise(held))


def test_two_devices_are_filled_one_after_the_other(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(50), gpu(50, 1)])
    assert plan.fitted
    assert sorted(plan.shares[0].layers + plan.shares[1].layers) == list(range(9))
    assert all(share.n_bytes <= 50 * MIB for share in plan.shares[:-1])
    assert plan.tensor_split == tuple(float(len(share.layers)) for share in plan.shares[:-1])


def test_a_margin_is_kept(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(1024 + 70)], fit_target=1024)
    assert plan.shares[0].n_bytes <= 70 * MIB


@pytest.mark.parametrize("layers", [ALL_LAYERS, 9])
def test_explicit_flags_win(model: ModelHeader, layers: int) -> None:
    plan = plan_of(model, [gpu(30)], n_gpu_layers=layers, n_cpu_moe=1)
    assert plan.n_gpu_layers == 9
    assert plan.shares[0].expert_layers == (1, 2, 3, 4, 5, 6, 7)
    assert any(warning.startswith("GPU0 has 30.0 MiB free and would need") for warning in plan.warnings)
    moved = plan_of(model, [gpu(30)], n_gpu_layers=layers)
    assert moved.n_gpu_layers == 9
    assert moved.shares[0].expert_layers == ()
    assert moved.warnings[0].startswith("it does not fit with the options given")
    off = plan_of(model, [gpu(30)], fit="off")
    assert (off.n_gpu_layers, off.overrides) == (9, ())


# ---- what is said


def test_what_offloading_gains_is_said(model: ModelHeader, tmp_path: Path) -> None:
    assert "saves memory of the GPU, but no arithmetic" in plan_of(model).notes[0]
    sparse = model_of(tmp_path / "m.gguf", n_layer=1, n_expert=8, n_used=2)
    assert "only 25% of their bytes are read" in plan_of(sparse).notes[0]
    assert "8 experts for each token instead of 2" in plan_of(sparse, n_expert_used=8).warnings[0]
    assert "instead of 2: faster" in plan_of(sparse, n_expert_used=1).warnings[0]


def test_options_for_gpus_without_one_are_told(model: ModelHeader) -> None:
    assert plan_of(model, n_gpu_layers=0).warnings == ()
    (warning,) = plan_of(model, n_gpu_layers=99, tensor_split="1,1").warnings
    assert warning.startswith("-ngl and -ts without effect: no GPU and no worker is used")
    assert plan_of(model, [gpu(4096)], n_gpu_layers=99).warnings == ()


def test_what_is_left_free_is_told(model: ModelHeader) -> None:
    assert "10.0 MiB of each GPU are left free" in " ".join(plan_of(model, [gpu(40)], fit_target=10).notes)
    assert "left free" not in " ".join(plan_of(model, [gpu(4000)], fit_target=10).notes)


def test_a_file_of_another_kind_has_no_plan(model: ModelHeader) -> None:
    shard = model.shards[0]
    metadata = {**shard.header.metadata, "general.type": GGUFValue(ValueType.STRING, "imatrix")}
    other = replace(model, shards=(replace(shard, header=replace(shard.header, metadata=metadata)),))
    with pytest.raises(GGUFError, match="an importance matrix, not a model"):
        plan_of(other)


def test_a_context_beyond_what_was_trained_is_told(model: ModelHeader) -> None:
    trained = model.get("llama.context_length")
    assert not any("was trained for" in warning for warning in plan_of(model, n_ctx=trained).warnings)
    assert any(f"longer than the {trained} that" in warning for warning in plan_of(model, n_ctx=trained + 1).warnings)


def test_texts_side_by_side_are_measured_one_by_one(model: ModelHeader) -> None:
    trained = model.get("llama.context_length")
    for n_each, n_warnings in ((trained, 0), (trained + 256, 1)):
        context = ContextOptions(n_ctx=4 * n_each, n_seq_max=4)
        warnings = plan_offload(model, context, OffloadOptions(), (), CPU).warnings
        assert [f"a context of {n_each} tokens" in warning for warning in warnings] == [True] * n_warnings


def test_a_small_memory_is_told(model: ModelHeader) -> None:
    notes = plan_of(model, host=HostMemory(MIB, MIB, CPU.repacked)).notes
    assert any("are wanted of it" in note for note in notes)
    assert any("leave it out with --no-repack" in note for note in notes)


def test_a_device_of_unknown_memory_gets_nothing(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(0)])
    assert plan.shares[0].n_bytes == 0
    assert plan.warnings == ("GPU0 does not say how much memory it has: give it layers with -ngl",)
    assert plan_of(model, [gpu(0)], n_gpu_layers=9, cpu_moe=True).shares[0].layers == tuple(range(9))


def test_mapped_experts_could_be_faster(model: ModelHeader) -> None:
    assert any("-lm none" in note for note in plan_of(model, [gpu(4096)], cpu_moe=True).notes)
    assert not any("-lm none" in note for note in plan_of(model, [gpu(4096)]).notes)


def test_other_caches_are_called_estimates(tmp_path: Path) -> None:
    changes = {
        "general.architecture": GGUFValue(ValueType.STRING, "deepseek4"),
        "deepseek4.block_count": GGUFValue(ValueType.UINT32, 2),
        "deepseek4.attention.head_count": GGUFValue(ValueType.ARRAY, [8, 4], ValueType.UINT32),
    }
    plan = plan_of(model_of(tmp_path / "m.gguf", n_layer=2, changes=changes))
    assert any("deepseek4 is not that of a plain transformer" in note for note in plan.notes)
    assert not plan.is_kv_exact


def test_a_plan_is_plain_values(model: ModelHeader) -> None:
    found = json.loads(json.dumps(plan_of(model, [gpu(4096)]).to_dict()))
    assert found["shares"][0]["weight_bytes"] == plan_of(model, [gpu(4096)]).shares[0].weight_bytes


def test_a_summary_has_the_sums_of_each_device(model: ModelHeader) -> None:
    plan = plan_of(model, [gpu(4096)], n_gpu_layers=4, cpu_moe=True)
    found = json.loads(json.dumps(plan.summary()))
    assert [device["name"] for device in found["devices"]] == ["GPU0", "CPU"]
    assert [device["weight_bytes"] for device in found["devices"]] == [share.weight_bytes for share in plan.shares]
    assert sum(device["layers"] for device in found["devices"]) == plan.n_layer == found["n_layer"]
    assert [device["expert_layers"] for device in found["devices"]] == [0, plan.n_layer]
    assert found["n_gpu_layers"] == 4


# ---- what is refused


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"device": "CUDA0"}, "--device CUDA0: there is no such device; there is GPU0"),
        ({"split_mode": "none", "main_gpu": 1}, "--main-gpu 1: there are 1 devices"),
        ({"tensor_split": "1,2"}, "2 shares for 1 devices"),
        ({"override_tensor": ("attn_qq=CPU",)}, "matches no tensor; near names: .*attn_q"),
        ({"override_tensor": ("attn_(=CPU",)}, "not a regular expression"),
        ({"override_tensor": ("attn_q=CUDA0",)}, "there is no buffer CUDA0; there is CPU, GPU0"),
        ({"n_expert_used": 3}, "has 2 experts in a layer"),
    ],
)
def test_what_is_not_there_is_refused(model: ModelHeader, offload: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_of(model, [gpu(4096)], **offload)


def test_a_dense_model_has_no_experts_to_move(dense: ModelHeader) -> None:
    for offload in ({"cpu_moe": True}, {"n_cpu_moe": 2}, {"n_expert_used": 1}):
        with pytest.raises(OptionError, match="no experts"):
            plan_of(dense, [gpu(4096)], **offload)


def test_tensor_mode_needs_a_gpu(model: ModelHeader) -> None:
    with pytest.raises(OptionError, match="needs a GPU"):
        plan_of(model, split_mode="tensor")


def test_absurd_numbers_of_layers_are_refused(tmp_path: Path) -> None:
    model = model_of(
        tmp_path / "m.gguf", n_layer=1, changes={"llama.block_count": GGUFValue(ValueType.UINT32, 2**31 - 1)}
    )
    with pytest.raises(GGUFError, match="block_count is 2147483647, expected 1 to 512"):
        plan_of(model)


@pytest.mark.parametrize(
    "offload",
    [
        {"tensor_split": "a,b"},
        {"tensor_split": "0,0"},
        {"tensor_split": "1e300"},
        {"tensor_split": "nan"},
        {"override_tensor": ("=CPU",)},
        {"override_tensor": ("a=CPU,b",)},
        {"cpu_moe": True, "n_cpu_moe": 1},
        {"n_gpu_layers": -3},
        {"n_cpu_moe": -1},
    ],
)
def test_impossible_options_are_refused_at_once(offload: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        OffloadOptions(**offload)


def test_patterns_may_hold_commas() -> None:
    assert OffloadOptions(override_tensor=(r"blk\.\d{1,2}\.x=CPU,y=GPU0",)).overrides == (
        (r"blk\.\d{1,2}\.x", "CPU"),
        ("y", "GPU0"),
    )
