"""Keeps one process of reference.py for all questions of a comparison: importing torch takes it seconds."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path


class ReferenceProcess:
    """reference.py in the environment with torch. It ends when this object, or the process that owns it, does."""

    def __init__(self, python: Path) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._command = [str(python), str(Path(__file__).parent / "reference.py")]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def do(self, listed: Path) -> None:
        """Wait until the jobs that this file lists are done. Raises CalledProcessError, with its stderr, if it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{listed}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line == f"{listed}\n":  # else a library prints
                return
        self._said.seek(0)
        raise subprocess.CalledProcessError(self._process.wait(), self._command, self._said.read())
