"""What inspect_model counts and names, on files like ours and on strange ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.names import part_of
from ggufmoe.gguf.types import FILE_TYPES, GGMLType, ValueType
from ggufmoe.inspection.inspect import MergeReport, Share, inspect_model
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory
from ggufmoe.quant.filetypes import FileType
from tests.gguf_files import (
    ARRAY,
    N_EMBD,
    N_FF,
    N_LAYER,
    N_VOCAB,
    mixtral_metadata,
    mixtral_tensors,
    text,
    u32,
    write_gguf,
    write_mixtral,
)

EXPERT = N_LAYER * 3 * N_FF * N_EMBD
ATTENTION = N_LAYER * 3 * N_EMBD * N_EMBD


def test_parts_and_parameters_of_a_mixtral(tmp_path: Path) -> None:
    report = inspect_model(write_mixtral(tmp_path / "m.gguf", n_expert=4, n_used=2))
    matrix = N_VOCAB * N_EMBD
    router, norms = N_LAYER * 4 * N_EMBD, (2 * N_LAYER + 1) * N_EMBD
    assert {part.name: (part.n_tensors, part.n_parameters) for part in report.parts} == {
        "experts": (3 * N_LAYER, 4 * EXPERT),
        "attention": (4 * N_LAYER, ATTENTION),
        "output": (1, matrix),
        "embedding": (1, matrix),
        "router": (N_LAYER, router),
        "norms": (2 * N_LAYER + 1, norms),
    }
    others = ATTENTION + 2 * matrix + router + norms
    assert report.n_parameters == 4 * EXPERT + others
    assert report.n_active_parameters == 2 * EXPERT + others
    assert report.n_tensors == len(mixtral_tensors(4))


def test_bytes_and_bits_by_type(tmp_path: Path) -> None:
    report = inspect_model(write_mixtral(tmp_path / "m.gguf"))
    assert {share.name: share.bits_per_weight for share in report.types} == {"Q4_K": 4.5, "Q6_K": 6.5625, "F32": 32.0}
    assert [share.n_bytes for share in report.types] == sorted((s.n_bytes for s in report.types), reverse=True)
    total = sum(share.n_bytes for share in report.types)
    assert report.bits_per_weight == pytest.approx(8 * total / report.n_parameters)
    assert report.n_bytes == (tmp_path / "m.gguf").stat().st_size > total
    assert Share("empty", 0, 0, 0).bits_per_weight == 0


def test_hyper_parameters_tokenizer_and_provenance(tmp_path: Path) -> None:
    report = inspect_model(write_mixtral(tmp_path / "m.gguf"))
    hyper = report.hyper
    assert (report.architecture, report.name, report.file_type, report.gguf_version) == (
        "llama",
        "Tiny 2x",
        "Q4_K_M",
        3,
    )
    assert (hyper.n_layer, hyper.n_ctx_train, hyper.n_embd, hyper.n_ff) == (N_LAYER, 32768, N_EMBD, N_FF)
    assert (hyper.n_head, hyper.n_head_kv, hyper.key_length, hyper.sliding_window) == (4, 2, 64, None)
    assert (hyper.rope_theta, hyper.rope_dimensions) == (1e6, 64)
    assert (hyper.rope_scaling, hyper.rope_scaling_factor) == ("yarn", 4.0)
    assert (hyper.n_expert, hyper.n_expert_used) == (4, 2)
    tokenizer = report.tokenizer
    assert (tokenizer.model, tokenizer.pre, tokenizer.n_vocab) == ("llama", "default", N_VOCAB)
    assert (tokenizer.special, tokenizer.special_text) == ({"bos": 1, "eos": 2}, {"bos": "t1", "eos": "t2"})
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (True, None, False)
    assert (report.template.first_line, report.template.names) == ("{% for m in messages %}", ("tool_use",))
    assert (report.provenance, report.sampling) == ({"license": "apache-2.0", "tags": ["moe", "merge"]}, {"top_k": 40})
    assert report.base_models == (
        {"name": "Mistral 7B", "organization": "Mistralai", "repo_url": "https://example.org/m"},
    )
    assert (report.other, report.warnings, report.files) == ({"merge.gate_mode": "hidden"}, (), ("m.gguf",))


def test_a_report_is_json(tmp_path: Path) -> None:
    strange = {"x.nan": GGUFValue(ValueType.FLOAT32, float("nan")), "x.bytes": text("\udcff")}
    report = inspect_model(write_mixtral(tmp_path / "m.gguf", changes=strange)).to_dict()
    found = json.loads(json.dumps(report, allow_nan=False))
    assert found["other"] == {"merge.gate_mode": "hidden", "x.nan": "nan", "x.bytes": "\udcff"}
    assert found["parts"][0]["bits_per_weight"] == pytest.approx(5.1875)
    assert found["hyper"]["n_expert"] == 4
    assert found["bits_per_weight"] == pytest.approx(inspect_model(tmp_path / "m.gguf").bits_per_weight, abs=1e-4)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    metadata = mixtral_metadata(0, 0)
    tensors = [(name.replace("_exps", ""), kind, shape[-2:]) for name, kind, shape in mixtral_tensors(2)]
    path = write_gguf(tmp_path / "d.gguf", metadata, [entry for entry in tensors if "gate_inp" not in entry[0]])
    report = inspect_model(path)
    assert {part.name for part in report.parts} == {"feed-forward", "attention", "output", "embedding", "norms"}
    assert report.n_active_parameters == report.n_parameters
    assert (report.hyper.n_expert, report.warnings) == (0, ())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blk.3.ffn_gate_up_exps.weight", "experts"),
        ("blk.3.ffn_down_exps.bias", "experts"),
        ("blk.3.ffn_up.7.weight", "experts"),
        ("blk.3.ffn_gate_inp.weight", "router"),
        ("blk.3.exp_probs_b.bias", "router"),
        ("blk.3.ffn_gate_inp_shexp.weight", "shared experts"),
        ("blk.3.ffn_up_shexp.weight", "shared experts"),
        ("blk.3.ffn_up.weight", "feed-forward"),
        ("blk.3.attn_q_norm.weight", "norms"),
        ("output_norm.weight", "norms"),
        ("blk.3.attn_kv_a_mqa.weight", "attention"),
        ("per_layer_token_embd.weight", "embedding"),
        ("output.bias", "output"),
        ("blk.3.ssm_conv1d.weight", "other"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_tensors_belong_to_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_file_without_tensors_is_said_to_be_one(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", mixtral_metadata(2, 2))
    assert inspect_model(path).warnings == ("no tensors: only a vocabulary or metadata, which cannot be run",)


def _warnings(tmp_path: Path, changes: dict[str, GGUFValue | None], n_expert: int = 4, n_used: int = 2) -> str:
    return " | ".join(inspect_model(write_mixtral(tmp_path / "m.gguf", n_expert, n_used, changes)).warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.chat_template": None}, "no chat template: chat needs --chat-template"),
        (
            {"tokenizer.chat_template": None, "tokenizer.chat_template.rag": text("x")},
            "no chat template: chat needs --chat-template with one of ",
        ),
        ({"general.architecture": None}, "no general.architecture"),
        ({"general.type": text("adapter")}, "an adapter (LoRA), not a model"),
        ({"llama.expert_used_count": u32(5)}, "says that 5 of 4 are used"),
        ({"llama.expert_count": None}, "says that 2 of 0 are used"),
        ({"tokenizer.ggml.eos_token_id": u32(99)}, "the eos token is beyond the vocabulary of 40"),
        (
            {"tokenizer.ggml.tokens": GGUFValue(ARRAY, ["a"] * 39, ValueType.STRING)},
            "embedding has 40 rows for 39 tokens",
        ),
        (
            {"tokenizer.ggml.tokens": GGUFValue(ARRAY, ["a"] * 42, ValueType.STRING)},
            "2 added tokens (from 40 on) have no row in the output: llama.cpp does not load such a file",
        ),
        ({"llama.context_length": None}, "says no context length"),
        ({"llama.context_length": u32(0)}, "a context of 0 tokens cannot be meant"),
        ({"llama.context_length": u32(2**31)}, "a context of 2147483648 tokens cannot be meant"),
        (
            {"llama.rope.freq_base": GGUFValue(ValueType.FLOAT32, 1e4), "llama.rope.scaling.type": None},
            "Mistral 7B v0.1 has these numbers and a window of 4096",
        ),
        (
            {"ggufmoe.sliding_window": u32(4096)},
            "attends to the last 4096 tokens only, and llama.cpp has no such window for this model: past position 4096",
        ),
    ],
)
def test_faults_are_pointed_out(tmp_path: Path, changes: dict[str, GGUFValue | None], message: str) -> None:
    assert message in _warnings(tmp_path, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.rope.freq_base": GGUFValue(ValueType.FLOAT32, 1e4)},
        {"llama.rope.freq_base": GGUFValue(ValueType.FLOAT32, 1e4), "llama.context_length": u32(8192)},
        {"llama.context_length": u32(10 * 2**20)},
        {"ggufmoe.sliding_window": u32(32768)},
    ],
)
def test_long_contexts_may_be_meant(tmp_path: Path, changes: dict[str, GGUFValue | None]) -> None:
    assert "context" not in _warnings(tmp_path, changes)


def test_two_of_two_experts_is_pointed_out(tmp_path: Path) -> None:
    assert "both experts run for every token" in _warnings(tmp_path, {}, n_expert=2, n_used=2)
    assert "all" not in _warnings(tmp_path, {}, n_expert=3, n_used=2)


def test_memory_is_the_plan_s(tmp_path: Path) -> None:
    path = write_mixtral(tmp_path / "m.gguf")
    host = HostMemory(repacked={GGMLType.Q4_K: 8})
    context = ContextOptions(n_ctx=1000, cache_type_v="q8_0")
    asked, full = inspect_model(path, context, host).memory
    plan = plan_offload(read_model_header(path), context, OffloadOptions(device="none"), (), host)
    assert (asked.n_ctx, full.n_ctx) == (1024, 32768)
    assert asked.n_bytes == plan.host.n_bytes
    assert asked.kv_bytes == N_LAYER * 1024 * 2 * 64 * (2 + 34 / 32)
    assert full.kv_bytes == 32 * asked.kv_bytes
    assert asked.repacked_bytes == full.repacked_bytes > 0
    assert inspect_model(path, context).memory[0].repacked_bytes == 0


def test_memory_of_the_default_context_and_of_a_short_one(tmp_path: Path) -> None:
    path = write_mixtral(tmp_path / "m.gguf")
    assert [need.n_ctx for need in inspect_model(path).memory] == [4096, 32768]
    assert [need.n_ctx for need in inspect_model(path, ContextOptions(n_ctx=0)).memory] == [32768]
    short = write_mixtral(tmp_path / "s.gguf", changes={"llama.context_length": u32(2048)})
    assert [need.n_ctx for need in inspect_model(short).memory] == [2048]


@pytest.mark.parametrize(
    "changes",
    [
        {"general.architecture": None},
        {"general.type": text("adapter")},
        {"llama.block_count": u32(100_000)},
        {"llama.context_length": None},
    ],
)
def test_what_cannot_be_run_needs_no_memory(tmp_path: Path, changes: dict[str, GGUFValue | None]) -> None:
    memory = inspect_model(write_mixtral(tmp_path / "m.gguf", changes=changes)).memory
    assert [need.n_ctx for need in memory if need.n_ctx] == []


def test_the_recipe_of_a_merge(tmp_path: Path) -> None:
    recipe = "base_model: a\nexperts:\n  - source_model: b\n"
    keys = {"ggufmoe.recipe": text(recipe), "ggufmoe.gate_mode": text("hidden"), "ggufmoe.version": text("0.1.0")}
    report = inspect_model(write_mixtral(tmp_path / "m.gguf", changes=keys))
    assert report.merge == MergeReport(recipe, "hidden", "0.1.0")
    assert report.other == {"merge.gate_mode": "hidden"}
    assert report.to_dict()["merge"]["recipe"] == recipe
    assert report.to_dict()["memory"][0]["n_bytes"] == report.memory[0].n_bytes
    assert inspect_model(write_mixtral(tmp_path / "n.gguf")).merge is None


def test_a_legacy_file_is_explained(tmp_path: Path) -> None:
    tensors = [(f"blk.0.ffn_{n}.{e}.weight", GGMLType.F32, (8, 8)) for n in ("gate", "up", "down") for e in range(2)]
    report = inspect_model(write_gguf(tmp_path / "m.gguf", mixtral_metadata(2, 1), tensors))
    assert "legacy layout: 6 tensors hold one expert each (blk.0.ffn_gate.0.weight)" in report.warnings[0]
    assert report.n_active_parameters * 2 == report.n_parameters == 6 * 64


def test_trailing_bytes_are_pointed_out(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", mixtral_metadata(4, 2), mixtral_tensors(4), trailing=b"more")
    assert inspect_model(path).warnings == ("4 bytes behind the last tensor belong to nothing",)


def test_layers_that_differ_and_types_that_are_wrong(tmp_path: Path) -> None:
    changes: dict[str, GGUFValue | None] = {
        "llama.attention.head_count": GGUFValue(ARRAY, [4, 4], ValueType.INT32),
        "llama.attention.head_count_kv": GGUFValue(ARRAY, [2, 4], ValueType.INT32),
        "llama.feed_forward_length": GGUFValue(ARRAY, [], ValueType.INT32),
        "llama.context_length": text("long"),
        "llama.rope.freq_base": GGUFValue(ValueType.BOOL, True),
        "general.name": u32(7),
        "general.file_type": u32(99),
        "tokenizer.ggml.tokens": GGUFValue(ARRAY, [1, 2], ValueType.INT32),
        "tokenizer.ggml.add_bos_token": u32(1),
        "llama.vocab_size": u32(40),
    }
    report = inspect_model(write_mixtral(tmp_path / "m.gguf", changes=changes))
    assert (report.hyper.n_head, report.hyper.n_head_kv, report.hyper.n_ff) == (4, (2, 4), ())
    assert (report.hyper.n_ctx_train, report.hyper.rope_theta, report.name) == (None, None, None)
    assert (report.file_type, report.tokenizer.n_vocab, report.tokenizer.add_bos) == ("file type 99", 40, None)


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    report = inspect_model(write_gguf(tmp_path / "m.gguf", {}))
    assert (report.architecture, report.n_parameters, report.parts, report.file_type) == (None, 0, (), None)
    assert (report.tokenizer.n_vocab, report.bits_per_weight, report.template.n_chars) == (None, 0, None)


def test_split_models_are_counted_together(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        split = {"split.no": GGUFValue(ValueType.UINT16, number), "split.count": GGUFValue(ValueType.UINT16, 2)}
        split |= {"split.tensors.count": GGUFValue(ValueType.INT32, 2)}
        metadata = (mixtral_metadata(2, 1) if number == 0 else {}) | split
        tensor = (f"blk.{number}.ffn_up_exps.weight", GGMLType.F32, (2, 8, 8))
        paths.append(write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", metadata, [tensor]))
    report = inspect_model(paths[1])
    assert report.files == tuple(path.name for path in paths)
    assert (report.n_parameters, report.n_active_parameters, report.n_tensors) == (256, 128, 2)


def test_corrupt_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match="the version needs 4 bytes"):
        inspect_model(tmp_path / "m.gguf")


def test_file_type_names_are_those_that_are_written() -> None:
    ours = {member.id: member.name for member in FileType}
    assert {number: FILE_TYPES[number] for number in ours} == ours
    assert set(FILE_TYPES.values()) - set(ours.values()) == {"NVFP4"}
