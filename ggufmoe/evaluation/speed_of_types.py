"""Measures how long this machine's CPU takes for a weight of each type when it generates.

A made-up model whose feed-forward matrices all have one type computes tokens one by one, by the engine and with its
rearranged weights, so that the time is that of the routines and of the memory that real models meet. What is not the
matrices is measured on a model with hardly any, and subtracted.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, OutputError
from ggufmoe.evaluation.synthetic_model import Blob, LlamaShape, llama_metadata, write_model
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.quant.kernels import quantize_rows
from ggufmoe.quant.type_sets import FAST_TYPES
from ggufmoe.quant.type_speeds import TypeSpeeds, load_speeds, save_speeds, this_cpu
from ggufmoe.sizes import file_size
from ggufmoe.work import CancelFlag, OnProgress, Work

MATRIX_BYTES = 64 << 20
"""Bytes of the matrices of a model: more than caches of processors keep of a model between two tokens."""
_N_EMBD, _N_LAYER, _HEAD_SIZE, _N_VOCAB = 2048, 4, 64, 64
_LEAST_FF = 256
_DRAWN_ROWS = 8
"""Rows of noise that are quantized; a matrix repeats them."""
_WARM_TOKENS, _TOKENS, _ROUNDS = 2, 24, 3
"""The fastest of so many tokens counts, in rounds that take turns with other types: other work only slows it down."""


def type_speeds(
    types: Sequence[GGMLType] = FAST_TYPES,
    *,
    cache: bool = True,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> TypeSpeeds:
    """How long this machine's CPU takes for a weight of each of ``types`` when it generates.

    Measured are those that the user's cache folder has not, about a second for each; ``convert`` and ``quantize`` read
    them there for ``types="fast"``. ``cache`` False measures all of them anew and keeps nothing. Raises the errors of
    ``Engine``, OutputError where the folder for temporary files has no room for a model of 64 MiB, and Cancelled.
    """
    known = load_speeds() if cache else TypeSpeeds(this_cpu())
    missing = known.missing(types)
    if not missing:
        return known
    found = TypeSpeeds(known.machine, {**known.seconds, **measure(missing, on_progress=on_progress, cancel=cancel)})
    if cache:
        save_speeds(found)
    return found


def measure(
    types: Sequence[GGMLType],
    *,
    matrix_bytes: int = MATRIX_BYTES,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> dict[GGMLType, float]:
    """Seconds that a weight of each of ``types`` takes for one token."""
    work = Work(
        "speed", (len(types) + 1) * _ROUNDS, "runs", stopped="stopped while the speed of types was measured",
        on_progress=on_progress, cancel=cancel,
    )  # fmt: skip
    models = [(GGMLType.Q8_0, _LEAST_FF), *((kind, _columns(kind, matrix_bytes)) for kind in types)]
    fastest = [math.inf] * len(models)
    try:
        with tempfile.TemporaryDirectory(prefix="ggufmoe-") as folder:
            for _ in range(_ROUNDS):
                for number, (kind, n_ff) in enumerate(models):
                    path = _write(Path(folder) / "one-type.gguf", kind, n_ff)
                    fastest[number] = min(fastest[number], _fastest_token(path, work, cancel))
                    path.unlink()
                    work.advance(1, kind.name)
    except OSError as error:
        raise OutputError(
            f"the speed of types needs {file_size(2 * matrix_bytes)} in the folder for temporary files: {error}"
        ) from error
    return {
        kind: max(seconds - fastest[0], seconds / 100) / _weights(n_ff)
        for (kind, n_ff), seconds in zip(models[1:], fastest[1:], strict=True)
    }


def _weights(n_ff: int) -> int:
    return 3 * _N_LAYER * _N_EMBD * n_ff


def _columns(kind: GGMLType, matrix_bytes: int) -> int:
    """The width of the feed-forward parts with which their matrices take about ``matrix_bytes``."""
    n_ff = matrix_bytes * kind.block_size // (3 * _N_LAYER * _N_EMBD * kind.block_bytes)
    return max(n_ff // _LEAST_FF, 1) * _LEAST_FF


def _fastest_token(path: Path, work: Work, cancel: CancelFlag | None) -> float:
    context = ContextOptions(n_ctx=256)
    with Engine(path, context, OffloadOptions(n_gpu_layers=0, device="none"), cancel=cancel) as engine:
        samples = []
        for token in range(_WARM_TOKENS + _TOKENS):
            work.check()
            seconds = engine.evaluate([3 + token], one_by_one=True, cancel=cancel)
            if seconds is None:
                raise Cancelled("stopped while the speed of types was measured")
            samples.append(seconds)
    return min(samples[_WARM_TOKENS:])


def _write(path: Path, kind: GGMLType, n_ff: int) -> Path:
    shape = LlamaShape(
        n_vocab=_N_VOCAB,
        n_embd=_N_EMBD,
        n_ff=n_ff,
        n_layer=_N_LAYER,
        n_head=1,
        n_head_kv=1,
        head_size=_HEAD_SIZE,
        n_ctx=256,
    )
    return write_model(path, llama_metadata("ggufmoe speed of types", shape), _tensors(kind, n_ff))


def _tensors(kind: GGMLType, n_ff: int) -> Iterator[Blob]:
    wide, tall = _rows(kind, _N_EMBD), _rows(kind, n_ff)
    norm = np.ones(_N_EMBD, np.float32).tobytes()
    yield "token_embd.weight", GGMLType.F32, (_N_VOCAB, _N_EMBD), _noise(_N_VOCAB, _N_EMBD).tobytes()
    for layer in range(_N_LAYER):
        stem = f"blk.{layer}."
        yield f"{stem}attn_norm.weight", GGMLType.F32, (_N_EMBD,), norm
        for name in ("attn_q", "attn_k", "attn_v"):
            yield f"{stem}{name}.weight", GGMLType.F32, (_HEAD_SIZE, _N_EMBD), _noise(_HEAD_SIZE, _N_EMBD).tobytes()
        yield f"{stem}attn_output.weight", GGMLType.F32, (_N_EMBD, _HEAD_SIZE), _noise(_N_EMBD, _HEAD_SIZE).tobytes()
        yield f"{stem}ffn_norm.weight", GGMLType.F32, (_N_EMBD,), norm
        for name in ("ffn_gate", "ffn_up"):
            yield f"{stem}{name}.weight", kind, (n_ff, _N_EMBD), _repeated(wide, n_ff)
        yield f"{stem}ffn_down.weight", kind, (_N_EMBD, n_ff), _repeated(tall, _N_EMBD)
    yield "output_norm.weight", GGMLType.F32, (_N_EMBD,), norm


def _repeated(rows: bytes, n_rows: int) -> bytes:
    return rows * (n_rows // _DRAWN_ROWS)


def _noise(n_rows: int, n_cols: int) -> NDArray[np.float32]:
    drawn: NDArray[np.float32] = np.random.default_rng(n_cols).standard_normal((n_rows, n_cols), np.float32)
    drawn *= np.float32(n_cols**-0.5)
    return drawn


def _rows(kind: GGMLType, n_cols: int) -> bytes:
    """A few rows of noise in a type; tables of codes are looked up as for real weights."""
    made = np.empty((_DRAWN_ROWS, kind.row_bytes(n_cols)), np.uint8)
    quantize_rows(kind, _noise(_DRAWN_ROWS, n_cols), made, np.ones(n_cols, np.float32), "ggml")
    return made.tobytes()
