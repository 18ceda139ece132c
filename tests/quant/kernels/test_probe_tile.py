"""The tile that judges kernels: the same everywhere, and its stored fingerprints are ggml's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, IGNORES_IMATRIX, WRITABLE_TYPES
from ggufmoe.quant.kernels.probe_hashes import GGML_ALONE, HASHES
from ggufmoe.quant.kernels.probe_tile import fingerprint, hash_name, probe, probe_importances
from ggufmoe.quant.kernels.trust import has_kernel, widened

VARIANTS = {
    hash_name(type_, source, weighted): (type_, source, weighted)
    for type_ in GGMLType
    for source in ("F32", "F16", "BF16")
    for weighted in (False, True)
    if has_kernel(type_) and type_ not in (IGNORES_IMATRIX if weighted else ABORTS_WITHOUT_IMATRIX)
}

PROBES = {
    "F32": "57042f3eac69e6f2",
    "F16": "2ce72a9b938162aa",
    "BF16": "a02d1f633a74c67c",
    "F32 for grids": "d25c544bf037faf9",
    "importances": "a80dc24bb8b38145",
}


def test_the_probe_is_the_same_on_every_machine() -> None:
    tiles = {source: probe(GGMLType.Q4_K, source) for source in ("F32", "F16", "BF16")}
    tiles["F32 for grids"] = probe(GGMLType.IQ2_XS, "F32")
    found = {name: hashlib.sha256(tile.tobytes()).hexdigest()[:16] for name, tile in tiles.items()}
    found["importances"] = hashlib.sha256(probe_importances().tobytes()).hexdigest()[:16]
    assert found == PROBES


def test_the_probe_has_what_kernels_stumble_over() -> None:
    weights = probe(GGMLType.Q4_K, "F32")
    assert weights.shape == (16, 1024)
    assert np.isfinite(weights).all()
    magnitudes = np.abs(weights)
    assert (weights == 0).mean() > 0.06
    assert magnitudes.max() > 1e37
    assert 0 < magnitudes[8].min() < 1e-42
    assert np.abs(weights[1]).max() / np.median(np.abs(weights[1])) > 20
    assert 0.9 < weights[0].std() / 0.02 < 1.1


def test_formats_that_cannot_stand_huge_weights_get_none() -> None:
    assert np.abs(probe(GGMLType.IQ3_S, "F32")).max() < 1e10
    assert np.abs(probe(GGMLType.Q4_K, "F32")).max() > 1e37


def test_every_kernel_has_its_fingerprints() -> None:
    assert set(HASHES) == set(VARIANTS)
    without = {kind.name for kind in WRITABLE_TYPES if kind.is_quantized and not has_kernel(kind)}
    assert set(GGML_ALONE) == without


@pytest.mark.parametrize("name", GGML_ALONE)
def test_the_fingerprints_of_other_formats_are_those_of_ggml(name: str) -> None:
    weights = probe(GGMLType[name], "F32")
    made = np.zeros((len(weights), GGMLType[name].row_bytes(weights.shape[1])), np.uint8)
    quantizing.quantize_chunk(GGMLType[name], widened(weights), made)
    assert fingerprint(made) == GGML_ALONE[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_stored_fingerprints_are_those_of_ggml(name: str) -> None:
    type_, source, weighted = VARIANTS[name]
    weights = probe(type_, source)
    made = np.zeros((len(weights), type_.row_bytes(weights.shape[1])), np.uint8)
    quantizing.quantize_chunk(type_, widened(weights), made, probe_importances() if weighted else None)
    assert fingerprint(made) == HASHES[name].ggml


def test_a_fingerprint_ignores_only_what_is_marked() -> None:
    blocks = np.arange(24, dtype=np.uint8).reshape(2, 12)
    odd = np.zeros((2, 3), np.uint8)
    odd[1, 2] = 1
    changed = blocks.copy()
    changed[1, 8:] = 0
    assert fingerprint(blocks, odd) == fingerprint(changed, odd)
    assert fingerprint(blocks) != fingerprint(changed)
    assert fingerprint(blocks, odd) != fingerprint(changed)
    changed[1, 7] += 1
    assert fingerprint(blocks, odd) != fingerprint(changed, odd)
    assert fingerprint(blocks, odd) != fingerprint(blocks, np.flip(odd))
