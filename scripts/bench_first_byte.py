"""Measure the time from the start of each verb to the first byte that it writes to a terminal.

    python scripts/bench_first_byte.py MODEL.gguf CHECKPOINT RECIPE.yaml [--rounds 7] [--verb run ...]

Prints median and range, and the median of the processor time. Each command is ended after its first byte. Other work on
the machine makes the times longer, the processor time less so. POSIX only.
"""

from __future__ import annotations

import argparse
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Print one line a verb; 1 if a median is above half a second."""
    parser = argparse.ArgumentParser(description="Time from the start of each verb to its first byte on a terminal.")
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path, help="a directory that convert reads")
    parser.add_argument("recipe", type=Path, help="a recipe that merge reads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--verb", action="append", help="only this one; repeatable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 500, encoding="utf-8")
        commands = _commands(*(path.resolve() for path in (options.model, options.checkpoint, options.recipe)))
        chosen = {name: words for name, words in commands.items() if not options.verb or name in options.verb}
        times = {name: [_seconds(words, folder) for _ in range(options.rounds)] for name, words in chosen.items()}
    medians = []
    for name, found in times.items():
        clock, cpu = zip(*found, strict=True)
        medians.append(statistics.median(clock))
        spread = f"({min(clock):.2f} to {max(clock):.2f})"
        print(f"{name:12} {medians[-1]:.2f} s {spread}, {statistics.median(cpu):.2f} s of a processor")
    return int(max(medians) > 0.5)


def _commands(model: Path, checkpoint: Path, recipe: Path) -> dict[str, list[str]]:
    m, text = str(model), ["-f", "text.txt"]
    return {
        "--help": ["--help"],
        "--version": ["--version"],
        "convert": ["convert", str(checkpoint), "-o", "new.gguf", "--force"],
        "quantize": ["quantize", m, "-o", "new.gguf", "-q", "COPY", "--force"],
        "merge": ["merge", str(recipe), "merged", "--force"],
        "run": ["run", m, "Hello", "--raw"],
        "chat": ["chat", m],
        "route": ["route", m, "Hello"],
        "inspect": ["inspect", m],
        "diff": ["diff", m, m],
        "plan": ["plan", m],
        "perplexity": ["perplexity", m, *text],
        "imatrix": ["imatrix", m, *text, "-o", "imatrix.gguf", "--force"],
        "bench": ["bench", m],
        "demo": ["demo"],
        "worker": ["worker", "--port", "50999"],
        "doctor": ["doctor"],
    }


def _seconds(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds until the first byte, by the clock and of the processor."""
    parent, child = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "ggufmoe", *words], stdin=child, stdout=child, stderr=child, cwd=folder, env=environment
    )
    os.close(child)
    os.read(parent, 1)
    elapsed = time.monotonic() - begun
    process.kill()
    _, process.returncode, used = os.wait4(process.pid, 0)
    os.close(parent)
    return elapsed, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
