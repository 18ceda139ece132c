"""scripts/arm_check: what it says when something is missing, and how it compares files."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.gguf.stored_rows import OpenModel

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "arm"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the script."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("check", "conversions", "emulator"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("check")


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "check.py"), "--folder", str(tmp_path / "arm")]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("arm_check: this needs ")


def test_router_rows_may_differ_a_little_and_nothing_else(
    check: Any, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    ggufmoe.convert(tiny_checkpoint(n_layer=1), ours, "Q8_0")

    def changed(name: str, factors: list[float]) -> tuple[str, bool]:
        shutil.copy(ours, theirs)
        with OpenModel(ours) as model:
            tensor = model.tensors[name]
        with open(theirs, "r+b") as file:
            file.seek(tensor.begin)
            values = np.frombuffer(file.read(8), np.float32) * np.array(factors, np.float32)
            file.seek(tensor.begin)
            file.write(values.tobytes())
        found: tuple[str, bool] = check.router_difference(ours, theirs)
        return found

    told, close = changed("blk.0.ffn_gate_inp.weight", [1.001, 0.999])
    assert told.startswith("equal but for router rows, cosine 1 - ")
    assert close
    assert not changed("blk.0.ffn_gate_inp.weight", [-9.0, 9.0])[1]
    assert changed("blk.0.attn_norm.weight", [1.001, 1.0]) == ("differs in blk.0.attn_norm.weight", False)


def test_the_conversions_reach_the_formats_and_their_extremes(tmp_path: Path) -> None:
    code = "import conversions, pathlib, sys; conversions.make_inputs(pathlib.Path(sys.argv[1]))"
    root = FOLDER.parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(root)])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    command = [sys.executable, str(FOLDER / "conversions.py"), str(tmp_path), "--quantizer", "fast"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    hashes = json.loads(done.stdout)
    assert len(set(hashes.values())) == len(hashes) == 11
    plan = ggufmoe.convert(tmp_path / "BF16", tmp_path / "x.gguf", "Q4_K_M").plan
    assert {tensor.type.name for tensor in plan.tensors} >= {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F32"}
