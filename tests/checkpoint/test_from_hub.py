"""Models by hub id, against a hub of our own on 127.0.0.1.

huggingface_hub reads its settings when it is imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, serving

from tests.checkpoint.test_fp8_blocks import quantized

CHILD = """
import json, os, sys
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.from_hub import HubAccess
from ggufmoe.errors import GgufmoeError
access = HubAccess(keep_source="KEEP_SOURCE" in os.environ)
answers = []
for source in sys.argv[1:]:
    try:
        with open_checkpoint(source, access=access) as model:
            answers.append({"name": model.provenance.name, "n": len(model.tensors), "directory": str(model.directory)})
    except GgufmoeError as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(answers))
"""

Opener = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    directory = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_checkpoint(max_shard_bytes=2_000_000), directory, dirs_exist_ok=True)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "other.gguf"):
        (directory / name).write_bytes(b"not wanted")
    with serving(directory) as running:
        yield running


def opener(url: str, cache: Path) -> Opener:
    """A function that opens sources in a child process with this endpoint and cache."""

    def open_sources(*sources: str, **environment: str) -> list[dict[str, Any]]:
        own = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        command = [sys.executable, "-c", CHILD, *sources]
        done = subprocess.run(command, env=known | own | environment, capture_output=True, text=True, timeout=120)
        assert done.stderr == ""
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers

    return open_sources


def test_fetches_only_what_is_needed_and_then_works_offline(served: HubServer, tmp_path: Path) -> None:
    open_sources = opener(served.url, tmp_path)
    served.reset_counts()
    first, pinned, unknown = open_sources("org/tiny", "org/tiny@v2", "org/tiny@nonsense", KEEP_SOURCE="1")
    assert (first["name"], first["n"]) == ("tiny", 29)
    assert pinned["directory"] == first["directory"]
    assert "there is no such revision" in unknown["message"]
    shards = {name for name in served.fetched if name.startswith("model-")}
    assert len(shards) > 1
    rest = {"config.json", "model.safetensors.index.json", "tokenizer.model", "tokenizer_config.json"}
    assert sorted(served.fetched) == sorted(shards | rest)

    served.reset_counts()
    again, by_path, absent = open_sources("org/tiny", first["directory"], "org/other", HF_HUB_OFFLINE="1")
    assert again == first
    assert by_path["name"] == "tiny"
    assert absent["error"] == "HubError"
    assert absent["message"].startswith("org/other is not in the cache")
    assert served.fetched == []


def test_of_weights_nothing_is_stored_but_what_is_in_the_cache_is_read_there(served: HubServer, tmp_path: Path) -> None:
    open_sources = opener(served.url, tmp_path)
    served.reset_counts()
    (first,) = open_sources("org/tiny")
    assert (first["name"], first["n"]) == ("tiny", 29)
    assert sum(one.n_bytes for one in served.sent) < 3 * 2**16 + 1, "headers alone"
    assert not list(tmp_path.rglob("*.safetensors"))
    (offline,) = open_sources("org/tiny", HF_HUB_OFFLINE="1")
    assert "not in the cache" in offline["message"]
    assert "HF_HUB_OFFLINE forbids to fetch" in offline["message"]

    open_sources("org/tiny", KEEP_SOURCE="1")
    served.reset_counts()
    assert open_sources("org/tiny") == [first]
    assert not any(name.endswith(".safetensors") for name in served.fetched)
    assert opener("http://127.0.0.1:9", tmp_path)("org/tiny") == [first], "what is in the cache needs no hub"


def test_what_the_hub_refuses_is_explained(served: HubServer, tmp_path: Path) -> None:
    gated, private = opener(served.url, tmp_path)("org/gated", "org/private")
    assert gated["error"] == private["error"] == "HubError"
    assert f"accept its licence on {served.url}/org/gated and set a token" in gated["message"]
    assert "org/private is neither a local directory nor a public model" in private["message"]


def test_an_unreachable_hub_is_an_error_that_names_it(tmp_path: Path) -> None:
    (answer,) = opener("http://127.0.0.1:9", tmp_path)("org/tiny")
    assert answer["error"] == "HubError"
    assert answer["message"].startswith("org/tiny cannot be fetched from http://127.0.0.1:9 and is not in the cache")


def test_an_unsupported_model_costs_no_weights(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with serving(directory) as running:
        (answer,) = opener(running.url, tmp_path / "cache")("org/tiny")
    assert answer["error"] == "ArchitectureError"
    assert not any(name.endswith(".safetensors") for name in running.fetched)


def test_a_quantized_model_costs_no_weights(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with serving(directory) as running:
        (answer,) = opener(running.url, tmp_path / "cache")("org/tiny")
    assert answer["message"] == "org/tiny is quantized already ('awq'); use the original model"
    assert not any(name.endswith(".safetensors") for name in running.fetched)


def test_the_names_of_an_index_say_more_than_a_left_over_configuration(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_checkpoint(max_shard_bytes=2_000_000), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with serving(directory) as running:
        (plain,) = opener(running.url, tmp_path / "cache")("org/tiny")
    assert (plain["name"], plain["n"]) == ("tiny", 29)

    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.0.self_attn.q_proj.weight_scale_inv"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with serving(directory) as running:
        (quantized,) = opener(running.url, tmp_path / "other-cache")("org/tiny")
    assert quantized["message"].startswith("org/tiny is quantized to FP8 or 8 bits, with scales beside the weights")
    assert not any(name.endswith(".safetensors") for name in running.fetched)


def test_eight_bit_floats_with_scales_of_blocks_are_fetched(tmp_path: Path) -> None:
    """From one file, of which nothing is known before it is here but what config.json states."""
    with serving(quantized(tmp_path / "model")) as running:
        (answer,) = opener(running.url, tmp_path / "cache")("org/tiny")
    assert answer["n"] == 21


def test_numbered_shards_without_an_index_are_fetched(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint(max_shard_bytes=2_000_000), tmp_path / "model")
    (directory / "model.safetensors.index.json").unlink()
    with serving(directory) as running:
        (answer,) = opener(running.url, tmp_path / "cache")("org/tiny")
    assert answer["n"] == 29


def test_a_model_with_pickled_weights_only_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with serving(directory) as running:
        (answer,) = opener(running.url, tmp_path / "cache")("org/tiny")
    assert answer["error"] == "CheckpointError"
    assert "refused because they can run any code" in answer["message"]
    assert "pytorch_model.bin" not in running.fetched
