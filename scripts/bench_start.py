"""Measure the time from the start of ``ggufmoe convert`` to the first byte of weights that it writes, in turn:
with compiled kernels in the user's cache, with an empty cache, and (``--before``) for another version of the package.

    python scripts/bench_start.py TOKENIZER [--rounds 7] [--type Q4_K_M] [--before DIRECTORY_OF_ANOTHER_CHECKOUT]

The checkpoint is one layer of random weights, large enough that its kernels are compiled before the work begins
(0.4 GB in /tmp). A run ends with its first write. Medians with their range; other work on the machine makes them wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ("--layers", "1", "--hidden", "2048", "--ff", "14336", "--heads", "16", "--kv", "4", "--vocab", "32000")
UNTIL_FIRST_WRITE = """
import os, sys, time
def first_write(*_):
    os.write(1, b"%.6f\\n" % time.time())
    os._exit(0)
os.pwrite = os.pwritev = first_write
sys.argv[0] = "ggufmoe"
from ggufmoe.__main__ import main
sys.exit(main())
"""


def main() -> int:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description="Time from the start of a convert to its first write.")
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.model or tokenizer.json of 32000 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--type", default="Q4_K_M", help="file type")
    parser.add_argument("--before", type=Path, help="another checkout, to be measured in turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        source, cache = folder / "checkpoint", folder / "cache"
        command = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(source), *SHAPE]
        subprocess.run([*command, "--tokenizer", options.tokenizer], check=True)
        variants = {"empty cache": ROOT, "warm cache": ROOT}
        if options.before is not None:
            variants["before"] = options.before
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for name, package in variants.items():
                times[name].append(_seconds(package, source, folder, options.type, cache))
        for name, found in times.items():
            print(f"{name:12} {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
    return 0


def _seconds(package: Path, source: Path, folder: Path, type_: str, cache: Path) -> float:
    environment = os.environ | {"PYTHONPATH": str(package), "GGUFMOE_CACHE": str(cache)}
    arguments = ["convert", str(source), "-o", str(folder / "out.gguf"), "-q", type_, "--quiet", "--force"]
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_FIRST_WRITE, *arguments],
        capture_output=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    if done.returncode or not done.stdout:
        sys.exit(done.stderr.decode() or "nothing was written")
    return float(done.stdout.split()[0]) - start


if __name__ == "__main__":
    raise SystemExit(main())
