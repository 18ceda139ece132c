"""Small GGUF files with the names and keys of real models; their weights are zeros, or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.native import quantizing

U32, F32, BOOL, STRING, ARRAY = (
    ValueType.UINT32,
    ValueType.FLOAT32,
    ValueType.BOOL,
    ValueType.STRING,
    ValueType.ARRAY,
)
Tensors = Sequence[tuple[str, GGMLType, tuple[int, ...]]]

N_LAYER, N_EMBD, N_FF, N_VOCAB = 2, 256, 512, 40


def text(value: str) -> GGUFValue:
    return GGUFValue(STRING, value)


def u32(value: int) -> GGUFValue:
    return GGUFValue(U32, value)


def mixtral_metadata(n_expert: int, n_used: int) -> dict[str, GGUFValue]:
    tokens = [f"t{number}" for number in range(N_VOCAB)]
    return {
        "general.architecture": text("llama"),
        "general.type": text("model"),
        "general.name": text("Tiny 2x"),
        "general.license": text("apache-2.0"),
        "general.tags": GGUFValue(ARRAY, ["moe", "merge"], STRING),
        "general.base_model.count": u32(1),
        "general.base_model.0.name": text("Mistral 7B"),
        "general.base_model.0.organization": text("Mistralai"),
        "general.base_model.0.repo_url": text("https://example.org/m"),
        "general.sampling.top_k": GGUFValue(ValueType.INT32, 40),
        "general.file_type": u32(15),
        "general.quantization_version": u32(2),
        "llama.block_count": u32(N_LAYER),
        "llama.context_length": u32(32768),
        "llama.embedding_length": u32(N_EMBD),
        "llama.feed_forward_length": u32(N_FF),
        "llama.attention.head_count": u32(4),
        "llama.attention.head_count_kv": u32(2),
        "llama.attention.key_length": u32(64),
        "llama.rope.freq_base": GGUFValue(F32, 1e6),
        "llama.rope.dimension_count": u32(64),
        "llama.rope.scaling.type": text("yarn"),
        "llama.rope.scaling.factor": GGUFValue(F32, 4.0),
        "llama.expert_count": u32(n_expert),
        "llama.expert_used_count": u32(n_used),
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": GGUFValue(ARRAY, tokens, STRING),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
        "tokenizer.ggml.add_bos_token": GGUFValue(BOOL, True),
        "tokenizer.ggml.add_space_prefix": GGUFValue(BOOL, False),
        "tokenizer.chat_template": text("\n  {% for m in messages %}\n{{ m }}{% endfor %}"),
        "tokenizer.chat_template.tool_use": text("{{ tools }}"),
        "merge.gate_mode": text("hidden"),
    }


def mixtral_tensors(n_expert: int) -> Tensors:
    tensors: list[tuple[str, GGMLType, tuple[int, ...]]] = [("token_embd.weight", GGMLType.Q4_K, (N_VOCAB, N_EMBD))]
    for layer in range(N_LAYER):
        stem = f"blk.{layer}."
        tensors += [(f"{stem}attn_{name}.weight", GGMLType.Q4_K, (N_EMBD, N_EMBD)) for name in ("q", "output")]
        tensors += [(f"{stem}attn_{name}.weight", GGMLType.Q4_K, (N_EMBD // 2, N_EMBD)) for name in ("k", "v")]
        tensors += [(f"{stem}{name}_norm.weight", GGMLType.F32, (N_EMBD,)) for name in ("attn", "ffn")]
        tensors += [(f"{stem}ffn_gate_inp.weight", GGMLType.F32, (n_expert, N_EMBD))]
        tensors += [(f"{stem}ffn_{n}_exps.weight", GGMLType.Q4_K, (n_expert, N_FF, N_EMBD)) for n in ("gate", "up")]
        tensors += [(f"{stem}ffn_down_exps.weight", GGMLType.Q6_K, (n_expert, N_EMBD, N_FF))]
    tensors += [("output_norm.weight", GGMLType.F32, (N_EMBD,)), ("output.weight", GGMLType.Q6_K, (N_VOCAB, N_EMBD))]
    return tensors


def write_gguf(path: Path, metadata: Mapping[str, GGUFValue], tensors: Tensors = (), trailing: bytes = b"") -> Path:
    infos, offset = [], 0
    for name, kind, shape in tensors:
        n_bytes = kind.row_bytes(shape[-1])
        for dim in shape[:-1]:
            n_bytes *= dim
        infos.append(TensorInfo(name, kind, shape, offset, n_bytes))
        offset = padded(offset + n_bytes, 32)
    path.write_bytes(encode_header(metadata, infos) + bytes(offset) + trailing)
    return path


Arrays = Mapping[str, tuple[GGMLType, NDArray[np.float32]]]


def write_weights(path: Path, metadata: Mapping[str, GGUFValue], tensors: Arrays) -> Path:
    """A file whose tensors have these values, rounded to their types."""
    infos, blobs, offset = [], [], 0
    for name, (kind, values) in tensors.items():
        data = stored(kind, values)
        infos.append(TensorInfo(name, kind, values.shape, offset, len(data)))
        blobs.append(data.ljust(padded(len(data), 32), b"\0"))
        offset += len(blobs[-1])
    path.write_bytes(encode_header(metadata, infos) + b"".join(blobs))
    return path


def stored(kind: GGMLType, values: NDArray[np.float32]) -> bytes:
    """The bytes of values in a type: F32, F16, BF16 or a quantized one."""
    if kind is GGMLType.F32:
        return values.tobytes()
    if kind is GGMLType.F16:
        return values.astype(np.float16).tobytes()
    if kind is GGMLType.BF16:
        bits = np.empty(values.shape, np.uint16)
        quantizing.f32_to_bf16(np.ascontiguousarray(values), bits)
        return bits.tobytes()
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
    out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    quantizing.quantize_chunk(kind, rows, out)
    return out.tobytes()


def write_shards(folder: Path, metadata: Mapping[str, GGUFValue], shards: Sequence[Arrays]) -> list[Path]:
    """A split model; the first file has the metadata, as llama.cpp writes it."""
    paths, n_tensors = [], sum(map(len, shards))
    for number, tensors in enumerate(shards):
        keys = dict(metadata) if number == 0 else {}
        keys |= {
            "split.no": GGUFValue(ValueType.UINT16, number),
            "split.count": GGUFValue(ValueType.UINT16, len(shards)),
        }
        keys["split.tensors.count"] = GGUFValue(ValueType.INT32, n_tensors)
        path = folder / f"m-{number + 1:05d}-of-{len(shards):05d}.gguf"
        paths.append(write_weights(path, keys, tensors))
    return paths


def write_mixtral(path: Path, n_expert: int = 4, n_used: int = 2, changes: Mapping[str, GGUFValue | None] = {}) -> Path:
    """A Mixtral with these experts; ``changes`` replaces metadata keys, or removes those that are None."""
    metadata: dict[str, GGUFValue | None] = {**mixtral_metadata(n_expert, n_used), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, kept, mixtral_tensors(n_expert))
