"""Limits and steps that llama.cpp has compiled in, at the pinned commit. Every other module takes them from here."""

from __future__ import annotations

MAX_INT32 = 2**31 - 1
"""llama.cpp counts tokens, layers and milliseconds in 32 bits; a larger number would wrap around."""
MAX_THREADS = 512
"""GGML_MAX_N_THREADS of ggml.h."""
MAX_SEQUENCES = 256
"""LLAMA_MAX_SEQ of llama-cparams.h: sequences that one context can hold."""
CONTEXT_STEP_TOKENS = 256
"""llama.cpp rounds the part of the context that each sequence has up to a multiple of this."""
MAX_DEVICES = 16
"""llama_max_devices() of llama.cpp: devices that one model can be split over."""
MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama-hparams.h."""
MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS of llama-hparams.h."""
RANDOM_SEED = 2**32 - 1
"""LLAMA_DEFAULT_SEED of llama.h: llama.cpp draws a seed itself where it is given this one."""
MAX_SEED = RANDOM_SEED - 1
"""The largest seed that gives the same answer again."""
MAX_PENALTY_TOKENS = 2**20
"""Our own limit: llama.cpp allocates memory for so many tokens at once, and ends the process where there is not
enough."""
MAX_RPC_WORKERS = 16
"""GGML_RPC_MAX_SERVERS of ggml-rpc.h."""
MAX_PORT = 65535
"""The largest TCP port."""


def rounded_context(n_ctx: int, n_seq_max: int) -> int:
    """Tokens of context that llama.cpp makes when ``n_ctx`` are asked for, at least as many.

    Each of the ``n_seq_max`` sequences has the same share, a multiple of CONTEXT_STEP_TOKENS. Source: the constructor
    of ``llama_context`` in llama-context.cpp (commit 0c1e57098).
    """
    steps = -(-n_ctx // CONTEXT_STEP_TOKENS)
    share = steps * CONTEXT_STEP_TOKENS // n_seq_max
    return n_seq_max * -(-share // CONTEXT_STEP_TOKENS) * CONTEXT_STEP_TOKENS
