"""Session files, which hold a KV cache: their format, and the checks before llama.cpp reads the state.

    "GGMOESES", version and length of the header (uint32), header (JSON), tokens (int32), llama.cpp's state

All numbers are little-endian. The header names the model, the engine and the types of the cache, and has a SHA-256 of
what follows: llama.cpp trusts the bytes that it is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import ContextFullError, InputError, OutputError
from ggufmoe.files import replacing
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.upstream import LLAMA, Keys
from ggufmoe.native import library as native
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.runtime.kvcache import SavedState
from ggufmoe.sizes import memory_size
from ggufmoe.work import memory_bytes

_MAGIC = b"GGMOESES"
_VERSION = 1
_FIXED = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 64 << 20
_MAX_TOKENS = 2**31 - 1
_CHUNK = 1 << 20
_SAMPLED_TENSORS = 32
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class SessionFacts:
    """What must be equal for a saved state to be loaded."""

    model: str
    """SHA-256 over the file's metadata and tensors, and over samples of the weights."""
    engine: str
    """llama.cpp's commit, because the layout of its state may change with any version."""
    architecture: str
    cache_type_k: str
    cache_type_v: str
    n_expert_used: int | None
    swa_full: bool | None
    """None for models without sliding windows, to which the option makes no difference."""

    @classmethod
    def of(cls, model: ModelHeader, context: ContextOptions, offload: OffloadOptions) -> SessionFacts:
        return cls(
            model=_identity(model),
            engine=native.engine_version().llama_cpp_commit,
            architecture=str(model.get(Keys.General.ARCHITECTURE)),
            cache_type_k=context.cache_type_k,
            cache_type_v=context.cache_type_v,
            n_expert_used=offload.n_expert_used,
            swa_full=context.swa_full if model.memory.n_windowed else None,
        )


_WORDS = {
    "model": "another model",
    "engine": "another version of llama.cpp",
    "architecture": "another architecture",
    "cache_type_k": "another --cache-type-k",
    "cache_type_v": "another --cache-type-v",
    "n_expert_used": "another --n-expert-used",
    "swa_full": "another --swa-full",
}


def _identity(model: ModelHeader) -> str:
    digest = hashlib.sha256()
    for key, value in model.metadata.items():
        digest.update(repr((key, value.type, value.value)).encode("utf-8", "replace"))
    for shard in model.shards:
        tensors = shard.header.tensors
        digest.update(repr(tensors).encode())
        with open(shard.path, "rb") as file:
            for info in tensors[:: max(1, len(tensors) // _SAMPLED_TENSORS)]:
                file.seek(shard.header.data_offset + info.offset)
                digest.update(file.read(min(info.n_bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()


# ---- writing


def write_session(path: Path, state: SavedState, facts: SessionFacts, note: str, *, is_private: bool = False) -> None:
    """Write a session file; an older one at ``path`` is replaced when the new one is complete. Raises OutputError.

    ``is_private``: only the user may read it.
    """
    tokens = np.array(state.tokens, "<i4")
    digest = hashlib.sha256(tokens.tobytes())
    digest.update(state.data.data)
    content = {**asdict(facts), "n_tokens": len(tokens), "state_bytes": state.data.nbytes, "note": note}
    header = json.dumps({**content, "sha256": digest.hexdigest()}).encode()
    if len(header) > _MAX_HEADER_BYTES:
        raise OutputError(f"{path}: the note is longer than {_MAX_HEADER_BYTES >> 20} MiB")
    with replacing(path, "the session") as file:
        if is_private:
            os.chmod(file.name, 0o600)
        file.write(_FIXED.pack(_MAGIC, _VERSION, len(header)) + header + tokens.tobytes())
        file.write(state.data.data)


# ---- reading


def read_session(path: Path, facts: SessionFacts, n_ctx: int) -> tuple[SavedState, str]:
    """The state in ``path`` and its note. Raises InputError, and ContextFullError if ``n_ctx`` is too small for it."""
    with _opened(path, facts, n_ctx) as (file, header):
        state = _read_state(path, file, header)
    if facts.architecture == LLAMA:
        _check_plain(path, state)
    return state, header["note"]


def read_session_tokens(path: Path, facts: SessionFacts, n_ctx: int) -> NDArray[np.int32]:
    """The tokens in ``path`` without their state; the checksum is not checked. Raises what ``read_session`` raises."""
    with _opened(path, facts, n_ctx) as (file, header):
        return np.frombuffer(file.read(4 * header["n_tokens"]), "<i4").astype(np.int32)


@contextmanager
def _opened(path: Path, facts: SessionFacts, n_ctx: int) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """The file, to be read from the tokens on, and its header, with which the file's length and ``facts`` agree."""
    try:
        if path.exists() and not path.is_file():
            raise _damaged(path, "it is not a regular file")
        with open(path, "rb") as file:
            header = _read_header(path, file)
            _check_facts(path, header, facts)
            _check_sizes(path, header, os.fstat(file.fileno()).st_size - file.tell(), n_ctx)
            yield file, header
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _damaged(path: Path, how: str) -> InputError:
    return InputError(f"{path}: not a session that can be used: {how}")


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    fixed = file.read(_FIXED.size)
    if len(fixed) < _FIXED.size or not fixed.startswith(_MAGIC):
        raise _damaged(path, "it does not begin like one")
    _, version, n_bytes = _FIXED.unpack(fixed)
    if version != _VERSION:
        raise _damaged(path, f"it has version {version} of the format, and this program reads version {_VERSION}")
    if n_bytes > _MAX_HEADER_BYTES:
        raise _damaged(path, "its header is too long")
    try:
        header = json.loads(file.read(n_bytes))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is damaged") from error
    kinds = {"n_tokens": int, "state_bytes": int, "note": str, "sha256": str}
    if not isinstance(header, dict) or any(type(header.get(name)) is not kind for name, kind in kinds.items()):
        raise _damaged(path, "its header is damaged")
    return header


def _check_facts(path: Path, header: dict[str, Any], facts: SessionFacts) -> None:
    for field in fields(facts):
        there, here = header.get(field.name), getattr(facts, field.name)
        if there != here:
            shown = "" if field.name == "model" else f" ({str(there)[:60]!r}, and here it is {here!r})"
            raise InputError(f"{path}: a session of {_WORDS[field.name]}{shown}")


def _check_sizes(path: Path, header: dict[str, Any], body_bytes: int, n_ctx: int) -> None:
    n_tokens, n_bytes = header["n_tokens"], header["state_bytes"]
    if not (0 < n_tokens <= _MAX_TOKENS and n_bytes > 0 and 4 * n_tokens + n_bytes == body_bytes):
        raise _damaged(path, "it is longer or shorter than its header says")
    if n_tokens >= n_ctx:
        raise ContextFullError(
            f"{path}: the session has {n_tokens} tokens and the context holds {n_ctx}; ask for more with --ctx-size"
        )
    if memory_bytes() and n_bytes > memory_bytes():
        raise _damaged(path, f"its {memory_size(n_bytes)} are more than this machine's memory")


def _read_state(path: Path, file: BinaryIO, header: dict[str, Any]) -> SavedState:
    digest = hashlib.sha256()
    raw = file.read(4 * header["n_tokens"])
    digest.update(raw)
    data = np.empty(header["state_bytes"], np.uint8)
    for begin in range(0, len(data), _CHUNK):
        part = data.data[begin : begin + _CHUNK]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise _damaged(path, "it ends too early")
        digest.update(part)
    if digest.hexdigest() != header["sha256"]:
        raise _damaged(path, "its checksum is wrong")
    return SavedState(tuple(np.frombuffer(raw, "<i4").tolist()), data)


def _check_plain(path: Path, state: SavedState) -> None:
    """Check number and positions of the tokens in the state of a plain transformer. Anybody can make a checksum."""
    n = len(state.tokens)
    words = state.data[: (len(state.data) // 4) * 4].view("<u4")
    # a mark of llama.cpp and the sequence's number; then the caches, and the cells of the first, in any order
    cells = words[4 : 4 + 3 * n]
    if len(cells) != 3 * n or tuple(words[1:4]) != (0, 1, n):
        raise _damaged(path, "its state has another number of tokens")
    places, n_sequences, _ = cells.reshape(n, 3).T
    if (np.sort(places) != np.arange(n)).any() or (n_sequences != 1).any():
        raise _damaged(path, "its tokens are not in their places")
