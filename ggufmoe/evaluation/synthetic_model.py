"""GGUF files of made-up Llama models, for measurements and tests of the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT, LLAMA, Keys

Blob = tuple[str, GGMLType, tuple[int, ...], bytes]
"""A tensor: name, type, shape in numpy's order, and its bytes."""


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a model of the architecture ``llama``; a mixture of experts where ``n_expert`` is not 0."""

    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_ctx: int
    n_expert: int = 0
    n_expert_used: int = 0


def llama_metadata(name: str, shape: LlamaShape) -> dict[str, GGUFValue]:
    """The keys that libllama asks for: hyper-parameters, and a vocabulary of three special tokens and of bytes."""
    u32, f32, text = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(shape.n_vocab - 3))]
    values = {
        Keys.General.ARCHITECTURE: GGUFValue(text, LLAMA),
        Keys.General.NAME: GGUFValue(text, name),
        Keys.LLM.BLOCK_COUNT: GGUFValue(u32, shape.n_layer),
        Keys.LLM.CONTEXT_LENGTH: GGUFValue(u32, shape.n_ctx),
        Keys.LLM.EMBEDDING_LENGTH: GGUFValue(u32, shape.n_embd),
        Keys.LLM.FEED_FORWARD_LENGTH: GGUFValue(u32, shape.n_ff),
        Keys.Attention.HEAD_COUNT: GGUFValue(u32, shape.n_head),
        Keys.Attention.HEAD_COUNT_KV: GGUFValue(u32, shape.n_head_kv),
        Keys.Attention.LAYERNORM_RMS_EPS: GGUFValue(f32, 1e-5),
        Keys.Rope.DIMENSION_COUNT: GGUFValue(u32, shape.head_size),
    }
    if shape.head_size * shape.n_head != shape.n_embd:
        values |= dict.fromkeys(
            (Keys.Attention.KEY_LENGTH, Keys.Attention.VALUE_LENGTH), GGUFValue(u32, shape.head_size)
        )
    if shape.n_expert:
        values[Keys.LLM.EXPERT_COUNT] = GGUFValue(u32, shape.n_expert)
        values[Keys.LLM.EXPERT_USED_COUNT] = GGUFValue(u32, shape.n_expert_used)
    values |= {
        Keys.LLM.VOCAB_SIZE: GGUFValue(u32, shape.n_vocab),
        Keys.Tokenizer.MODEL: GGUFValue(text, "llama"),
        Keys.Tokenizer.LIST: GGUFValue(ValueType.ARRAY, tokens, text),
        Keys.Tokenizer.SCORES: GGUFValue(ValueType.ARRAY, [0.0] * shape.n_vocab, f32),
        Keys.Tokenizer.TOKEN_TYPE: GGUFValue(ValueType.ARRAY, [2, 3, 3] + [6] * (shape.n_vocab - 3), ValueType.INT32),
        Keys.Tokenizer.BOS_ID: GGUFValue(u32, 1),
        Keys.Tokenizer.EOS_ID: GGUFValue(u32, 2),
    }
    return {key.format(arch=LLAMA): value for key, value in values.items()}


def write_model(path: Path, metadata: dict[str, GGUFValue], tensors: Iterable[Blob]) -> Path:
    """Write a model to ``path`` and return the path. Raises OSError."""
    infos, blobs, offset = [], [], 0
    for name, kind, shape, data in tensors:
        infos.append(TensorInfo(name, kind, shape, offset, len(data)))
        blobs.append(data)
        offset += padded(len(data), DEFAULT_ALIGNMENT)
    with path.open("wb") as file:
        file.write(encode_header(metadata, infos))
        for data in blobs:
            file.write(data)
            file.write(bytes(padded(len(data), DEFAULT_ALIGNMENT) - len(data)))
    return path
