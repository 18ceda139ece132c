"""The door: what can be opened, and what is said of everything else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.provenance import record_json
from ggufmoe.checkpoint.source import ModelSource, Provenance
from ggufmoe.errors import CheckpointError, SafetensorsError
from tests import tiny


def test_a_checkpoint_is_a_model_source(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "tiny-mixtral", max_shard_bytes=2_000_000)
    model: ModelSource = open_checkpoint(str(directory))
    assert model.config.architecture == "MixtralForCausalLM"
    assert model.tokenizer_dir == directory
    assert model.chat_template is None
    assert model.provenance == Provenance("tiny-mixtral")
    names = {path.name for path in model.input_paths}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.model", "tokenizer_config.json"} < names
    assert any(name.startswith("model-00002-of-") for name in names)
    model.close()
    model.close()


def test_the_record_of_a_merge_is_read_back(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "some-directory")
    (directory / "ggufmoe.json").write_bytes(record_json(Provenance("its-own-name", license="mit")))
    with open_checkpoint(directory) as model:
        assert model.provenance == Provenance("its-own-name", license="mit")


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/org/name", "http://hf.co/org/name/tree/main", "hf.co/org/name"]
)
def test_an_address_is_told_from_an_id(address: str) -> None:
    with pytest.raises(CheckpointError, match=f"{address} is the address of a page; give the model's id, org/name$"):
        open_checkpoint(address)


@pytest.mark.parametrize("place", ["models--org--my--name", "hub/models--org--my--name"])
def test_a_whole_cache_is_no_checkpoint(tmp_path: Path, place: str) -> None:
    (tmp_path / place / "snapshots").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match="is a Hugging Face cache; give the id of a model in it, such as org/my--name"
    ):
        open_checkpoint(tmp_path)


def test_an_existing_path_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make_checkpoint(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    with open_checkpoint("org/name") as model:
        assert model.directory == Path("org/name")


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory, so it has no revision main"):
        open_checkpoint(tiny.make_checkpoint(tmp_path), revision="main")


def test_things_that_are_not_a_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = {
        "absent/below/here": "does not exist; give a checkpoint directory or a hub id such as org/name",
        "model.gguf": "is a GGUF file, not a checkpoint directory; `ggufmoe run` takes it as it is",
        "model.safetensors": "is a file; give the checkpoint's directory",
        "empty": "has no config.json",
    }
    for name, message in expected.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4943162240\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a git-lfs pointer in the place of the file; run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><body>403</body></html>", "is an HTML page that was saved in the place of the file"),
        (b"<html>", "is an HTML page"),
        (b"GGUF" + bytes(64), "is a GGUF file"),
        (b"PK\x03\x04" + bytes(64), "is a zip archive"),
        (b"\x1f\x8b" + bytes(64), "is a gzip archive; unpack it"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_there_is_instead_of_a_file_is_told(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "model")
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {message}") as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_nothing_is_called_one(name: str, tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "model")
    (directory / name).unlink()
    (directory / name).symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"\.\./blobs/gone, which does not exist|broken links: ") as caught:
        open_checkpoint(directory)
    assert name in str(caught.value)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"link is a link to {tmp_path / 'gone'}, which does not exist"):
        open_checkpoint(tmp_path / "link")


def test_a_place_near_the_checkpoint_names_the_checkpoint(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "outer" / "model")
    with pytest.raises(CheckpointError, match=f"has no config.json, but {directory} has one; give that folder"):
        open_checkpoint(tmp_path / "outer")
    with pytest.raises(CheckpointError, match=f"is a file; give the checkpoint's directory, {directory}$"):
        open_checkpoint(directory / "model.safetensors")
    snapshot = tmp_path / "models--org--na--me" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"in a Hugging Face cache; give its id, org/na--me, or one of"):
        open_checkpoint(snapshot.parent.parent)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match="so it is not a Hugging Face checkpoint; fetch it with the weights"):
        open_checkpoint(directory)


def test_nothing_stays_open_after_an_error(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    directory = tiny.make_checkpoint(tmp_path, max_shard_bytes=1_000_000)
    shard = sorted(tmp_path.glob("model-*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SafetensorsError, match="cut off"):
        open_checkpoint(directory)
    tiny.make_checkpoint(tmp_path, max_shard_bytes=1_000_000)
    (tmp_path / "ggufmoe.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a record"):
        open_checkpoint(directory)


UNREADABLE = """
import os, sys
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import GgufmoeError
if os.getuid() == 0:
    open_checkpoint(sys.argv[1]).close()  # root may read everything; imports what the next user may not
    os.setgid(65534), os.setuid(65534)
try:
    open_checkpoint(sys.argv[1])
except GgufmoeError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="permissions of POSIX")
@pytest.mark.parametrize(
    ("name", "error"), [("", "CheckpointError"), ("config.json", "CheckpointError"), ("model.safetensors", "Safetens")]
)
def test_what_may_not_be_read_is_named(name: str, error: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, where other users may not go
        Path(folder).chmod(0o755)
        directory = tiny.make_checkpoint(Path(folder) / "model")
        (directory / name).chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE, str(directory)], capture_output=True, text=True, check=True
        )
        (directory / name).chmod(0o755)
    assert done.stdout.startswith(error)
    assert f"{directory / name} cannot be read: Permission denied" in done.stdout
