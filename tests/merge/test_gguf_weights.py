"""The mixture of a GGUF file: it computes what its checkpoint computes, and what is not understood is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import ArchitectureError, GGUFError, TensorMismatchError
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import ValueType
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.gguf_weights import GGUFWeights
from ggufmoe.merge.merged import open_recipe
from tests.export.gguf_models import Stored, load, store, unstacked
from tests.families import test_mixtral_biased, test_olmoe, test_qwen2, test_qwen3moe
from tests.families.agreement import IDS, Logits
from tests.families.tiny_family import make_checkpoint
from tests.gguf_files import text, u32
from tests.tiny import make_checkpoint as make_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def logits_of(path: Path, ids: list[int] = IDS) -> Logits:
    with contextlib.closing(GGUFSource(path)) as source:
        mixture = GGUFWeights(source.header, {tensor.name: tensor.parts for tensor in source.tensors})
        return ForwardPass(mixture).logits([ids])


def same_logits(ours: Logits, theirs: Logits) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: make_tiny(path, n_expert=3), id="mixtral"),
        pytest.param(lambda path: make_tiny(path, n_expert=3, tie=True, head_dim=32, rope_theta=1e6), id="tied"),
        pytest.param(lambda path: make_tiny(path, config={"sliding_window": 4}), id="window"),
        pytest.param(lambda path: make_tiny(path, rope_scaling={"type": "linear", "factor": 2.0}), id="linear"),
        pytest.param(lambda path: make_tiny(path, rope_scaling=LLAMA3), id="llama3"),
        pytest.param(lambda path: make_tiny(path, arch="llama", tie=True), id="llama"),
        pytest.param(lambda path: test_qwen2.model(path), id="qwen2"),
        pytest.param(lambda path: make_checkpoint(path, test_qwen3moe.config()), id="qwen3moe"),
        pytest.param(lambda path: make_checkpoint(path, test_olmoe.config()), id="olmoe"),
    ],
)
def test_it_computes_what_the_checkpoint_computes(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    checkpoint = make(tmp_path / "model")
    ggufmoe.convert(checkpoint, tmp_path / "m.gguf", "F32")
    with open_checkpoint(checkpoint) as model:
        same_logits(logits_of(tmp_path / "m.gguf"), ForwardPass(model).logits([IDS]))


def test_biases_of_queries_and_keys_are_put_back_in_order(tmp_path: Path) -> None:
    recipe = test_mixtral_biased.three(tmp_path)
    ggufmoe.convert(recipe, tmp_path / "m.gguf", "F32")
    with contextlib.closing(open_recipe(recipe)) as merged:
        merged.prepare()
        same_logits(logits_of(tmp_path / "m.gguf"), ForwardPass(merged).logits([IDS]))


def test_an_old_file_and_rows_of_many_types_are_read(tmp_path: Path) -> None:
    """One tensor for each expert; quantized rows are those that ggml dequantizes."""
    ggufmoe.convert(make_tiny(tmp_path / "model"), tmp_path / "new.gguf", "Q4_K_M", quantizer="ggml")
    metadata, tensors = load(tmp_path / "new.gguf")
    store(tmp_path / "old.gguf", metadata, unstacked(tensors))
    np.testing.assert_array_equal(logits_of(tmp_path / "old.gguf"), logits_of(tmp_path / "new.gguf"))
    ggufmoe.convert(tmp_path / "model", tmp_path / "f32.gguf", "F32")
    close, exact = logits_of(tmp_path / "new.gguf"), logits_of(tmp_path / "f32.gguf")
    assert np.corrcoef(close.ravel(), exact.ravel())[0, 1] > 0.95
    assert not np.allclose(close, exact, rtol=1e-3)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    ggufmoe.convert(make_tiny(folder / "model", n_embd=64, n_ff=64, n_head=4), folder / "m.gguf", "F32")
    return folder / "m.gguf"


def one(value: float) -> GGUFValue:
    return GGUFValue(ValueType.FLOAT32, value, None)


@pytest.mark.parametrize(
    ("keys", "lost", "added", "error", "message"),
    [
        ({"llama.expert_weights_scale": one(2.0)}, "", "", GGUFError, "expert_weights_scale is 2.0, which its states"),
        ({"llama.rope.dimension_count": u32(8)}, "", "", GGUFError, "dimension_count is 8, expected 16"),
        ({"llama.context_length": None}, "", "", GGUFError, "llama.context_length is missing"),
        ({"llama.rope.scaling.type": text("yarn")}, "", "", ArchitectureError, r"rope scaling \(yarn\) cannot"),
        ({}, "blk.1.attn_k.weight", "", TensorMismatchError, "blk.1.attn_k.weight is missing"),
        ({}, "", "blk.1.attn_q_norm.weight", ArchitectureError, "has attn_q_norm.weight, which no MixtralForCausalLM"),
        ({}, "", "blk.2.attn_q.weight", TensorMismatchError, "blk.2.attn_q.weight is left over"),
    ],
)
def test_what_is_not_understood_is_refused(
    file: Path,
    tmp_path: Path,
    keys: dict[str, GGUFValue | None],
    lost: str,
    added: str,
    error: type[Exception],
    message: str,
) -> None:
    metadata, tensors = load(file)
    changed: dict[str, Any] = {**metadata, **keys}
    there: dict[str, Stored] = {name: tensor for name, tensor in tensors.items() if name != lost}
    if added:
        there[added] = tensors["blk.1.attn_q.weight"]
    store(tmp_path / "n.gguf", {key: value for key, value in changed.items() if value is not None}, there)
    with pytest.raises(error, match=rf"n\.gguf.*{message}"):
        logits_of(tmp_path / "n.gguf")


def test_a_matrix_of_another_shape_is_refused(file: Path, tmp_path: Path) -> None:
    metadata, tensors = load(file)
    tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_q.weight"]
    store(tmp_path / "n.gguf", metadata, tensors)
    with pytest.raises(TensorMismatchError, match=r"attn_k.weight is 1 of 64 x 64, expected 1 of 32 x 64"):
        logits_of(tmp_path / "n.gguf")


def test_the_families_that_are_read_are_named(file: Path, tmp_path: Path) -> None:
    metadata, tensors = load(file)
    other = {key.replace("llama.", "dbrx."): value for key, value in metadata.items()}
    store(tmp_path / "n.gguf", {**other, "general.architecture": text("dbrx")}, tensors)
    known = ".*, ".join(
        ("LlamaForC", "MistralForC", "MixtralForC", "MixtralWith", "Olmoe", "Qwen2ForC", "Qwen3ForC", "Qwen3Moe")
    )
    with pytest.raises(ArchitectureError, match=rf"states of dbrx files cannot be computed; .* for {known}.*$"):
        logits_of(tmp_path / "n.gguf")
