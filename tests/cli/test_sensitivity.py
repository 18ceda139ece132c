"""``ggufmoe sensitivity`` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from tests import test_sensitivity

folder = test_sensitivity.folder
SHORT = ["--tokens", "512", "-c", "128"]


def test_a_summary_and_warnings_are_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "s.gguf")
    arguments = ["sensitivity", str(folder / "model"), "-f", str(folder / "text.txt"), "-o", output, *SHORT]
    assert exit_code([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tokens"] == 512
    assert "s.gguf: 17 matrices, 512 tokens in 4 sequences" in printed.err
    assert "warning: fewer than 512 tokens reached experts (layer 0: " in printed.err
    assert Path(output).read_bytes() == (folder / "s.gguf").read_bytes()
    assert exit_code([*arguments, "--quiet"]) == 1
    assert "exists already" in capsys.readouterr().err
