"""The headers of all files of one model: which files belong together, and what kind of file they are.

A model may be split into shards, of which the first holds the metadata; it is read given any of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ggufmoe.errors import GGUFError
from ggufmoe.files import possible_path
from ggufmoe.gguf.header import GGUFValue, Header, TensorInfo, read_header
from ggufmoe.gguf.hyper import Hyper
from ggufmoe.gguf.layer_memory import ModelMemory
from ggufmoe.gguf.types import ValueType
from ggufmoe.gguf.upstream import Keys


@dataclass(frozen=True)
class Shard:
    """One file of a model with its header."""

    path: Path
    header: Header


@dataclass(frozen=True)
class ModelHeader:
    """The headers of all files of one model; a model that is not split is a single shard."""

    shards: tuple[Shard, ...]

    @property
    def metadata(self) -> Mapping[str, GGUFValue]:
        """The model's metadata, which the first shard holds."""
        return self.shards[0].header.metadata

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Tensors of all shards; an offset counts within its own shard."""
        return tuple(tensor for shard in self.shards for tensor in shard.header.tensors)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files in order; llama.cpp is given the first one."""
        return tuple(shard.path for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        """Size of all files together."""
        return sum(shard.header.file_bytes for shard in self.shards)

    @cached_property
    def hyper(self) -> Hyper:
        """The model's hyper-parameters."""
        return Hyper.of(self.metadata)

    @cached_property
    def memory(self) -> ModelMemory:
        """What the model's layers keep of a text."""
        return ModelMemory.of(self.metadata)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key, or ``default`` where the model has none."""
        return self.shards[0].header.get(key, default)


SPLIT_NUMBER: str = Keys.Split.LLM_KV_SPLIT_NO
SPLIT_COUNT: str = Keys.Split.LLM_KV_SPLIT_COUNT
SPLIT_TENSORS: str = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT
SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)
"""Keys that describe the files of a split model, and not the model."""
_SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the model that ``path`` belongs to, in order: its shards, or the file alone if it is not split.

    Raises GGUFError if the header cannot be read, contradicts the file's name, or files are missing.
    """
    path = possible_path(path)
    return _shard_paths(path, read_header(path))


def read_model_header(path: Path) -> ModelHeader:
    """Read the headers of all shards of a model, given any of them, as llama.cpp writes and checks them.

    Raises GGUFError as ``read_header`` does, and if shards are missing or belong to another model.
    """
    path = possible_path(path)
    given = read_header(path)
    paths = _shard_paths(path, given)
    return join_shards(tuple(Shard(file, given if file == path else read_header(file)) for file in paths))


def join_shards(shards: tuple[Shard, ...]) -> ModelHeader:
    """One model of the headers of all its files, in order. Raises GGUFError if one belongs to another model."""
    model = ModelHeader(shards)
    if len(shards) > 1:
        for number, shard in enumerate(shards):
            _check_shard(shard, number, len(shards))
        _check_shard_tensors(model)
    return model


def _shard_paths(path: Path, header: Header) -> tuple[Path, ...]:
    count = _uint16(path, header, SPLIT_COUNT, 1)
    if count <= 1:
        return (path,)
    number = _uint16(path, header, SPLIT_NUMBER, None)
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise GGUFError(
            f"{path}: is shard {number + 1} of {count}, so its name must end in -{number + 1:05d}-of-{count:05d}.gguf; "
            "give it back its name"
        )
    paths = tuple(path.with_name(f"{name['prefix']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1))
    missing = [file.name for file in paths if not file.is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise GGUFError(f"{path.parent}: {len(missing)} of {count} shards are missing: {shown}; download them as well")
    return paths


def _uint16(path: Path, header: Header, key: str, default: int | None) -> int:
    value = header.metadata.get(key)
    if value is None and default is not None:
        return default
    if value is None or value.type is not ValueType.UINT16:
        found = "missing" if value is None else value.type.name
        raise GGUFError(f"{path}: {key} is {found}, expected UINT16; this shard is corrupt")
    return int(value.value)


def _check_shard(shard: Shard, number: int, count: int) -> None:
    for key, expected in ((SPLIT_NUMBER, number), (SPLIT_COUNT, count)):
        found = _uint16(shard.path, shard.header, key, None)
        if found != expected:
            raise GGUFError(f"{shard.path}: {key} is {found}, expected {expected}; this shard is of another model")


def _check_shard_tensors(model: ModelHeader) -> None:
    first = model.shards[0]
    expected = first.header.get(SPLIT_TENSORS)
    if expected != len(model.tensors):
        raise GGUFError(
            f"{first.path}: {SPLIT_TENSORS} is {expected}, but the shards hold {len(model.tensors)} tensors; "
            "a shard is of another model"
        )
    home: dict[str, Path] = {}
    for shard in model.shards:
        for tensor in shard.header.tensors:
            if tensor.name in home:
                raise GGUFError(f"{shard.path}: tensor {tensor.name!r} is in {home[tensor.name].name} as well")
            home[tensor.name] = shard.path


NO_MODELS = {
    "imatrix": "an importance matrix, not a model; convert and quantize take it with --imatrix",
    "adapter": "an adapter (LoRA), not a model; it has to be merged into its model first",
    "mmproj": "the projector of a model for pictures or sound, not a model by itself",
}
"""What a file is whose ``general.type`` is not ``model`` (gguf-py's GGUFType), and what to do with it."""


def check_kind(model: ModelHeader) -> None:
    """Raise GGUFError if the file says that it is not a model, but for example an importance matrix."""
    kind = model.get(Keys.General.TYPE)
    if isinstance(kind, str) and kind in NO_MODELS:
        raise GGUFError(f"{model.paths[0]}: {NO_MODELS[kind]}")
