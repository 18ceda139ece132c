"""Manifests: a hash of each tensor of a GGUF, because the format itself has no checksum.

Owns ``OUT.manifest.json``: making it, reading it (as untrusted input) and comparing files with it. Hashes are SHA-256,
which ``hashlib`` computes with the processor's own instructions and outside the GIL; memory is one chunk for each
thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufmoe.errors import GGUFError, InputError
from ggufmoe.files import decode_text, replacing
from ggufmoe.gguf.header import Header, read_header
from ggufmoe.version import __version__
from ggufmoe.work import CancelFlag, OnProgress, Work

FORMAT = "ggufmoe-manifest"
VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20
"""A tensor takes about 150 bytes, and the largest models have fewer than 100,000."""
CHUNK_BYTES = 4 * 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileManifest:
    """One GGUF file: its name without directory, its size, and SHA-256 digests (hexadecimal).

    ``header_sha256`` covers the bytes before the first tensor, so names, types and shapes as well; ``tensors`` maps a
    tensor's name to the digest of its bytes.
    """

    name: str
    n_bytes: int
    header_sha256: str
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """The files of one model, in the order of its shards, and the version of ggufmoe that hashed them."""

    ggufmoe_version: str
    files: tuple[FileManifest, ...]


def default_path(gguf_path: Path) -> Path:
    """The path of the manifest of a GGUF: ``OUT.manifest.json`` beside ``OUT.gguf`` or ``OUT-00001-of-0000N.gguf``."""
    gguf_path = Path(gguf_path)
    stem = gguf_path.name.removesuffix(".gguf")
    return gguf_path.with_name(re.sub(r"-\d{5}-of-\d{5}$", "", stem) + ".manifest.json")


def write_manifest(
    paths: Sequence[Path],
    manifest_path: Path | None = None,
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Path:
    """Hash finished GGUF files (the shards of one model, in order) and write their manifest; returns its path.

    The manifest is written completely or not at all. ``threads`` is None for all usable cores. Raises GGUFError if a
    file cannot be read, OutputError if the manifest cannot be written, Cancelled when ``cancel`` is set meanwhile.
    """
    target = default_path(paths[0]) if manifest_path is None else Path(manifest_path)
    manifest = make_manifest(paths, threads=threads, on_progress=on_progress, cancel=cancel)
    with replacing(target, "the manifest") as file:
        file.write(encode_manifest(manifest).encode())
    return target


def make_manifest(
    paths: Sequence[Path],
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Manifest:
    """The manifest of these GGUF files as they are now; raises GGUFError and Cancelled."""
    files = [(Path(path), read_header(path)) for path in paths]
    return hash_files(files, threads=threads, on_progress=on_progress, cancel=cancel)


def hash_files(
    files: Sequence[tuple[Path, Header]],
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Manifest:
    """The manifest of GGUF files whose headers are read; each thread reads CHUNK_BYTES at a time.

    Raises GGUFError if a file is shorter than its header says or cannot be read, Cancelled when ``cancel`` is set.
    """
    regions = [region for path, header in files for region in _regions(path, header)]
    work = Work(
        "hash",
        sum(region.n_bytes for region in regions),
        stopped=f"{files[0][0]}: hashing was stopped",
        on_progress=on_progress,
        cancel=cancel,
    )
    by_size = sorted(regions, key=lambda region: region.n_bytes, reverse=True)
    digests = dict(zip(by_size, work.map(lambda region: _hash(region, work), by_size, threads), strict=True))
    return Manifest(__version__, tuple(_file_manifest(path, header, digests) for path, header in files))


@dataclass(frozen=True)
class _Region:
    """Bytes of a file that are hashed together: a tensor, or (named "header") all before the first tensor."""

    path: Path
    begin: int
    n_bytes: int
    name: str


def _regions(path: Path, header: Header) -> Iterator[_Region]:
    """The header of a file first, then its tensors in their order."""
    yield _Region(path, 0, header.data_offset, "header")
    for tensor in header.tensors:
        yield _Region(path, header.data_offset + tensor.offset, tensor.n_bytes, tensor.name)


def _file_manifest(path: Path, header: Header, digests: Mapping[_Region, str]) -> FileManifest:
    head, *tensors = _regions(path, header)
    return FileManifest(path.name, header.file_bytes, digests[head], {one.name: digests[one] for one in tensors})


def _hash(region: _Region, work: Work) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(region):
        work.check()
        digest.update(chunk)
        work.advance(len(chunk), region.name)
    return digest.hexdigest()


def _chunks(region: _Region) -> Iterator[memoryview]:
    path, name, left = region.path, region.name, region.n_bytes
    buffer = memoryview(bytearray(min(left, CHUNK_BYTES)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(region.begin)
            while left:
                count = file.readinto(buffer[: min(left, CHUNK_BYTES)])
                if not count:
                    raise GGUFError(f"{path}: ends {left} bytes before the end of {name!r}; is it being written?")
                left -= count
                yield buffer[:count]
    except OSError as error:
        raise GGUFError(f"{path}: {name!r} cannot be read: {error.strerror or error}") from error


def encode_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text, one line for each tensor."""
    files = [
        {"name": file.name, "bytes": file.n_bytes, "header_sha256": file.header_sha256, "tensors": dict(file.tensors)}
        for file in manifest.files
    ]
    document = {"format": FORMAT, "version": VERSION, "ggufmoe": manifest.ggufmoe_version, "files": files}
    return json.dumps(document, indent=1) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, which is untrusted input. Raises InputError if it is not a manifest of ggufmoe."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: there is no such manifest; make one with 'ggufmoe convert --manifest'")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputError(f"{path}: is larger than {MAX_MANIFEST_BYTES} bytes; this is not a manifest")
        document = json.loads(decode_text(path.read_bytes()), object_pairs_hook=_without_repeats)
        return _parse(document)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not a manifest of ggufmoe: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


def _parse(document: Any) -> Manifest:
    fields = _object(document, {"format": str, "version": int, "ggufmoe": str, "files": list}, "the manifest")
    if fields["format"] != FORMAT or fields["version"] != VERSION:
        raise ValueError(
            f"it is {fields['format']!r} version {fields['version']}, expected {FORMAT!r} version {VERSION}"
        )
    files = tuple(_parse_file(entry) for entry in fields["files"])
    if not files or len({file.name for file in files}) < len(files):
        raise ValueError("it must list at least one file, and none twice")
    return Manifest(fields["ggufmoe"], files)


def _parse_file(entry: Any) -> FileManifest:
    fields = _object(entry, {"name": str, "bytes": int, "header_sha256": str, "tensors": dict}, "a file")
    name = fields["name"]
    # a manifest may not point at files outside its directory, on any system
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(f"{name!r} is not the name of a file")
    for owner, digest in (("header", fields["header_sha256"]), *fields["tensors"].items()):
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise ValueError(f"{name}: the hash of {owner!r} is not 64 hexadecimal digits")
    return FileManifest(name, fields["bytes"], fields["header_sha256"], fields["tensors"])


def _object(value: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"{what} must be an object with {', '.join(types)} and nothing else")
    for key, expected in types.items():
        if type(value[key]) is not expected:
            raise ValueError(f"{key!r} of {what} must be of type {expected.__name__}")
    return value


def verify(
    paths: Path | Sequence[Path],
    manifest: Manifest,
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> list[str]:
    """Compare GGUF files, or one, with their manifest; returns a sentence for each difference.

    Files are matched by their order and not by name, so a renamed copy verifies. Padding between tensors is not
    compared. Raises GGUFError if a header cannot be read.
    """
    files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if len(files) != len(manifest.files):
        return [f"the model has {len(files)} files, the manifest {len(manifest.files)}"]
    found = make_manifest(files, threads=threads, on_progress=on_progress, cancel=cancel)
    pairs = zip(found.files, manifest.files, strict=True)
    return [difference for ours, theirs in pairs for difference in _differences(ours, theirs)]


def _differences(found: FileManifest, expected: FileManifest) -> Iterator[str]:
    if found.n_bytes != expected.n_bytes:
        yield f"{found.name}: has {found.n_bytes} bytes, the manifest says {expected.n_bytes}"
    if found.header_sha256 != expected.header_sha256:
        yield f"{found.name}: the header (metadata, names, shapes) differs"
    for name in {**expected.tensors, **found.tensors}:
        if name not in found.tensors:
            yield f"{found.name}: tensor {name!r} is missing"
        elif name not in expected.tensors:
            yield f"{found.name}: tensor {name!r} is not in the manifest"
        elif found.tensors[name] != expected.tensors[name]:
            yield f"{found.name}: tensor {name!r} differs"
