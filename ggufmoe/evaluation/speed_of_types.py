"""Measures how long this machine's CPU takes for a weight of each type when it generates.

A made-up model whose feed-forward matrices all have one type computes tokens one by one, by the engine and with its
rearranged weights, so that the time is that of the routines and of the memory that real models meet. What is not the
matrices is measured on a model with hardly any, and subtracted. Two sizes are measured: a model that is read from
memory for each token, where few bits count, and one that caches hold, where the routines alone count.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from ggufmoe.quant.type_speeds import CACHED_BYTES, MEMORY_BYTES, TypeSpeeds, load_speeds, save_speeds, this_cpu
from ggufmoe.sizes import file_size
from ggufmoe.work import CancelFlag, OnProgress, Work

_N_LAYER, _HEAD_SIZE, _N_VOCAB = 4, 64, 64
_LEAST_FF = 256
_HARDLY_ANY_FF = 32
_DRAWN_ROWS = 8
"""Rows of noise that are quantized; a matrix repeats them."""
_TOKENS, _LEAST_SAMPLES, _SAMPLED_S = 4, 8, 0.25
"""The fastest sample of so many tokens counts, in rounds that take turns with other types: other work slows it down."""
_LEAST_ROUNDS, _MOST_ROUNDS, _SETTLED = 3, 8, 0.97
"""Rounds end when one finds no model whose time is below this share of the fastest before: on a busy machine later."""


@dataclass(frozen=True)
class Sample:
    """The size of the models that are measured."""

    matrix_bytes: int
    n_embd: int

    def columns(self, kind: GGMLType) -> int:
        """The width of the feed-forward parts with which their matrices take about ``matrix_bytes``."""
        n_ff = self.matrix_bytes * kind.block_size // (self.weights(1) * kind.block_bytes)
        return max(n_ff // _LEAST_FF, 1) * _LEAST_FF

    def weights(self, n_ff: int) -> int:
        """Weights in the matrices of the feed-forward parts."""
        return 3 * _N_LAYER * self.n_embd * n_ff


FROM_MEMORY, IN_CACHES = Sample(MEMORY_BYTES, 2048), Sample(CACHED_BYTES, 512)


def type_speeds(
    types: Sequence[GGMLType] = FAST_TYPES,
    *,
    cache: bool = True,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> TypeSpeeds:
    """How long this machine's CPU takes for a weight of each of ``types`` when it generates.

    Measured are those that the user's cache folder has not, some four seconds for each; ``convert`` and ``quantize``
    read them there for ``types="fast"``. ``cache`` False measures all of them anew and keeps nothing. Raises the errors
    of ``Engine``, OutputError where the folder for temporary files has no room for a model of 64 MiB, and Cancelled.
    """
    known = load_speeds() if cache else TypeSpeeds(this_cpu())
    missing = known.missing(types)
    if not missing:
        return known
    cached, read = (measure(missing, one, on_progress=on_progress, cancel=cancel) for one in (IN_CACHES, FROM_MEMORY))
    found = TypeSpeeds(known.machine, {**known.seconds, **read}, {**known.cached_seconds, **cached})
    if cache:
        save_speeds(found)
    return found


def measure(
    types: Sequence[GGMLType],
    sample: Sample,
    *,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> dict[GGMLType, float]:
    """Seconds that a weight of each of ``types`` takes for one token, in models of the size of ``sample``."""
    work = Work(
        "speed", (len(types) + 1) * _MOST_ROUNDS, "runs", stopped="stopped while the speed of types was measured",
        on_progress=on_progress, cancel=cancel,
    )  # fmt: skip
    models = [(GGMLType.Q8_0, _HARDLY_ANY_FF), *((kind, sample.columns(kind)) for kind in types)]
    fastest = [math.inf] * len(models)
    try:
        with tempfile.TemporaryDirectory(prefix="ggufmoe-") as folder:
            for n_rounds in range(1, _MOST_ROUNDS + 1):
                before = list(fastest)
                for number, (kind, n_ff) in enumerate(models):
                    path = _written(Path(folder) / "one-type.gguf", sample.n_embd, kind, n_ff)
                    fastest[number] = min(fastest[number], _fastest_token(path, work, cancel))
                    path.unlink()
                    work.advance(1, kind.name)
                settled = all(now > _SETTLED * was for now, was in zip(fastest, before, strict=True))
                if n_rounds >= _LEAST_ROUNDS and settled:
                    work.advance(len(models) * (_MOST_ROUNDS - n_rounds), "settled")
                    break
    except OSError as error:
        raise OutputError(
            f"the speed of types needs {file_size(2 * sample.matrix_bytes)} in the folder for temporary files: {error}"
        ) from error
    return {
        kind: max(seconds - fastest[0], seconds / 100) / sample.weights(n_ff)
        for (kind, n_ff), seconds in zip(models[1:], fastest[1:], strict=True)
    }


def _fastest_token(path: Path, work: Work, cancel: CancelFlag | None) -> float:
    context = ContextOptions(n_ctx=256)
    with Engine(path, context, OffloadOptions(n_gpu_layers=0, device="none"), cancel=cancel) as engine:
        samples: list[float] = []
        end = time.monotonic() + _SAMPLED_S
        while len(samples) < _LEAST_SAMPLES or time.monotonic() < end:
            work.check()
            engine.forget()
            seconds = engine.evaluate(range(3, 3 + _TOKENS), one_by_one=True, cancel=cancel)
            if seconds is None:
                raise Cancelled("stopped while the speed of types was measured")
            samples.append(seconds / _TOKENS)
    return min(samples)


def _written(path: Path, n_embd: int, kind: GGMLType, n_ff: int) -> Path:
    """``_write``, by a thread of its own, with which the threads end that OpenMP makes for quantizers of small types.

    If they stayed, OpenMP would count more threads than cores, and those of the engine would sleep between matrices.
    """
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(_write, path, n_embd, kind, n_ff).result()


def _write(path: Path, n_embd: int, kind: GGMLType, n_ff: int) -> Path:
    shape = LlamaShape(
        n_vocab=_N_VOCAB,
        n_embd=n_embd,
        n_ff=n_ff,
        n_layer=_N_LAYER,
        n_head=1,
        n_head_kv=1,
        head_size=_HEAD_SIZE,
        n_ctx=256,
    )
    return write_model(path, llama_metadata("ggufmoe speed of types", shape), _tensors(n_embd, kind, n_ff))


def _tensors(n_embd: int, kind: GGMLType, n_ff: int) -> Iterator[Blob]:
    wide, tall = _rows(kind, n_embd), _rows(kind, n_ff)
    norm = np.ones(n_embd, np.float32).tobytes()
    yield "token_embd.weight", GGMLType.F32, (_N_VOCAB, n_embd), _noise(_N_VOCAB, n_embd).tobytes()
    for layer in range(_N_LAYER):
        stem = f"blk.{layer}."
        yield f"{stem}attn_norm.weight", GGMLType.F32, (n_embd,), norm
        for name in ("attn_q", "attn_k", "attn_v"):
            yield f"{stem}{name}.weight", GGMLType.F32, (_HEAD_SIZE, n_embd), _noise(_HEAD_SIZE, n_embd).tobytes()
        yield f"{stem}attn_output.weight", GGMLType.F32, (n_embd, _HEAD_SIZE), _noise(n_embd, _HEAD_SIZE).tobytes()
        yield f"{stem}ffn_norm.weight", GGMLType.F32, (n_embd,), norm
        for name in ("ffn_gate", "ffn_up"):
            yield f"{stem}{name}.weight", kind, (n_ff, n_embd), _repeated(wide, n_ff)
        yield f"{stem}ffn_down.weight", kind, (n_embd, n_ff), _repeated(tall, n_embd)
    yield "output_norm.weight", GGMLType.F32, (n_embd,), norm


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
