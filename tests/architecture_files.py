"""Small GGUF models of many architectures: names, keys and shapes of llama.cpp's converter, and random weights.

``scripts/peers/run_architectures --write-fixtures`` made ``architectures.json`` from tiny models of transformers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import GGMLType, ValueType
from tests.gguf_files import ARRAY, BOOL, F32, STRING, text, u32, write_weights

_FIXTURES = Path(__file__).with_name("architectures.json")
_N_BYTES = 256
_SPREAD = 0.12


@cache
def fixtures() -> dict[str, dict[str, Any]]:
    """Per architecture: ``metadata`` as key to [type, value] and ``tensors`` as name to shape, outermost first.

    ``{n}`` in a name stands for the layers that are listed beside the shape.
    """
    found: dict[str, dict[str, Any]] = json.loads(_FIXTURES.read_text(encoding="utf-8"))
    return found


def metadata_of(name: str) -> dict[str, GGUFValue]:
    """The metadata of an architecture with a vocabulary of bytes and words."""
    return {key: _value(*stated) for key, stated in fixtures()[name]["metadata"].items()} | _vocabulary(name)


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, outermost dimension first."""
    found: dict[str, tuple[int, ...]] = {}
    for pattern, (shape, layers) in fixtures()[name]["tensors"].items():
        found |= {pattern.replace("{n}", str(layer)): tuple(shape) for layer in layers}
    return found


def write_architecture(
    path: Path, name: str, changes: Mapping[str, GGUFValue] | None = None, kind: GGMLType = GGMLType.F32
) -> Path:
    """Write a random model; matrices of whole blocks are stored as ``kind``, all else as float32."""
    tensors = {}
    for tensor, shape in shapes_of(name).items():
        values = _weights(tensor, shape)
        is_matrix = len(shape) > 1 and tensor.endswith(".weight") and "ssm_conv" not in tensor
        is_plain = is_matrix and "shortconv.conv" not in tensor and "ffn_gate_inp" not in tensor
        fits = is_plain and shape[-1] % kind.block_size == 0
        tensors[tensor] = (kind if fits else GGMLType.F32, values)
    return write_weights(path, {**metadata_of(name), **(changes or {})}, tensors)


def _weights(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    noise = random.normal(0, 1, shape).astype(np.float32)
    if name.endswith("ssm_a"):
        values = -np.exp(0.1 * noise)
    elif "norm" in name:
        values = 1 + 0.05 * noise
    else:
        values = (0.05 if len(shape) == 1 else _SPREAD) * noise
    return np.asarray(values, np.float32)


def _value(kind: str, value: Any) -> GGUFValue:
    if kind.endswith("[]"):
        return GGUFValue(ARRAY, value, ValueType[kind[:-2]])
    return GGUFValue(ValueType[kind], value)


def _vocabulary(name: str) -> dict[str, GGUFValue]:
    n_rows = shapes_of(name)["token_embd.weight"][0]
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_N_BYTES))]
    tokens = named + [f"▁word{number}" for number in range(n_rows - len(named))]
    types = [2, 3, 3] + [6] * _N_BYTES + [1] * (n_rows - len(named))
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": GGUFValue(ARRAY, tokens, STRING),
        "tokenizer.ggml.scores": GGUFValue(ARRAY, [float(-number) for number in range(n_rows)], F32),
        "tokenizer.ggml.token_type": GGUFValue(ARRAY, types, ValueType.INT32),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
        "tokenizer.ggml.add_bos_token": GGUFValue(BOOL, True),
        "tokenizer.chat_template": text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"),
    }
