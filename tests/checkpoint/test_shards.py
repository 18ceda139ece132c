"""Which files hold the tensors: indexes that lie, shards that lack, and weights in formats that are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe.checkpoint.shards import INDEX, open_tensor_files, parse_index
from ggufmoe.errors import CheckpointError, SafetensorsError
from tests import tiny


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Four tensors in two shards with an index."""
    tensors = {f"t{i}": ("F32", np.full((4, 4), i, np.float32)) for i in range(4)}
    (tmp_path / "model").mkdir()
    tiny.write_shards(tmp_path / "model", tensors, max_bytes=128)
    return tmp_path / "model"


def change_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def test_shards_are_opened_together(sharded: Path) -> None:
    files, stored = open_tensor_files(sharded)
    assert [file.path.name for file in files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert sorted(stored) == ["t0", "t1", "t2", "t3"]
    for file in files:
        file.close()


def test_a_single_file_comes_before_an_index(sharded: Path) -> None:
    tiny.write_safetensors(sharded / "model.safetensors", {"only": ("F32", np.zeros(2, np.float32))})
    files, stored = open_tensor_files(sharded)
    assert list(stored) == ["only"]
    files[0].close()


@pytest.mark.parametrize(
    "shard",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "C:x.safetensors",
        "..",
        "",
        ".safetensors",
        "x.safetensors\0.safetensors",
        "model.bin",
        "*.safetensors",
        "two\nlines.safetensors",
        "x" * 300 + ".safetensors",
        None,
        3,
    ],
)
def test_shard_names_may_not_lead_elsewhere(sharded: Path, shard: object) -> None:
    change_index(sharded, lambda index: index["weight_map"].update(t0=shard))
    with pytest.raises(SafetensorsError, match="which is not the name of a shard") as caught:
        open_tensor_files(sharded)
    assert "'t0'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_has_a_weight_map(sharded: Path, weight_map: object) -> None:
    change_index(sharded, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(SafetensorsError, match="has no weight_map"):
        parse_index(sharded / INDEX)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SafetensorsError, match=r"lacks 1 of the 2 shards of its index: model-00002-of-00002"):
        open_tensor_files(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SafetensorsError, match=r"model-00002-of-00002.safetensors is cut off: tensor 't3'"):
        open_tensor_files(sharded)


def test_a_tensor_of_the_index_must_be_in_its_shard(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
    with pytest.raises(SafetensorsError, match=r"puts 'ghost' into model-00001-of-00002.safetensors, which does not"):
        open_tensor_files(sharded)
    change_index(sharded, lambda index: index["weight_map"].pop("ghost"))
    change_index(sharded, lambda index: index["weight_map"].update(t0="model-00002-of-00002.safetensors"))
    with pytest.raises(SafetensorsError, match=r"puts 't0' into model-00002-of-00002.safetensors, which does not"):
        open_tensor_files(sharded)


def test_a_tensor_of_a_shard_must_be_in_the_index(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].pop("t1"))
    with pytest.raises(SafetensorsError, match="does not list 1 tensors of its shards, 't1' in model-00001"):
        open_tensor_files(sharded)


def test_a_tensor_may_be_in_one_shard_only(sharded: Path) -> None:
    tiny.write_safetensors(sharded / "model-00002-of-00002.safetensors", {"t0": ("F32", np.zeros(2, np.float32))})
    change_index(sharded, lambda index: [index["weight_map"].pop(name) for name in ("t2", "t3")])
    change_index(sharded, lambda index: index["weight_map"].update(t1="model-00002-of-00002.safetensors"))
    with pytest.raises(SafetensorsError, match="tensor 't0' twice: in model-00001-of-00002"):
        open_tensor_files(sharded)


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "module.lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "h.attention.bias"],
)
def test_an_index_may_list_what_no_model_needs(sharded: Path, name: str) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({name: "model-00001-of-00002.safetensors"}))
    assert sorted(open_tensor_files(sharded)[1]) == ["t0", "t1", "t2", "t3"]


def test_buffers_need_not_be_in_the_index(sharded: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {name: ("F32", np.zeros((4, 4), np.float32)) for name in ("t2", "t3", buffer)}
    tiny.write_safetensors(sharded / "model-00002-of-00002.safetensors", tensors)
    assert buffer in open_tensor_files(sharded)[1]


def test_numbered_shards_need_no_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert sorted(open_tensor_files(sharded)[1]) == ["t0", "t1", "t2", "t3"]
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(SafetensorsError, match=r"these are missing: model-00001-of-00002\.safetensors"):
        open_tensor_files(sharded)
    (sharded / "model-00002-of-00002.safetensors").rename(sharded / "model-99999-of-99999.safetensors")
    with pytest.raises(SafetensorsError, match=r"model-00008-of-99999\.safetensors and 9992 more"):
        open_tensor_files(sharded)


def test_shards_of_two_checkpoints_are_not_mixed(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00001-of-00003.safetensors")
    with pytest.raises(SafetensorsError, match=r"of its numbered shards these are missing: model-00002-of-00003"):
        open_tensor_files(sharded)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "model.fp16.safetensors", "model_ema.safetensors"]
)
def test_a_lone_file_needs_no_index(tmp_path: Path, name: str) -> None:
    tiny.write_safetensors(tmp_path / name, {"only": ("F32", np.zeros(2, np.float32))})
    assert list(open_tensor_files(tmp_path)[1]) == ["only"]
    other = tmp_path / "model.bf16.safetensors"
    tiny.write_safetensors(other, {"only": ("F32", np.zeros(2, np.float32))})
    if "-of-" not in name:
        with pytest.raises(CheckpointError, match="safetensors files but neither"):
            open_tensor_files(tmp_path)


def test_shards_may_be_links_to_elsewhere(sharded: Path, tmp_path: Path) -> None:
    """As huggingface_hub below 0.23 makes them with ``--local-dir``."""
    for shard in sharded.glob("*.safetensors"):
        shutil.move(shard, tmp_path / f"blob-{shard.name}")
        shard.symlink_to(tmp_path / f"blob-{shard.name}")
    assert sorted(open_tensor_files(sharded)[1]) == ["t0", "t1", "t2", "t3"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not limit open files this way")
def test_more_shards_than_open_files(tmp_path: Path) -> None:
    tensors = {f"t{i}": ("U8", np.full(8, i, np.uint8)) for i in range(120)}
    tiny.write_shards(tmp_path, tensors, max_bytes=8)
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from ggufmoe.checkpoint.shards import open_tensor_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "files, stored = open_tensor_files(Path(sys.argv[1]))\n"
        "out = bytearray(8)\n"
        "for i in range(120):\n"
        "    file, entry = stored[f't{i}']\n"
        "    file.read_into(entry.begin, memoryview(out))\n"
        "    assert bytes(out) == bytes([i] * 8)\n"
        "print(len(files))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "120\n"


def test_the_links_of_a_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        shutil.move(file, repo / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    opened, stored = open_tensor_files(snapshot)
    assert len(stored) == 4
    for tensor_file in opened:
        tensor_file.close()


REFUSED = {
    "pytorch_model.bin": "pickle.*can run any code.*safe_serialization=True",
    "pytorch_model.bin.index.json": "pickle",
    "consolidated.00.pth": "pickle",
    "adapter_config.json": "adapter",
    "tiny.Q4_K_M.gguf": "holds GGUF files",
    "other.safetensors": "neither model.safetensors nor",
    "notes.txt": "there are no weights in it",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_weights_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=REFUSED[name]) as caught:
        open_tensor_files(tmp_path)
    assert "\n" not in str(caught.value)
