"""Types and bytes against llama_model_quantize. ``scripts/check_policy.py`` does the full product of the first half."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, IGNORES_IMATRIX, WRITABLE_TYPES, FileType
from ggufmoe.quant.kernels import quantize_rows
from ggufmoe.quant.policy import TensorShape, TypePolicy, choose_types
from tests.quant.llama_quantize import Specimen, compare_types, quantize, read_tensors, stored, write_model

ROWS = ((512, 256), (288, 512), (288, 288))
SHAPES = [
    *(Specimen(n_expert, 9, n_head=8, n_head_kv=4) for n_expert in (0, 2, 3, 4, 8)),
    *(Specimen(n_expert, 9, n_head=8, n_head_kv=2, tied=True) for n_expert in (0, 2, 3, 4, 8)),
    *(Specimen(n_expert, 17, n_head=8, n_head_kv=8 // gqa) for n_expert in (0, 2) for gqa in (1, 2, 4, 8)),
    *(Specimen(n_expert, 2, n_embd, n_ff) for n_expert in (0, 3) for n_embd, n_ff in ROWS),
    *(Specimen(8, 2, 272, 384, tied=tied) for tied in (False, True)),
    Specimen(0, 80, n_head=8, n_head_kv=4),
]
OVERRIDES = [
    TypePolicy(FileType.F32, pure=True),
    TypePolicy(FileType.F32, output_tensor_type=GGMLType.Q5_0),
    TypePolicy(FileType.F32, token_embedding_type=GGMLType.Q8_0),
    TypePolicy(FileType.F32, output_tensor_type=GGMLType.F16, token_embedding_type=GGMLType.Q6_K, pure=True),
    TypePolicy(FileType.F32, (("ffn_(up|down)", GGMLType.Q5_K), (r"blk\.[[:digit:]]\.attn_[qk]\.", GGMLType.F16))),
    TypePolicy(FileType.F32, ((r"blk\.[02468]\.(ffn_down|attn_v)", GGMLType.IQ4_XS), ("token_embd", GGMLType.Q5_0))),
]


def shape_id(shape: Specimen) -> str:
    tied = "-tied" if shape.tied else ""
    heads = f"{shape.n_head}x{shape.n_head_kv}"
    return f"{shape.n_expert}x-{shape.n_layer}layers-{shape.n_embd}-{shape.n_ff}-{heads}{tied}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_types_of_every_file_type(shape: Specimen, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", shape)
    results = [
        compare_types(path, shape, TypePolicy(file_type), imatrix=imatrix)
        for file_type in FileType
        for imatrix in (False, True)
    ]
    assert [what for _, found in results for what in found] == []
    assert sum(count for count, _ in results) > 50 * len(shape.tensors())


@pytest.mark.parametrize(
    "shape",
    [Specimen(2, 9), Specimen(0, 9, tied=True), Specimen(8, 3, 288, 512), Specimen(3, 3, 272, 256)],
    ids=shape_id,
)
def test_types_under_overrides(shape: Specimen, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", shape)
    results = [
        compare_types(path, shape, replace(policy, file_type=file_type), imatrix=imatrix)
        for policy in OVERRIDES
        for file_type in FileType
        for imatrix in (False, True)
    ]
    assert [what for _, found in results for what in found] == []
    assert sum(count for count, _ in results) > 150 * len(shape.tensors())


@pytest.mark.parametrize("wanted", [known for known in GGMLType if known in WRITABLE_TYPES], ids=attrgetter("name"))
def test_any_type_as_an_override(wanted: GGMLType, tmp_path: Path) -> None:
    for shape in (Specimen(2), Specimen(0, 1, 288, 272)):
        path = write_model(tmp_path / "model.gguf", shape)
        policy = TypePolicy(FileType.Q4_K_M, (("ffn_(up|down)", wanted),))
        assert compare_types(path, shape, policy, imatrix=True)[1] == []


BYTES = Specimen(n_expert=3, n_layer=1, n_embd=256, n_ff=256, n_vocab=24, n_head=8, n_head_kv=1)
ODD_BYTES = Specimen(n_expert=2, n_layer=1, n_embd=288, n_ff=320, n_vocab=24, n_head=8, n_head_kv=2)


def our_bytes(
    tensor: TensorShape, type: GGMLType, values: NDArray[np.float32], importance: NDArray[np.float32] | None
) -> bytes:
    if type is tensor.source_type:
        return stored(values, type).tobytes()
    experts = values.reshape(-1, *values.shape[-2:])
    out = np.empty((*experts.shape[:2], type.row_bytes(tensor.n_cols)), np.uint8)
    for index, expert in enumerate(experts):
        quantize_rows(type, expert, out[index], None if importance is None else importance[index])
    return out.tobytes()


def assert_same_file(shape: Specimen, policy: TypePolicy, tmp_path: Path, *, imatrix: bool) -> None:
    weights, importance = shape.weights(), shape.importance() if imatrix else None
    source = write_model(tmp_path / "source.gguf", shape, weights)
    outcome = quantize(source, policy, importance, tmp_path / "quantized.gguf")
    assert outcome.ok, outcome.log[-300:]
    theirs = read_tensors(tmp_path / "quantized.gguf")
    types = choose_types(shape.tensors(), shape.model, policy, importance)
    assert {name: chosen for name, (chosen, _) in theirs.items()} == types
    for tensor in shape.tensors():
        rows = (importance or {}).get(tensor.name)
        ours = our_bytes(tensor, types[tensor.name], weights[tensor.name], rows)
        assert ours == theirs[tensor.name][1], f"{tensor.name} as {types[tensor.name].name}"


@pytest.mark.parametrize("file_type", FileType, ids=attrgetter("name"))
def test_bytes_with_an_importance_matrix(file_type: FileType, tmp_path: Path) -> None:
    assert_same_file(BYTES, TypePolicy(file_type), tmp_path, imatrix=True)


@pytest.mark.parametrize(
    "file_type", ["Q4_K_M", "Q5_K_S", "Q3_K_L", "Q2_K", "IQ4_XS", "IQ3_M", "TQ2_0", "Q4_0", "Q2_0"]
)
@pytest.mark.parametrize("source", [GGMLType.BF16, GGMLType.F16, GGMLType.F32], ids=attrgetter("name"))
def test_bytes_without_an_importance_matrix(file_type: str, source: GGMLType, tmp_path: Path) -> None:
    shape = replace(BYTES, source=source, n_expert=2)
    assert_same_file(shape, TypePolicy(FileType[file_type]), tmp_path, imatrix=False)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q6_K", "IQ2_XXS", "TQ1_0", "Q2_0", "MXFP4_MOE"])
def test_bytes_of_rows_that_do_not_fit(file_type: str, tmp_path: Path) -> None:
    assert_same_file(ODD_BYTES, TypePolicy(FileType[file_type]), tmp_path, imatrix=True)


def test_types_that_ignore_importances_are_those_of_ggml() -> None:
    rng = np.random.default_rng(1)
    rows, importances = rng.standard_normal((4, 512)).astype(np.float32), rng.gamma(0.5, 2, 512).astype(np.float32)

    def quantized(kind: GGMLType, weights: NDArray[np.float32] | None) -> bytes:
        made = np.zeros((4, kind.row_bytes(512)), np.uint8)
        quantizing.quantize_chunk(kind, rows, made, weights)
        return made.tobytes()

    kinds = {kind for kind in WRITABLE_TYPES - ABORTS_WITHOUT_IMATRIX if kind.is_quantized}
    assert {kind for kind in kinds if quantized(kind, None) == quantized(kind, importances)} == IGNORES_IMATRIX


def test_bytes_under_overrides(tmp_path: Path) -> None:
    policy = TypePolicy(
        FileType.Q4_K_M,
        ((r"ffn_up", GGMLType.IQ3_S), (r"attn_(q|k)\.", GGMLType.F16)),
        output_tensor_type=GGMLType.Q8_0,
        token_embedding_type=GGMLType.BF16,
    )
    assert_same_file(BYTES, policy, tmp_path, imatrix=True)
