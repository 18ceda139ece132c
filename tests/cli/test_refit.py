"""``ggufmoe refit`` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.gguf.stored_rows import OpenModel
from tests import test_refit

fewer_steps, folder = test_refit.fewer_steps, test_refit.folder


def routers(path: Path) -> list[bytes]:
    with OpenModel(path) as model:
        return [rows.read(0, rows.n_rows).tobytes() for name, rows in model.tensors.items() if "ffn_gate_inp" in name]


def test_texts_are_given_in_order_or_by_expert(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert exit_code(["refit", "m.gguf", "base.jsonl", "sums.jsonl", "poems.jsonl", "-o", f"{tmp_path}/a.gguf"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    for said in ("Router rows (fitted)", "Loss on held-out texts", "before", "uniform", "poems.jsonl", "a.gguf: "):
        assert said in printed.err
    named = ["poems=poems.jsonl", "base=base.jsonl", "1=sums.jsonl"]
    assert exit_code(["refit", "m.gguf", *named, "-o", f"{tmp_path}/b.gguf", "--quiet", "--json"]) == 0
    printed = capsys.readouterr()
    assert all(line.startswith("warning: ") for line in printed.err.splitlines())
    assert json.loads(printed.out)["router"]["gate_mode"] == "fitted"
    assert routers(tmp_path / "a.gguf") == routers(tmp_path / "b.gguf") != routers(folder / "m.gguf")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["m.gguf"], 2, "error: --output is missing"),
        (["m.gguf", "base.jsonl", "-o", "x.gguf"], 2, "error: 1 file of texts for 3 experts (0 base, 1 sums, 2 poems)"),
        (["m.gguf", "-o", "x.gguf"], 2, "error: give texts of each expert, or a router to take (--router)"),
        (["m.gguf", "base=base.jsonl", "a=b/c.txt", "-o", "x.gguf"], 2, "error: no expert is called 'a'"),
        (["m.gguf", "base=base.jsonl", "./a=b.txt", "-o", "x.gguf"], 2, "error: ./a=b.txt names no expert, others do"),
        (["base.jsonl", "a", "b", "c", "-o", "x.gguf"], 1, "error: base.jsonl"),
        (["m.gguf", "no", "no", "no", "-o", "x.gguf"], 1, "error: no: the texts cannot be read (No such file"),
        (["m.gguf", "--router", "base", "-o", "x.gguf"], 1, "error: router: base is no mixture of experts"),
        (["m.gguf", "--router", "m.gguf", "-o", "m.gguf"], 1, "error: m.gguf exists already"),
        (["m.gguf", "--seed", "-1", "-o", "x.gguf"], 2, "error: --seed must be between 0 and"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert exit_code(["refit", *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith(message)
    assert not (folder / "x.gguf").exists()
