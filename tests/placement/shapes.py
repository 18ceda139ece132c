"""Files with the header of a model and no weights worth reading: sparse, of any shape, for plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded
from ggufmoe.gguf.model import ModelHeader, read_model_header
from ggufmoe.gguf.types import GGMLType, ValueType

ALIGNMENT = 32
N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_VOCAB = 512, 1024, 8, 4, 2048
Shapes = Iterator[tuple[str, GGMLType, tuple[int, ...]]]


def _word(number: int) -> GGUFValue:
    return GGUFValue(ValueType.UINT32, number)


def metadata(n_layer: int, n_expert: int, n_used: int) -> dict[str, GGUFValue]:
    numbers = {
        "block_count": n_layer,
        "context_length": 32768,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "vocab_size": N_VOCAB,
    }
    if n_expert:
        numbers |= {"expert_count": n_expert, "expert_used_count": n_used}
    words = {f"llama.{key}": _word(number) for key, number in numbers.items()}
    return {"general.architecture": GGUFValue(ValueType.STRING, "llama"), **words}


def tensors(n_layer: int, n_expert: int, *, tied: bool) -> Shapes:
    quantized, plain = GGMLType.Q4_K, GGMLType.F32
    yield "token_embd.weight", quantized, (N_VOCAB, N_EMBD)
    yield "output_norm.weight", plain, (N_EMBD,)
    if not tied:
        yield "output.weight", GGMLType.Q6_K, (N_VOCAB, N_EMBD)
    yield "rope_freqs.weight", plain, (N_EMBD // N_HEAD // 2,)
    stack = (n_expert,) if n_expert else ()
    suffix = "_exps" if n_expert else ""
    for layer in range(n_layer):
        name = f"blk.{layer}."
        yield name + "attn_norm.weight", plain, (N_EMBD,)
        for part, rows in (("q", N_EMBD), ("k", N_EMBD // 2), ("v", N_EMBD // 2), ("output", N_EMBD)):
            yield f"{name}attn_{part}.weight", quantized, (rows, N_EMBD)
        if n_expert:
            yield name + "ffn_gate_inp.weight", plain, (n_expert, N_EMBD)
        yield f"{name}ffn_gate{suffix}.weight", quantized, (*stack, N_FF, N_EMBD)
        yield f"{name}ffn_up{suffix}.weight", quantized, (*stack, N_FF, N_EMBD)
        yield f"{name}ffn_down{suffix}.weight", quantized, (*stack, N_EMBD, N_FF)
        yield name + "ffn_norm.weight", plain, (N_EMBD,)


def model_of(
    path: Path,
    *,
    n_layer: int = 8,
    n_expert: int = 2,
    n_used: int = 2,
    tied: bool = False,
    changes: Mapping[str, GGUFValue] = {},
) -> ModelHeader:
    """Write a file whose weights are a hole, and read its header."""
    infos, position = [], 0
    for name, kind, shape in tensors(n_layer, n_expert, tied=tied):
        n_bytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        infos.append(TensorInfo(name, kind, shape, position, n_bytes))
        position = padded(position + n_bytes, ALIGNMENT)
    header = encode_header({**metadata(n_layer, n_expert, n_used), **changes}, infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + position)
    return read_model_header(path)
