"""A small program, frozen with the hooks of the package, runs in an empty directory as it does unfrozen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "frozen_program.py"
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_frozen_program_says_what_the_unfrozen_one_says(tmp_path: Path) -> None:
    model = tiny.make_checkpoint(tmp_path / "checkpoint")
    plain = run(sys.executable, PROGRAM, model, tmp_path / "plain.gguf", cwd=tmp_path)
    places = ("--distpath", tmp_path, "--workpath", tmp_path / "work", "--specpath", tmp_path)
    run(sys.executable, "-m", "PyInstaller", "--onedir", "--log-level", "WARN", *places, PROGRAM, cwd=tmp_path)
    app, empty = tmp_path / PROGRAM.stem / PROGRAM.stem, tmp_path / "empty"
    empty.mkdir()
    keep = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    assert run(app, model, tmp_path / "frozen.gguf", cwd=empty, env=keep) == plain != ""
    assert (tmp_path / "frozen.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
