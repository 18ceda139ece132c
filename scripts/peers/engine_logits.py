"""Logits of a GGUF file at every position, from our engine on the CPU, exact arithmetic preferred to speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufmoe import ContextOptions, Engine, OffloadOptions


def logits_of(path: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits after each of ``ids``, shape (n_tokens, n_vocab), with a KV cache in float32."""
    context = ContextOptions(n_ctx=len(ids) + 1, flash_attn="off", cache_type_k="f32", cache_type_v="f32")
    with Engine(path, context, OffloadOptions(n_gpu_layers=0)) as engine:
        return engine.logits(ids.tolist())
