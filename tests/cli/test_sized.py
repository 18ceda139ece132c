"""``--sensitivity-text``: a size from a checkpoint and a text in one command, and what was measured serves the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.own_keys import MIX
from tests.tiny import make_checkpoint
from tests.tiny_tokenizers import CORPUS


def test_a_text_is_measured_once_for_all_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(Path("tiny"), n_embd=64, n_ff=96, n_layer=1)
    Path("text.txt").write_text(" ".join(CORPUS * 60), encoding="utf-8")
    arguments = ["convert", "tiny", "--types", "k", "--sensitivity-text", "text.txt", "-t", "1"]
    assert exit_code([*arguments, "-q", "6bpw"]) == 0
    first = capsys.readouterr().err
    assert "tiny-sensitivity.gguf: 2048 tokens, " in first
    assert "predicted KL divergence " in first
    mix = json.loads(read_header(Path("tiny-6bpw.gguf")).metadata[MIX].value)
    assert mix["sensitivity"] == {"source": "tiny", "datasets": ["text.txt"], "tokens": 2048}
    assert exit_code([*arguments, "-q", "7bpw"]) == 0
    assert "tiny-sensitivity.gguf" not in capsys.readouterr().err
    Path("other.txt").write_text("other")
    assert exit_code(["convert", "tiny", "-q", "5.5bpw", "--sensitivity-text", "other.txt"]) == 2
    assert "was measured on text.txt of tiny, and not on this text" in capsys.readouterr().err
    assert exit_code(["convert", "tiny", "--sensitivity-text", "text.txt"]) == 2
    assert "is for a size (-q 4.5bpw, --size 6GiB)" in capsys.readouterr().err
