"""Finds and opens the tensor files of a checkpoint directory: one ``model.safetensors``, or an index and its shards.

An index may name files of its own directory only (which may be links, as huggingface_hub makes them), and what it says
of each tensor must agree with the shards. Weights in other formats are refused, with a way to convert them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from ggufmoe.checkpoint.jsonfile import read_object
from ggufmoe.checkpoint.layouts import is_harmless
from ggufmoe.checkpoint.safetensors import TensorEntry, TensorFile
from ggufmoe.errors import CheckpointError, SafetensorsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMBERED = "model-*-of-*.safetensors"
"""Glob pattern of the names of shards."""

_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MAX_SHARDS = 10_000

Stored = Mapping[str, tuple[TensorFile, TensorEntry]]
Elsewhere = Mapping[str, TensorFile]
"""The tensor files of a checkpoint that are not on this machine, by their names."""


def open_tensor_files(directory: Path, elsewhere: Elsewhere | None = None) -> tuple[tuple[TensorFile, ...], Stored]:
    """Open all tensor files of a checkpoint; returns the files, and a map of stored names to file and entry.

    A single ``model.safetensors`` takes precedence over an index, as in transformers; without an index all numbered
    shards are opened, or the only file whose name begins with ``model``. A file that is in the directory and
    ``elsewhere`` is read from the directory. Raises SafetensorsError for files that break the specification or do not
    match the index, CheckpointError if there are no such files.
    """
    elsewhere = elsewhere or {}
    has_single = SINGLE in elsewhere or (directory / SINGLE).is_file()
    has_index = not has_single and (directory / INDEX).is_file()
    weight_map = read_index(directory, elsewhere) if has_index else None
    names = _unindexed(directory, elsewhere) if weight_map is None else sorted(set(weight_map.values()))
    with ExitStack() as stack:
        files = []
        for name in names:
            is_here = name not in elsewhere or (directory / name).is_file()
            files.append(TensorFile(directory / name) if is_here else elsewhere[name])
            stack.callback(files[-1].close)
        stored = _stored(directory, files)
        if weight_map is not None:
            _check_index(directory, weight_map, stored)
        stack.pop_all()
    return tuple(files), stored


def are_complete(directory: Path) -> bool:
    """Whether a directory has all tensor files of its checkpoint."""
    try:
        has_index = not (directory / SINGLE).is_file() and (directory / INDEX).is_file()
        return bool(read_index(directory) if has_index else _unindexed(directory, ()))
    except CheckpointError:
        return False


def read_index(directory: Path, elsewhere: Collection[str] = ()) -> dict[str, str]:
    """Read the index of a directory: a map of tensor names to names of shards, which exist there or ``elsewhere``.

    Raises SafetensorsError if the index is malformed or shards are missing, CheckpointError for broken links.
    """
    weight_map = parse_index(directory / INDEX)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if name not in elsewhere and not (directory / name).is_file()]
    check_links(directory)
    if missing:
        raise SafetensorsError(
            f"{directory} lacks {len(missing)} of the {len(shards)} shards of its index: {_listed(missing)}"
        )
    return weight_map


def _unindexed(directory: Path, elsewhere: Collection[str]) -> list[str]:
    """Find the names of the tensor files of a directory, there or ``elsewhere``, without using an index."""
    if SINGLE in elsewhere or (directory / SINGLE).is_file():
        return [SINGLE]
    names = sorted({path.name for path in directory.glob("model*.safetensors") if path.is_file()}.union(elsewhere))
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    if not numbered:
        if len(names) == 1:
            return names
        raise _no_weights(directory)
    counts = {int(match[2]) for match in numbered}
    wanted = [f"model-{i:05d}-of-{max(counts):05d}.safetensors" for i in range(1, min(max(counts), _MAX_SHARDS) + 1)]
    missing = [name for name in wanted if name not in names]
    if missing or len(counts) > 1:
        raise SafetensorsError(
            f"{directory} has no {INDEX}, and of its numbered shards these are missing: {_listed(missing or wanted)}"
        )
    return wanted


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def parse_index(path: Path) -> dict[str, str]:
    """The weight map of an index file: tensor name to shard name. Whether the shards exist is not checked."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SafetensorsError(f"{path} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise SafetensorsError(f"{path} puts {tensor!r:.100} into {shard!r:.100}, which is not the name of a shard")
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether ``name`` is a file name on every system, without a folder, and ends in .safetensors."""
    plain = name.isprintable() and len(name) <= 255 and not set(name) & set('/\\:"<>|?*')
    return plain and name.endswith(".safetensors") and not name.startswith(".")


def _stored(directory: Path, files: list[TensorFile]) -> Stored:
    stored: dict[str, tuple[TensorFile, TensorEntry]] = {}
    for file in files:
        for name, entry in file.header.entries.items():
            if name in stored:
                first = stored[name][0].path.name
                raise SafetensorsError(f"{directory} has tensor {name!r:.100} twice: in {first} and {file.path.name}")
            stored[name] = (file, entry)
    return stored


def _check_index(directory: Path, weight_map: Mapping[str, str], stored: Stored) -> None:
    for name, shard in weight_map.items():
        if name not in stored and (is_harmless(name) or name.endswith("lm_head.weight")):
            continue  # a buffer, or an output tied to the embedding; layouts checks whether it is needed
        if name not in stored or stored[name][0].path.name != shard:
            raise SafetensorsError(f"{directory / INDEX} puts {name!r:.100} into {shard}, which does not hold it")
    unlisted = [name for name in stored if name not in weight_map and not is_harmless(name)]
    if unlisted:
        shard = stored[unlisted[0]][0].path.name
        raise SafetensorsError(
            f"{directory / INDEX} does not list {len(unlisted)} tensors of its shards, {unlisted[0]!r:.100} in {shard}"
            " being the first"
        )


def check_links(directory: Path) -> None:
    """Raise CheckpointError if a directory has broken links, as a cache has whose blobs were deleted."""
    broken = sorted(path.name for path in directory.iterdir() if path.is_symlink() and not path.exists())
    if broken:
        raise CheckpointError(
            f"{directory} has broken links: {_listed(broken)}; their targets were moved or deleted: fetch these files "
            "again"
        )


def _no_weights(directory: Path) -> CheckpointError:
    check_links(directory)
    names = sorted(path.name for path in directory.iterdir())
    if any(name.endswith((".bin", ".bin.index.json", ".pth", ".pt")) for name in names):
        return CheckpointError(
            f"{directory} has its weights in pickle files (.bin, .pth), which can run any code when they are read and "
            "are refused; on a machine where that is safe load them with transformers and call "
            "save_pretrained(DIRECTORY, safe_serialization=True)"
        )
    if "adapter_config.json" in names:
        return CheckpointError(f"{directory} is an adapter (LoRA), not a model; merge it into its base model first")
    if any(name.endswith(".gguf") for name in names):
        return CheckpointError(
            f"{directory} holds GGUF files, which need no conversion; give one of them to run or chat"
        )
    if any(name.endswith(".safetensors") for name in names):
        return CheckpointError(f"{directory} has safetensors files but neither {SINGLE} nor {INDEX}; fetch that too")
    return CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}: there are no weights in it")
