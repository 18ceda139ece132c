"""A model with a weight that is NaN is an error that names the tensor, in every measurement and computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe import ContextOptions, DecodeError, Engine
from ggufmoe.gguf.header import read_header

OPTIONS: dict[str, Any] = {"n_ctx": 32, "n_threads": 1}
TEXT = "the model reads a number and writes the sum of two numbers " * 6
BROKEN = [
    "blk.0.ffn_gate_inp.weight",
    "blk.1.ffn_gate_inp.weight",
    "blk.1.ffn_down_exps.weight",
    "blk.1.attn_q.weight",
    "output_norm.weight",
    "output.weight",
]


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tiny_checkpoint(dtype="F32", n_embd=64, n_ff=64, n_expert=4, n_expert_used=2)
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    ggufmoe.convert(checkpoint, path, quant="F32", threads=1)
    return path


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the model whose named tensor is NaN, and the error that says so."""
    name = request.param
    path = tmp_path / "broken.gguf"
    path.write_bytes(whole.read_bytes())
    header = read_header(path)
    info = next(tensor for tensor in header.tensors if tensor.name == name)
    with open(path, "r+b") as file:
        file.seek(header.data_offset + info.offset)
        file.write(np.full(info.n_bytes // 4, np.nan, np.float32).tobytes())
    return path, rf"broken\.gguf: the model computes NaN .*: {name} holds NaN or infinite weights"


def test_imatrix_writes_nothing(broken: tuple[Path, str], tmp_path: Path) -> None:
    path, said = broken
    with pytest.raises(DecodeError, match=said):
        ggufmoe.imatrix(path, tmp_path / "imatrix.gguf", TEXT, **OPTIONS)
    assert not (tmp_path / "imatrix.gguf").exists()


def test_perplexity_and_divergence(broken: tuple[Path, str], whole: Path) -> None:
    path, said = broken
    with pytest.raises(DecodeError, match=said):
        ggufmoe.perplexity(path, TEXT, **OPTIONS)
    for model, reference in ((path, whole), (whole, path)):
        with pytest.raises(DecodeError, match=said):
            ggufmoe.kl_divergence(model, reference, TEXT, **OPTIONS)


@pytest.mark.parametrize(
    "compute",
    [
        lambda engine, tokens: engine.logits(tokens),
        lambda engine, tokens: list(engine.logits_by_batch(tokens)),
        lambda engine, tokens: engine.evaluate(tokens),
        lambda engine, tokens: engine.evaluate(tokens, one_by_one=True),
        lambda engine, tokens: engine.prefill(tokens),
        lambda engine, tokens: engine.prefill(tokens, every_row=True),
        lambda engine, tokens: list(engine.generate(tokens)),
        lambda engine, tokens: ggufmoe.trace_routing(engine, tokens),
    ],
)
def test_computing(broken: tuple[Path, str], compute: Callable[[Engine, list[int]], object]) -> None:
    path, said = broken
    with Engine(path, ContextOptions(n_ctx=256, n_threads=1)) as engine, pytest.raises(DecodeError, match=said):
        compute(engine, engine.tokenize(TEXT[:60]))


def test_a_row_before_the_last_is_looked_at_too(whole: Path, tmp_path: Path) -> None:
    """An expert of the last layer to which only some token in the middle goes changes no later row."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(whole.read_bytes())
    header = read_header(path)
    with Engine(whole, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        tokens = engine.tokenize(TEXT[:60])
        trace = ggufmoe.trace_routing(engine, tokens)
    row = next(i for i in range(len(tokens) - 1) if set(trace.chosen[i, -1]) - set(trace.chosen[-1, -1]))
    expert = (set(trace.chosen[row, -1].tolist()) - set(trace.chosen[-1, -1].tolist())).pop()
    info = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    n_bytes = info.n_bytes // info.shape[0]
    with open(path, "r+b") as file:
        file.seek(header.data_offset + info.offset + expert * n_bytes)
        file.write(np.full(n_bytes // 4, np.nan, np.float32).tobytes())
    with Engine(path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        engine.prefill(tokens)
        with pytest.raises(DecodeError, match=r"blk\.1\.ffn_down_exps\.weight holds NaN"):
            engine.prefill(tokens, every_row=True)
