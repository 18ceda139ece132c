"""``ggufmoe quantize`` as its users meet it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.gguf.header import read_header
from tests.quant.llama_quantize import Specimen, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in.gguf", Specimen(), Specimen().weights())


def test_a_summary_goes_to_stderr_and_nothing_to_stdout(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = source.with_name("out.gguf")
    assert exit_code(["quantize", str(source), "-o", str(output), "-q", "Q8_0", "-t", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{output}: " in printed.err
    assert "bits per weight" in printed.err
    assert read_header(output).get("general.file_type") == 7


def test_the_output_is_named_after_the_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = source.rename(tmp_path / "my-BF16.gguf")
    assert exit_code(["quantize", str(source), "-q", "Q8_0"]) == 0
    assert [path.name for path in Path().iterdir()] == ["my-Q8_0.gguf"]
    assert capsys.readouterr().err.startswith("writes my-Q8_0.gguf; -o gives another name\n")


def test_json_says_who_quantized_what(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(source), "-o", str(source.with_name("out.gguf")), "--json", "--quiet"]
    assert exit_code([*arguments, "--quantizer", "ggml"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert content["file_type"] == "Q4_K_M"
    row = {"type": "Q4_K", "source": "BF16", "importances": False, "quantizer": "ggml", "reason": "asked for"}
    assert row in content["quantizers"]


def test_compiled_quantizers_are_kept_unless_told_otherwise(source: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(source), "-o", str(source.with_name("out.gguf")), "--quiet", "--force"]
    arguments += ["-q", "Q8_0", "--quantizer", "fast"]
    environment = os.environ | {"GGUFMOE_CACHE": str(tmp_path / "cache")}
    for more, n_kept in (["--no-cache"], 0), ([], 1):
        command = [sys.executable, "-m", "ggufmoe", *arguments, *more]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        assert sum(path.is_file() for path in tmp_path.rglob("cache/kernels/*/*")) == n_kept


def test_a_dry_run_prints_the_plan_and_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(source), "-o", str(source.with_name("out.gguf")), "--dry-run", "-q", "copy"]
    assert exit_code(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert any("blk.0.ffn_up_exps.weight" in line and "BF16" in line and "2 x 256 x 256" in line for line in table)
    assert exit_code([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file_type"] == "COPY"
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-q", "Q4_X"], 2, "unknown file type"),
        (["--quantizer", "quick"], 2, "quick"),
        (["-q", "COPY", "--pure"], 2, "leave out --pure"),
        (["--imatrix", "nowhere.gguf"], 1, "cannot read the importance matrix"),
        (["--router-report", "x"], 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert exit_code(["quantize", str(source), "-o", str(source.with_name("out.gguf")), *arguments]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(source.parent.iterdir()) == [source]
