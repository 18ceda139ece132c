"""``ggufmoe diff`` at the door of the command line: summary, tables, JSON and exit codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import GGMLType, ValueType
from tests.gguf_files import Arrays, text, u32, write_weights

Capture = pytest.CaptureFixture[str]
F32, Q8_0, Q4_K = GGMLType.F32, GGMLType.Q8_0, GGMLType.Q4_K
KEYS = {"general.architecture": text("llama"), "llama.block_count": u32(9)}


def model(path: Path, kind: GGMLType = F32, n_layer: int = 9, keys: Mapping[str, GGUFValue] = {}) -> Path:
    random = np.random.default_rng(3)
    tensors: dict[str, tuple[GGMLType, Any]] = {
        f"blk.{layer}.ffn_{name}_exps.weight": (kind, random.normal(0, 1, (2, 4, 256)).astype(np.float32))
        for layer in range(n_layer)
        for name in ("gate", "down")
    }
    tensors["output_norm.weight"] = (F32, np.ones(256, np.float32))
    return write_weights(path, {**KEYS, **keys}, tensors)


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = exit_code(["diff", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_files_that_are_the_same(tmp_path: Path, capsys: Capture) -> None:
    a, b = model(tmp_path / "a.gguf", Q4_K), model(tmp_path / "b.gguf", Q4_K)
    code, out, err = run(capsys, a, b, "--exit-code")
    assert (code, err) == (0, "")
    assert out == "the same: metadata and all 19 tensors\nA: a.gguf\nB: b.gguf\n"
    assert run(capsys, a, b, "--headers-only")[1].startswith("the same: metadata and 19 tensors by their headers")


def test_the_summary_comes_first_and_tables_follow(tmp_path: Path, capsys: Capture) -> None:
    a = model(tmp_path / "a.gguf")
    b = model(tmp_path / "b.gguf", Q4_K, keys={"general.file_type": u32(15), "llama.block_count": u32(8)})
    code, out, err = run(capsys, a, b)
    lines = [line.rstrip() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert lines[0].startswith("differ: 2 metadata keys, 18 of 19 tensors in type, relative error 0.0")
    assert "~ llama.block_count: 9 -> 8" in lines
    assert "+ general.file_type: 15" in lines
    part = next(line.split() for line in lines if line.startswith("experts"))
    assert part[:6] == ["experts", "18", "of", "18", "32.00", "4.50"]
    tensors = [line.split() for line in lines if line.startswith("blk.")]
    errors = [float(row[3]) for row in tensors]
    assert len(tensors) == 12
    assert errors == sorted(errors, reverse=True)
    assert {tuple(row[1:3]) for row in tensors} == {("F32", "Q4_K")}
    assert "and 6 more, with smaller errors; --all names them" in out
    assert len([line for line in run(capsys, a, b, "--all")[1].splitlines() if line.startswith("blk.")]) == 18


def test_exit_codes(tmp_path: Path, capsys: Capture) -> None:
    a, b = model(tmp_path / "a.gguf"), model(tmp_path / "b.gguf", Q8_0)
    assert run(capsys, a, b)[0] == 0
    code, out, err = run(capsys, a, b, "--exit-code")
    assert (code, err) == (1, "")
    assert out.startswith("differ: ")
    assert run(capsys, a, tmp_path / "absent.gguf", "--exit-code")[:2] == (1, "")
    assert run(capsys, a)[0] == 2
    assert run(capsys, a, b, "-t", "0")[0] == 2


def test_json_is_one_object(tmp_path: Path, capsys: Capture) -> None:
    a, b = model(tmp_path / "a.gguf"), model(tmp_path / "b.gguf", Q8_0, n_layer=8)
    code, out, err = run(capsys, a, b, "--json", "--exit-code")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (1, "", 1)
    assert (found["same"], found["metadata"], len(found["tensors"])) == (False, [], 19)
    assert [part["name"] for part in found["parts"]] == ["experts", "norms"]
    verdicts = {tensor["name"]: tensor["verdict"] for tensor in found["tensors"]}
    assert verdicts["blk.8.ffn_gate_exps.weight"] == "removed"
    assert verdicts["output_norm.weight"] == "same"
    assert verdicts["blk.0.ffn_gate_exps.weight"] == "type"


def test_missing_tensors_and_shapes_stand_on_top(tmp_path: Path, capsys: Capture) -> None:
    a = model(tmp_path / "a.gguf")
    tensors: Arrays = {"output_norm.weight": (F32, np.ones((1, 128), np.float32)), "new": (F32, np.ones(3, np.float32))}
    b = write_weights(tmp_path / "b.gguf", KEYS, tensors)
    out = run(capsys, a, b, "--all")[1]
    assert out.startswith("differ: no metadata key, 20 of 20 tensors (18 only in A, 1 in shape, 1 only in B)\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["output_norm.weight", "F32", "256", "F32", "1", "x", "128", "-", "-"] in rows
    assert ["new", "none", "F32", "-", "-"] in rows
    assert ["blk.8.ffn_down_exps.weight", "F32", "none", "-", "-"] in rows


def test_values_of_all_kinds(tmp_path: Path, capsys: Capture) -> None:
    def array(*items: str) -> GGUFValue:
        return GGUFValue(ValueType.ARRAY, list(items), ValueType.STRING)

    keys = {"list": array("a", "b", "c"), "s": text("same " * 20 + "end"), "gone": u32(1)}
    a = model(tmp_path / "a.gguf", keys=keys)
    changed = {"list": array("a", "B", "C"), "s": text("same " * 20 + "other"), "longer": array(*"pqrstu")}
    b = model(tmp_path / "b.gguf", keys={**changed, "llama.block_count": GGUFValue(ValueType.INT32, 9)})
    lines = [line.rstrip() for line in run(capsys, a, b)[1].splitlines()]
    assert "~ list: 2 of 3 items differ, first [1] b -> B" in lines
    assert "- gone: 1" in lines
    assert "+ longer: 6 items: p, q, r, s, …" in lines
    assert "~ llama.block_count: 9 -> 9 (UINT32 -> INT32)" in lines
    assert any(line.startswith("~ s: 103 and 105 characters, from character 101 on: …") for line in lines)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lines_fit_the_terminal(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    a = model(tmp_path / "a.gguf", keys={"general.name": text("a long name " * 9)})
    _, out, _ = run(capsys, a, model(tmp_path / "b.gguf", Q4_K))
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in "".join(line for line in out.splitlines() if line.startswith("blk"))
    assert ("largest diff." in out) == (columns >= 76)


def test_files_cannot_play_with_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    bad = "\x1b]0;owned\x07[red]x[/red]\x1b[2J\r\n"
    a = model(tmp_path / "a.gguf", keys={"general.name": text(bad), "k\x1b[31m": text(bad)})
    out = run(capsys, a, model(tmp_path / "b.gguf"))[1]
    assert not set(out) & set("\x1b\x07\r")
    assert "[red]x[/red]" in out
