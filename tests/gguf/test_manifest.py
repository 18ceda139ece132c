"""Manifests: what they say is what the files hold, changes are found and named, and bad manifests are refused."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from ggufmoe import __version__
from ggufmoe.errors import Cancelled, GGUFError, InputError, OutputError
from ggufmoe.gguf import manifest
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded, read_header
from ggufmoe.gguf.manifest import default_path, hash_files, make_manifest, read_manifest, verify, write_manifest
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.work import Progress

SIZES = {"token_embd.weight": 40, "blk.0.ffn_up_exps.weight": 9_000_000, "output.weight": 8}


def write_gguf(path: Path, sizes: dict[str, int] = SIZES, *, name: str = "model", seed: int = 0) -> dict[str, bytes]:
    """A GGUF of I8 tensors with these sizes; returns their bytes."""
    infos, contents, offset = [], {}, 0
    for index, (tensor, n_bytes) in enumerate(sizes.items()):
        infos.append(TensorInfo(tensor, GGMLType.I8, (n_bytes,), offset, n_bytes))
        contents[tensor] = hashlib.shake_128(bytes([seed, index])).digest(n_bytes)
        offset = padded(offset + n_bytes, 32)
    content = encode_header({"general.name": GGUFValue(ValueType.STRING, name)}, infos)
    for data in contents.values():
        content += data + bytes(padded(len(data), 32) - len(data))
    path.write_bytes(content)
    return contents


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    return path


def test_a_manifest_says_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    contents = write_gguf(path)
    written = write_manifest([path])
    assert written == tmp_path / "model.manifest.json"
    raw = path.read_bytes()
    assert json.loads(written.read_text()) == {
        "format": "ggufmoe-manifest",
        "version": 1,
        "ggufmoe": __version__,
        "files": [
            {
                "name": "model.gguf",
                "bytes": len(raw),
                "header_sha256": hashlib.sha256(raw[: read_header(path).data_offset]).hexdigest(),
                "tensors": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
            }
        ],
    }
    assert list(read_manifest(written).files[0].tensors) == list(SIZES)
    assert verify(path, read_manifest(written)) == []
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["model.gguf", "model.manifest.json"]


def test_progress_counts_every_byte_in_chunks(model: Path) -> None:
    seen: list[Progress] = []
    make_manifest([model], on_progress=seen.append)
    sizes = {"header": read_header(model).data_offset, **SIZES}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert (seen[-1].done, {step.total for step in seen}) == (sum(sizes.values()), {sum(sizes.values())})
    assert {(step.phase, step.unit) for step in seen} == {("hash", "bytes")}
    steps = [step.item for step in seen]
    assert {name: steps.count(name) for name in steps} == {
        name: -(-n_bytes // manifest.CHUNK_BYTES) for name, n_bytes in sizes.items()
    }


def test_shards_share_one_manifest_and_a_renamed_copy_verifies(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for seed, path in enumerate(paths):
        write_gguf(path, {f"t{seed}": 100}, seed=seed)
    found = read_manifest(write_manifest(paths, tmp_path / "elsewhere.json"))
    assert [file.name for file in found.files] == [path.name for path in paths]
    copies = [path.rename(path.with_name("copy-" + path.name)) for path in paths]
    assert verify(copies, found) == []
    assert verify(copies[::-1], found) != []
    assert verify(copies[0], found) == ["the model has 1 files, the manifest 2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.gguf", "a.manifest.json"),
        ("a.Q4_K_M.gguf", "a.Q4_K_M.manifest.json"),
        ("a-00001-of-00012.gguf", "a.manifest.json"),
        ("a", "a.manifest.json"),
    ],
)
def test_where_a_manifest_stands(name: str, expected: str) -> None:
    assert default_path(Path("dir") / name) == Path("dir") / expected


def test_a_flipped_bit_is_found_and_named(model: Path) -> None:
    found = read_manifest(write_manifest([model]))
    content = bytearray(model.read_bytes())
    content[read_header(model).data_offset + 64 + 12345] ^= 1
    model.write_bytes(content)
    assert verify(model, found) == ["model.gguf: tensor 'blk.0.ffn_up_exps.weight' differs"]


def test_other_differences_are_named(model: Path) -> None:
    found = read_manifest(write_manifest([model]))
    other = {"token_embd.weight": 40, "extra.weight": 100, "output.weight": 8}
    write_gguf(model, other, name="other")
    differences = verify(model, found)
    assert differences[0].startswith(f"model.gguf: has {model.stat().st_size} bytes, the manifest says")
    assert differences[1:] == [
        "model.gguf: the header (metadata, names, shapes) differs",
        "model.gguf: tensor 'blk.0.ffn_up_exps.weight' is missing",
        "model.gguf: tensor 'extra.weight' is not in the manifest",
    ]


def test_a_file_that_shrank_since_its_header_was_read(model: Path) -> None:
    header = read_header(model)
    with model.open("r+b") as file:
        file.truncate(header.data_offset + 1_000_000)
    with pytest.raises(GGUFError, match=r"before the end of .*ffn_up_exps"):
        hash_files([(model, header)], threads=1)  # on one thread the largest tensor comes first
    model.unlink()
    with pytest.raises(GGUFError, match="cannot be read"):
        hash_files([(model, header)], threads=1)


def test_cancel_stops_and_leaves_nothing(model: Path) -> None:
    cancel = threading.Event()
    with pytest.raises(Cancelled, match="hashing was stopped"):
        write_manifest([model], on_progress=lambda *_: cancel.set(), cancel=cancel)
    assert list(model.parent.iterdir()) == [model]


def test_an_unwritable_manifest(model: Path) -> None:
    with pytest.raises(OutputError, match="the manifest cannot be written"):
        write_manifest([model], model.parent / "absent" / "m.json")
    (model.parent / "taken.json").mkdir()
    with pytest.raises(OutputError, match="the manifest cannot be written"):
        write_manifest([model], model.parent / "taken.json")
    assert sorted(file.name for file in model.parent.iterdir()) == ["model.gguf", "taken.json"]


HASH = "0" * 64
FILE: dict[str, Any] = {"name": "m.gguf", "bytes": 1, "header_sha256": HASH, "tensors": {"a": HASH}}
GOOD: dict[str, Any] = {"format": "ggufmoe-manifest", "version": 1, "ggufmoe": "0", "files": [FILE]}

BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "must be an object with format"),
    "no files": ({**GOOD, "files": []}, "at least one file"),
    "missing key": ({key: GOOD[key] for key in ("format", "version", "files")}, "must be an object with"),
    "unknown key": ({**GOOD, "more": 1}, "and nothing else"),
    "other format": ({**GOOD, "format": "x"}, "it is 'x' version 1"),
    "newer version": ({**GOOD, "version": 2}, "version 2, expected"),
    "version a bool": ({**GOOD, "version": True}, "must be of type int"),
    "file a string": ({**GOOD, "files": ["m.gguf"]}, "a file must be an object"),
    "file twice": ({**GOOD, "files": [FILE, FILE]}, "none twice"),
    "traversal": ({**GOOD, "files": [{**FILE, "name": "../m.gguf"}]}, "is not the name of a file"),
    "drive": ({**GOOD, "files": [{**FILE, "name": "c:m.gguf"}]}, "is not the name of a file"),
    "parent": ({**GOOD, "files": [{**FILE, "name": ".."}]}, "is not the name of a file"),
    "bytes": ({**GOOD, "files": [{**FILE, "bytes": "1"}]}, "'bytes' of a file must be of type int"),
    "header hash": ({**GOOD, "files": [{**FILE, "header_sha256": "0"}]}, "hash of 'header' is not 64"),
    "tensor hash": ({**GOOD, "files": [{**FILE, "tensors": {"a": 5}}]}, "hash of 'a' is not 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests_are_refused(tmp_path: Path, case: str) -> None:
    document, message = BAD[case]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a manifest"),
        (b"\xff\xfe", "is not a manifest"),
        (b"[" * 100_000, "is not a manifest"),
        (json.dumps(GOOD).replace('"version"', '"format": "x", "version"').encode(), "appears twice"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_manifest(path)


def test_absent_and_oversized_manifests(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such manifest"):
        read_manifest(tmp_path / "m.json")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(manifest.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(InputError, match="is larger than"):
        read_manifest(tmp_path / "big.json")
