"""GGUF files taken apart and put together again, with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded, read_header
from ggufmoe.gguf.types import GGMLType


@dataclass(frozen=True)
class Stored:
    """A tensor with its bytes."""

    type: GGMLType
    shape: tuple[int, ...]
    data: bytes


def load(path: Path) -> tuple[dict[str, GGUFValue], dict[str, Stored]]:
    """Keys and tensors of a file."""
    header, content = read_header(path), path.read_bytes()
    tensors = {}
    for tensor in header.tensors:
        begin = header.data_offset + tensor.offset
        tensors[tensor.name] = Stored(tensor.type, tensor.shape, content[begin : begin + tensor.n_bytes])
    return dict(header.metadata), tensors


def store(path: Path, metadata: Mapping[str, GGUFValue], tensors: Mapping[str, Stored], alignment: int = 32) -> Path:
    """A file of these keys and tensors."""
    infos, offset, data = [], 0, b""
    for name, tensor in tensors.items():
        infos.append(TensorInfo(name, tensor.type, tensor.shape, offset, len(tensor.data)))
        data += tensor.data.ljust(padded(len(tensor.data), alignment), b"\0")
        offset = len(data)
    path.write_bytes(encode_header(metadata, infos, alignment) + data)
    return path


def unstacked(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with one for each expert, as Mixtral files had them before April 2024."""
    legacy: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_exps.weight"):
            legacy[name] = tensor
            continue
        n_expert = tensor.shape[0]
        size = len(tensor.data) // n_expert
        for i in range(n_expert):
            part = tensor.data[i * size : (i + 1) * size]
            legacy[name.replace("_exps.", f".{i}.")] = Stored(tensor.type, tensor.shape[1:], part)
    return legacy
