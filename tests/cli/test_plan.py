"""``ggufmoe plan`` at the door of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.cli.plan import _memory, _ranges
from ggufmoe.errors import EngineMissingError
from ggufmoe.native import backends
from tests.placement.shapes import model_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_of(tmp_path / "m.gguf", n_layer=8).paths[0]


def plan(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = exit_code(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, err = plan(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_table_for_imagined_devices(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    code, out, err = plan(
        capsys, model, "--vram", "1200M", "--vram", "8G", "-ts", "1,2", "-ncmoe", "2", "--ctx-size", "500"
    )
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("GPU", "CPU "))}
    assert rows["GPU0"][1:3] == ["1.17", "GiB"]
    assert "MiB, for a context of 512 tokens" in out
    assert "9 of 9 layers on the GPU (as given, or all): -ngl 9 -ts 1,2 -ncmoe 2" in out
    assert "both experts run for every token: keeping them in the CPU's memory saves memory" in out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lines_fit_the_terminal(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = plan(capsys, model, "--vram", "8G", "-ncmoe", "2")
    assert max(map(len, out.splitlines())) <= columns
    assert ("GPU0: layers 0-7, output, experts of 2-7" in out) == (columns == 60)
    _, out, _ = plan(capsys, model, "--vram", "2M")
    assert ("GPU0: layers none, experts of none" in out) == (columns == 60)
    assert out.split()[0] == "device"


def test_what_fits_is_chosen(model: Path, capsys: Capture) -> None:
    found = as_json(capsys, model, "--vram", "1092M")
    gpu, cpu = found["shares"]
    assert found["fitted"]
    assert found["n_gpu_layers"] == 9
    assert gpu["layers"] == list(range(9))
    assert 0 < len(gpu["expert_layers"]) < 8
    assert cpu["expert_layers"] + gpu["expert_layers"] == list(range(8))
    assert gpu["total_needed_bytes"] <= 1092 * 2**20 - 1024 * 2**20


def test_the_flags_that_do_the_same_are_printed(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert "-ngl 9 -cmoe" in plan(capsys, model, "--vram", "8G", "-cmoe")[1]
    assert r"-ot 'blk\.7\.attn_q=CPU'" in plan(capsys, model, "--vram", "8G", "-ot", r"blk\.7\.attn_q=CPU")[1]


def test_without_a_gpu_everything_stays_with_the_cpu(model: Path, capsys: Capture) -> None:
    found = as_json(capsys, model, "--device", "none", "--ram", "4G")
    assert [share["device"] for share in found["shares"]] == ["CPU"]
    assert found["shares"][0]["total_bytes"] == 4 * 2**30


def test_warnings_are_shown(model: Path, capsys: Capture) -> None:
    _, out, _ = plan(capsys, model, "--vram", "16M", "--fit", "off", "--n-expert-used", "1")
    assert "warning: GPU0 has 16.0 MiB free and would need" in " ".join(out.split())
    assert "warning: 1 expert for each token instead of 2" in out


def test_imagined_devices_need_no_engine(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EngineMissingError("llama-cpp-python cannot be loaded")

    monkeypatch.setattr(backends, "devices", missing)
    found = as_json(capsys, model, "--vram", "8G")
    assert [share["device"] for share in found["shares"]] == ["GPU0", "CPU"]
    assert found["shares"][1]["total_bytes"] == 0
    assert plan(capsys, model)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--vram", "much"), 2, "--vram: 'much' is not a size"),
        (("--vram", "0"), 2, "is not a size"),
        (("--vram", "6"), 2, "--vram: 6 is less than one MiB"),
        (("-ngl", "some"), 2, "expected a number, auto or all"),
        (("--vram", "8G", "-dev", "GPU3"), 2, "--device GPU3: there is no such device; there is GPU0"),
        (("-ot", "nothing=CPU"), 2, "-ot nothing=CPU: matches no tensor"),
        (("-ot", "nothing"), 2, "--override-tensor: expected PATTERN=BUFFER"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], code: int, message: str, model: Path, capsys: Capture) -> None:
    result = plan(capsys, model, *arguments)
    assert result[0] == code
    assert message in result[2]


def test_sizes_are_those_of_memory() -> None:
    assert _memory("7.5G", "") == 7680 * 2**20
    assert _memory("512MiB", "") == 2**29


def test_layers_are_shown_as_runs() -> None:
    assert _ranges((0, 1, 2, 5, 8), 8) == "0-2, 5, output"
    assert _ranges((), 8) == "-"
