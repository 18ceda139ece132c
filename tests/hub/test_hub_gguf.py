"""Headers of GGUF models on the hub: the same report as of the file here, and only headers are fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer

from ggufmoe.cli.app import exit_code
from ggufmoe.errors import GGUFError
from ggufmoe.hub.hub_gguf import read_hub_header
from ggufmoe.hub.hub_models import HubName, find_gguf
from ggufmoe.inspection.inspect import inspect_header, inspect_model
from tests.gguf_files import write_mixtral
from tests.own_hub import talk_with_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = tmp_path / "files"
    files.mkdir()
    write_mixtral(files / "small-F16.gguf", n_expert=4, n_used=2)
    (files / "bad-Q8_0.gguf").write_bytes(b"no header of a model")
    with HubServer({"org/files": files}) as running:
        talk_with_hub(running.url, monkeypatch)
        yield running


def test_a_header_on_the_hub_tells_what_the_file_here_tells(hub: HubServer, tmp_path: Path) -> None:
    found = read_hub_header(find_gguf(HubName("org/files", quant="F16")))
    assert inspect_header(found) == inspect_model(tmp_path / "files" / "small-F16.gguf")
    assert {one.begin for one in hub.sent} == {0}
    assert hub.sent_bytes <= 2**18


def test_what_is_no_gguf_file_is_refused_as_it_is_here(hub: HubServer) -> None:
    with pytest.raises(GGUFError, match=r"bad-Q8_0\.gguf: starts with b'no h'"):
        read_hub_header(find_gguf(HubName("org/files", quant="Q8_0")))


def test_inspect_takes_a_name_on_the_hub(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["inspect", "org/files:F16", "--json"]) == 0
    by_quant = json.loads(capsys.readouterr().out)
    assert (by_quant["files"], by_quant["architecture"]) == (["small-F16.gguf"], "llama")
    assert exit_code(["inspect", "org/files/small-F16.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_quant
    assert exit_code(["inspect", "org/files:F16", "--verify"]) == 1
    assert "read the whole file; download or make it first" in capsys.readouterr().err
    assert exit_code(["inspect", "org/files:Q2_K"]) == 1
    assert "org/files has Q8_0, F16" in capsys.readouterr().err


def test_inspect_shows_what_convert_would_make_of_a_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the hub and here, by headers alone."""
    checkpoint = tiny_checkpoint(arch="mixtral")
    with HubServer({"org/moe": checkpoint}) as hub:
        talk_with_hub(hub.url, monkeypatch, tmp_path / "cache")
        assert exit_code(["inspect", "org/moe", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert hub.sent_bytes <= 2**16
        assert exit_code(["inspect", "org/moe"]) == 0
        assert "ggufmoe convert org/moe -q Q4_K_M" in " ".join(capsys.readouterr().out.split())
    (weights,) = (path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert found["source"]["commits"] == {"org/moe": COMMIT}
    assert (found["source"]["n_bytes"], found["hyper"]["n_expert"]) == (weights, 2)
    assert sum(found["source"]["stored"].values()) == found["n_parameters"]
    assert exit_code(["inspect", str(checkpoint), "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert (here["architecture"], here["n_bytes"]) == (found["architecture"], found["n_bytes"])
    assert here["source"]["commits"] == {}
