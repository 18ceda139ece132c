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
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT, LLAMA, Keys
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
    infos, blobs, offset = [], [], 0
    for name, kind, shape in _tensors():
        data = _data(name, kind, shape)
        infos.append(TensorInfo(name, kind, shape, offset, len(data)))
        blobs.append(data.ljust(padded(len(data), DEFAULT_ALIGNMENT), b"\0"))
        offset += len(blobs[-1])
    path.write_bytes(encode_header(_metadata(), infos) + b"".join(blobs))
    return path


def _metadata() -> dict[str, GGUFValue]:
    u32, f32, text = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_N_VOCAB - 3))]
    values = {
        Keys.General.ARCHITECTURE: GGUFValue(text, LLAMA),
        Keys.General.NAME: GGUFValue(text, "ggufmoe probe"),
        Keys.LLM.BLOCK_COUNT: GGUFValue(u32, _N_LAYER),
        Keys.LLM.CONTEXT_LENGTH: GGUFValue(u32, _CONTEXT_TOKENS),
        Keys.LLM.EMBEDDING_LENGTH: GGUFValue(u32, _N_EMBD),
        Keys.LLM.FEED_FORWARD_LENGTH: GGUFValue(u32, _N_FF),
        Keys.Attention.HEAD_COUNT: GGUFValue(u32, _N_HEAD),
        Keys.Attention.HEAD_COUNT_KV: GGUFValue(u32, _N_HEAD_KV),
        Keys.Attention.LAYERNORM_RMS_EPS: GGUFValue(f32, 1e-5),
        Keys.Rope.DIMENSION_COUNT: GGUFValue(u32, _N_EMBD // _N_HEAD),
        Keys.LLM.EXPERT_COUNT: GGUFValue(u32, _N_EXPERT),
        Keys.LLM.EXPERT_USED_COUNT: GGUFValue(u32, _N_EXPERT_USED),
        Keys.LLM.VOCAB_SIZE: GGUFValue(u32, _N_VOCAB),
        Keys.Tokenizer.MODEL: GGUFValue(text, "llama"),
        Keys.Tokenizer.LIST: GGUFValue(ValueType.ARRAY, tokens, text),
        Keys.Tokenizer.SCORES: GGUFValue(ValueType.ARRAY, [0.0] * _N_VOCAB, f32),
        Keys.Tokenizer.TOKEN_TYPE: GGUFValue(ValueType.ARRAY, [2, 3, 3] + [6] * (_N_VOCAB - 3), ValueType.INT32),
        Keys.Tokenizer.BOS_ID: GGUFValue(u32, 1),
        Keys.Tokenizer.EOS_ID: GGUFValue(u32, 2),
    }
    return {key.format(arch=LLAMA): value for key, value in values.items()}


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
