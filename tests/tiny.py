"""Tiny Hugging Face checkpoints with seeded random weights, small enough to convert and run in a test.

The weights depend only on the seed and on each tensor's classic name: a fused and a classic checkpoint of one
specification hold the same numbers.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import tiny_tokenizers

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class Tiny:
    """What a tiny checkpoint looks like; ``make_checkpoint`` takes the same words as keyword arguments."""

    arch: str = "mixtral"
    layout: str = "classic"
    n_expert: int = 2
    n_expert_used: int = 2
    n_embd: int = 256
    n_ff: int = 512
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int | None = None
    tie: bool = False
    dtype: str = "BF16"
    tokenizer: str | None = "spm"
    n_vocab: int | None = None
    max_shard_bytes: int | None = None
    seed: int = 0
    config_style: int = 4
    chat_template: str | None = None
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are put into config.json as they are; a value of ``...`` removes the key."""

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def vocab_rows(self) -> int:
        return self.n_vocab or tiny_tokenizers.vocabulary_size(self.tokenizer)


def make_checkpoint(directory: Path, **fields: Any) -> Path:
    """Write a checkpoint with the given fields of ``Tiny`` into ``directory`` (made if need be); returns it."""
    spec = Tiny(**fields)
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, stored_tensors(spec), spec.max_shard_bytes)
    _write_json(directory / "config.json", config_json(spec))
    if spec.tokenizer is not None:
        write_tokenizer(directory, spec.tokenizer, spec.chat_template)
    return directory


def classic_weights(spec: Tiny) -> dict[str, NDArray[Any]]:
    """Every tensor by its classic name, in storage form (uint16 bits for BF16, else float16 or float32)."""
    return {
        name: stored_bits(random_values(spec.seed, name, shape), spec.dtype) for name, shape in _classic_shapes(spec)
    }


def stored_tensors(spec: Tiny) -> dict[str, tuple[str, NDArray[Any]]]:
    """What goes into the file: name to (safetensors dtype, data), experts stacked where the layout is fused."""
    weights = classic_weights(spec)
    if spec.arch == "mixtral" and spec.layout == "fused":
        weights = _fuse(spec, weights)
    return {name: (spec.dtype, data) for name, data in weights.items()}


def _classic_shapes(spec: Tiny) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (spec.vocab_rows, spec.n_embd)
    for layer in range(spec.n_layer):
        for name, shape in _layer_shapes(spec):
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (spec.n_embd,)
    if not spec.tie:
        yield "lm_head.weight", (spec.vocab_rows, spec.n_embd)


def _layer_shapes(spec: Tiny) -> Iterator[tuple[str, tuple[int, ...]]]:
    q_rows, kv_rows = spec.n_head * spec.head_width, spec.n_head_kv * spec.head_width
    yield "input_layernorm", (spec.n_embd,)
    yield "post_attention_layernorm", (spec.n_embd,)
    yield "self_attn.q_proj", (q_rows, spec.n_embd)
    yield "self_attn.k_proj", (kv_rows, spec.n_embd)
    yield "self_attn.v_proj", (kv_rows, spec.n_embd)
    yield "self_attn.o_proj", (spec.n_embd, q_rows)
    if spec.arch != "mixtral":
        yield from _swiglu_shapes(spec, "mlp", ("gate_proj", "up_proj", "down_proj"))
        return
    yield "block_sparse_moe.gate", (spec.n_expert, spec.n_embd)
    for expert in range(spec.n_expert):
        yield from _swiglu_shapes(spec, f"block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"))


def _swiglu_shapes(spec: Tiny, prefix: str, names: tuple[str, str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    gate, up, down = names
    yield f"{prefix}.{gate}", (spec.n_ff, spec.n_embd)
    yield f"{prefix}.{up}", (spec.n_ff, spec.n_embd)
    yield f"{prefix}.{down}", (spec.n_embd, spec.n_ff)


def random_values(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = np.random.default_rng((seed, zlib.crc32(name.encode()))).normal(0, 0.02, shape).astype(np.float32)
    return values + np.float32(1) if len(shape) == 1 else values


def stored_bits(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _fuse(spec: Tiny, weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    fused = {name: data for name, data in weights.items() if ".block_sparse_moe." not in name}
    for layer in range(spec.n_layer):
        moe, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        experts = [
            {part: weights[f"{moe}.experts.{e}.{part}.weight"] for part in ("w1", "w2", "w3")}
            for e in range(spec.n_expert)
        ]
        fused[f"{mlp}.gate.weight"] = weights[f"{moe}.gate.weight"]
        fused[f"{mlp}.experts.gate_up_proj"] = np.stack([np.concatenate((e["w1"], e["w3"])) for e in experts])
        fused[f"{mlp}.experts.down_proj"] = np.stack([e["w2"] for e in experts])
    return fused


def config_json(spec: Tiny) -> dict[str, Any]:
    """config.json as transformers 4 or 5 (``config_style``) writes it."""
    begin, end = tiny_tokenizers.special_ids(spec.tokenizer or "spm")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.arch]],
        "model_type": spec.arch,
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "num_hidden_layers": spec.n_layer,
        "num_attention_heads": spec.n_head,
        "num_key_value_heads": spec.n_head_kv,
        "vocab_size": spec.vocab_rows,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": spec.tie,
        "bos_token_id": begin,
        "eos_token_id": end,
    }
    config |= _rope_json(spec) | _dtype_json(spec)
    if spec.head_dim is not None:
        config["head_dim"] = spec.head_dim
    if spec.arch == "mixtral":
        config |= {"num_local_experts": spec.n_expert, "num_experts_per_tok": spec.n_expert_used}
    return {key: value for key, value in (config | dict(spec.config)).items() if value is not ...}


def _rope_json(spec: Tiny) -> dict[str, Any]:
    if spec.config_style == 5:
        parameters = {"rope_theta": spec.rope_theta, **(spec.rope_scaling or {"rope_type": "default"})}
        return {"rope_parameters": parameters}
    return {"rope_theta": spec.rope_theta, "rope_scaling": spec.rope_scaling and dict(spec.rope_scaling)}


def _dtype_json(spec: Tiny) -> dict[str, str]:
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[spec.dtype]
    if spec.config_style == 5:
        return {"dtype": name, "transformers_version": "5.12.0"}
    return {"torch_dtype": name, "transformers_version": "4.38.0"}


def write_tokenizer(directory: Path, kind: str, chat_template: str | None) -> None:
    for name, content in tiny_tokenizers.tokenizer_files(kind).items():
        (directory / name).write_bytes(content)
    config = tiny_tokenizers.tokenizer_config(kind)
    if chat_template is not None:
        config["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_shards(directory: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]], max_bytes: int | None) -> None:
    """Write ``model.safetensors``, or as many shards of at most ``max_bytes`` as it takes, and their index."""
    shards: list[dict[str, tuple[str, NDArray[Any]]]] = [{}]
    size = 0
    for name, (dtype, data) in tensors.items():
        if max_bytes is not None and shards[-1] and size + data.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, data)
        size += data.nbytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(data.nbytes for _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """Write one file; each tensor is its dtype in the file and an array of the right size and shape."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, data in tensors.values():
            file.write(np.ascontiguousarray(data).tobytes())
