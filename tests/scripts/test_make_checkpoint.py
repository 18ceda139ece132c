"""The generator of random checkpoints: what it writes opens, in every layout and type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.weights.dtypes import read_f32
from tests.tiny_tokenizers import sentencepiece_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_checkpoint.py"
SMALL = ("--layers", "2", "--hidden", "512", "--ff", "1024", "--heads", "8", "--kv", "2", "--vocab", "400")


def made(out: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), str(out), *SMALL, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_fused_mixtral_in_shards(tmp_path: Path) -> None:
    (tmp_path / "spm").write_bytes(sentencepiece_model())
    options = ["--layout", "fused", "--experts", "3", "--shard-mb", "9", "--tokenizer", str(tmp_path / "spm")]
    line = made(tmp_path / "model", *options)
    assert line == f"{tmp_path / 'model'}: 0.011 B weights, 0.02 GB in 4 files\n"
    with open_checkpoint(tmp_path / "model") as model:
        assert (model.config.n_expert, model.config.rope_theta) == (3, 1e6)
        w3 = read_f32(model.tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"])
        assert w3.shape == (1024, 512)
        assert abs(w3.mean()) < 1e-3
        assert w3.std() == pytest.approx(0.02, rel=0.05)
        assert read_f32(model.tensors["model.norm.weight"]).mean() == pytest.approx(1, abs=0.01)
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == sentencepiece_model()


@pytest.mark.parametrize(("dtype", "style"), [("f16", "4"), ("f32", "5")])
def test_a_dense_model(dtype: str, style: str, tmp_path: Path) -> None:
    made(tmp_path, "--arch", "mistral", "--dtype", dtype, "--config-style", style, "--tie", "--theta", "5000")
    with open_checkpoint(tmp_path) as model:
        assert model.config.architecture == "MistralForCausalLM"
        assert (model.config.tie_embeddings, model.config.rope_theta) == (True, 5000)
        assert {tensor.dtype.value for tensor in model.tensors.values()} == {dtype.upper()}
