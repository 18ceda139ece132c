"""A tiny Mixtral with a known answer, which tests whether llama.cpp computes correctly on this machine.

Defines the model, whose weights are generated from tensor names, and the tokens of its answer. It has the types of a
Q4_K_M file, two layers and four experts, so attention, rope, routing and the K formats affect every token.
"""

from __future__ import annotations

import hashlib
import math
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ggufmoe.engine import Engine
from ggufmoe.evaluation.synthetic_model import LlamaShape, llama_metadata, write_model
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ContextOptions, OffloadOptions, SamplingOptions
from ggufmoe.runtime.events import Token

PROBE_PROMPT = (1, 5, 23, 47, 11, 31, 7, 19)
PROBE_ANSWER = (51, 39, 22, 3, 14, 24, 44, 8, 33, 20, 35, 63, 21, 46, 34, 56, 40, 4, 43, 59)
"""The tokens that the model generates after PROBE_PROMPT with greedy sampling."""

# For each token the number of its embedding, the best of 150 for the margins along PROBE_ANSWER: the next token leads
# by at least 0.6 standard deviations of the logits, and so do the chosen experts. Logits in float32 and in the 8-bit
# arithmetic of the CPU differ by 0.03 standard deviations.
_PICKS = bytes.fromhex(
    "009500900e03007b8e0000740000700000000063646090428e0000000000004b"
    "006d8e35000000913a0000918300945000000083000000004900003000000077"
)

_N_VOCAB, _N_EMBD, _N_FF, _N_LAYER, _N_EXPERT, _N_EXPERT_USED = 64, 256, 256, 2, 4, 2
_N_HEAD, _N_HEAD_KV = 4, 2
_CONTEXT_TOKENS = 256
# standard deviations of weights, chosen so that attention and experts contribute about as much as embeddings
_SPREAD = 0.0625
_SPREADS = {"token_embd": 0.5, "attn_q": 0.09, "attn_k": 0.09}
_ROUTER_STEP = 0.0625 / 73.9


def probe_answer(offload: OffloadOptions) -> tuple[int, ...]:
    """Generate tokens after PROBE_PROMPT with the installed engine and these offload options; compare to PROBE_ANSWER.

    Needs 1.2 MB in the folder for temporary files. Raises the errors of ``Engine``, and OSError.
    """
    sampling = SamplingOptions(temperature=0.0, repeat_penalty=1.0, n_predict=20)
    with tempfile.TemporaryDirectory(prefix="ggufmoe-") as directory:
        path = write_probe_model(Path(directory) / "probe.gguf")
        with Engine(path, ContextOptions(n_ctx=_CONTEXT_TOKENS, n_threads=1), offload) as engine:
            events = engine.generate(PROBE_PROMPT, sampling)
            return tuple(event.token_id for event in events if isinstance(event, Token))


def write_probe_model(path: Path) -> Path:
    """Write the model to ``path``, with the same bytes on every machine, and return the path."""
    shape = LlamaShape(
        n_vocab=_N_VOCAB,
        n_embd=_N_EMBD,
        n_ff=_N_FF,
        n_layer=_N_LAYER,
        n_head=_N_HEAD,
        n_head_kv=_N_HEAD_KV,
        head_size=_N_EMBD // _N_HEAD,
        n_ctx=_CONTEXT_TOKENS,
        n_expert=_N_EXPERT,
        n_expert_used=_N_EXPERT_USED,
    )
    tensors = ((name, kind, size, _data(name, kind, size)) for name, kind, size in _tensors())
    return write_model(path, llama_metadata("ggufmoe probe", shape), tensors)


def _tensors() -> Iterator[tuple[str, GGMLType, tuple[int, ...]]]:
    n_kv = _N_EMBD // _N_HEAD * _N_HEAD_KV
    yield "token_embd.weight", GGMLType.Q4_K, (_N_VOCAB, _N_EMBD)
    for layer in range(_N_LAYER):
        stem = f"blk.{layer}."
        yield f"{stem}attn_norm.weight", GGMLType.F32, (_N_EMBD,)
        yield f"{stem}attn_q.weight", GGMLType.Q4_K, (_N_EMBD, _N_EMBD)
        yield f"{stem}attn_k.weight", GGMLType.Q4_K, (n_kv, _N_EMBD)
        yield f"{stem}attn_v.weight", GGMLType.Q6_K, (n_kv, _N_EMBD)
        yield f"{stem}attn_output.weight", GGMLType.Q4_K, (_N_EMBD, _N_EMBD)
        yield f"{stem}ffn_norm.weight", GGMLType.F32, (_N_EMBD,)
        yield f"{stem}ffn_gate_inp.weight", GGMLType.F32, (_N_EXPERT, _N_EMBD)
        yield f"{stem}ffn_gate_exps.weight", GGMLType.Q4_K, (_N_EXPERT, _N_FF, _N_EMBD)
        yield f"{stem}ffn_up_exps.weight", GGMLType.Q4_K, (_N_EXPERT, _N_FF, _N_EMBD)
        yield f"{stem}ffn_down_exps.weight", GGMLType.Q6_K, (_N_EXPERT, _N_EMBD, _N_FF)
    yield "output_norm.weight", GGMLType.F32, (_N_EMBD,)
    yield "output.weight", GGMLType.Q6_K, (_N_VOCAB, _N_EMBD)


def _data(name: str, kind: GGMLType, shape: tuple[int, ...]) -> bytes:
    n_weights = math.prod(shape)
    spread = _SPREADS.get(name.split(".")[-2], _SPREAD)
    if len(shape) == 1:
        return struct.pack("<f", 1.0) * n_weights
    if name == "token_embd.weight":
        return b"".join(_q4_k(f"{name} {token} {pick}", 1, spread) for token, pick in enumerate(_PICKS))
    if kind is GGMLType.F32:
        return struct.pack(f"<{n_weights}f", *((byte - 127.5) * _ROUTER_STEP for byte in _stream(name, n_weights)))
    return {GGMLType.Q4_K: _q4_k, GGMLType.Q6_K: _q6_k}[kind](name, n_weights // kind.block_size, spread)


def _stream(seed: str, n_bytes: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(n_bytes)


def _q4_k(seed: str, n_blocks: int, spread: float) -> bytes:
    """Random nibbles q and scales s; the minima are the scales again, so that weights are d s (q - 7.5)."""
    d = spread / (36.4 * 4.61)
    head = struct.pack("<ee", d, 7.5 * d)
    blocks = []
    for raw in _chunks(_stream(seed, n_blocks * 136), 136):
        scales = raw[:4] * 2 + bytes((byte & 15) * 17 for byte in raw[4:8])
        blocks.append(head + scales + raw[8:])
    return b"".join(blocks)


def _q6_k(seed: str, n_blocks: int, spread: float) -> bytes:
    """Random six-bit numbers q and signed scales s: weights are d s (q - 32)."""
    d = struct.pack("<e", spread / (73.9 * 18.5))
    return b"".join(raw + d for raw in _chunks(_stream(seed, n_blocks * 208), 208))


def _chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[begin : begin + size] for begin in range(0, len(data), size))
