"""A small program, frozen with the hooks of the package, runs in an empty directory as it does unfrozen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "frozen_program.py"
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402
from tests.remote.workers import start_worker  # noqa: E402


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


KEPT = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
"""All that the frozen program sees of the environment."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    places = ("--distpath", folder, "--workpath", folder / "work", "--specpath", folder)
    run(sys.executable, "-m", "PyInstaller", "--onedir", "--log-level", "WARN", *places, PROGRAM, cwd=folder)
    return folder / PROGRAM.stem / PROGRAM.stem


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture
def plain(checkpoint: Path, tmp_path: Path) -> str:
    """What the program says unfrozen."""
    return run(sys.executable, PROGRAM, checkpoint, tmp_path / "plain.gguf", cwd=tmp_path)


def test_a_frozen_program_says_what_the_unfrozen_one_says(
    app: Path, checkpoint: Path, plain: str, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(app, checkpoint, tmp_path / "frozen.gguf", cwd=empty, env=KEPT) == plain != ""
    assert (tmp_path / "frozen.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_a_frozen_program_is_its_own_child_where_workers_compute(
    app: Path, checkpoint: Path, plain: str, tmp_path: Path
) -> None:
    with start_worker() as worker:
        said = run(app, checkpoint, tmp_path / "frozen.gguf", worker.endpoint, cwd=tmp_path, env=KEPT)
    assert said == f"{plain}\nRPC0\n"
