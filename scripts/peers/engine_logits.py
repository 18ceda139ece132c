"""Logits of a GGUF file at every position, from the pinned llama.cpp on the CPU with a KV cache in float32."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def logits_of(path: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits for each of ``ids`` in one batch, shape (n_tokens, n_vocab)."""
    from llama_cpp import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise RuntimeError(f"{path}: llama.cpp does not load it")
    context = lib.llama_init_from_model(model, _context_parameters(lib, len(ids)))
    try:
        return _decode(lib, model, context, ids)
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)
        del quiet


def _context_parameters(lib: Any, n_tokens: int) -> Any:
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = n_tokens
    parameters.n_outputs_max = n_tokens
    parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
    parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters


def _decode(lib: Any, model: Any, context: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    batch = lib.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        logits: NDArray[np.float32] = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), n_vocab))
        return np.array(logits)
    finally:
        lib.llama_batch_free(batch)
