#!/usr/bin/env python3
"""What a file of a chosen size costs, step by step: processor time, bytes read and peak memory.

Each step runs in a process of its own: the sensitivity, the choice of types with the error table measured, the same
for another size with the table there already, and the writing of a file. Shapes count, so random weights do:

    python scripts/make_checkpoint.py MODEL --arch mistral --layers 2 --tokenizer tokenizer.model
    python scripts/bench_size_cost.py MODEL TEXT

Processor time is that of all threads together, so other work on the machine changes it little. Bytes read are those
that the process asked the system for, from the disk or the page cache. The first run on a machine compiles kernels on
the way; take the figures of a second one. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggufmoe
from ggufmoe.convert import plan_convert
from ggufmoe.folders import cache_directory

SIZES = ("4.5bpw", "3.5bpw")


def bytes_read() -> int:
    """What this process has read so far (Linux)."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def measured(step: Callable[..., Any], *arguments: Any) -> tuple[float, float, int, float]:
    """Runs in the child: processor seconds, seconds, bytes read, and peak memory in MiB of a step."""
    before, read, started = time.process_time(), bytes_read(), time.monotonic()
    step(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.process_time() - before, time.monotonic() - started, bytes_read() - read, peak


def measure_sensitivity(model: Path, text: Path, output: Path) -> None:
    """The pass over the model."""
    ggufmoe.sensitivity(model, output, text_file=text)


def choose(model: Path, sensitivity: Path, size: str, types: str) -> None:
    """The types of a file; the error table is measured unless it is in the cache."""
    plan_convert(model, "unused.gguf", size, sensitivity=sensitivity, types=types)  # type: ignore[arg-type]


def write(model: Path, sensitivity: Path, size: str, types: str, output: Path) -> None:
    """The file, with the types that were chosen before."""
    ggufmoe.convert(model, output, size, sensitivity=sensitivity, types=types)  # type: ignore[arg-type]


def use_cache(folder: Path) -> None:
    """Keep error tables in ``folder``, so that those of an earlier run do not help, and kernels where they are."""
    kernels = (cache_directory() or folder) / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    (folder / "kernels").symlink_to(kernels, target_is_directory=True)
    os.environ["GGUFMOE_CACHE"] = str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sensitivity", type=Path, help="one that was measured before")
    parser.add_argument("--types", default="all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.model.resolve().parent) as name:
        folder = Path(name)
        use_cache(folder / "cache")
        sensitivity = given.sensitivity or folder / "sensitivity.gguf"
        steps: dict[str, tuple[Any, ...]] = {
            "sensitivity": (measure_sensitivity, given.model, given.text, sensitivity),
            f"errors of all types, and the search for {SIZES[0]}": (
                choose, given.model, sensitivity, SIZES[0], given.types,
            ),
            f"the search for {SIZES[1]}": (choose, given.model, sensitivity, SIZES[1], given.types),
            "the file": (write, given.model, sensitivity, SIZES[1], given.types, folder / "chosen.gguf"),
        }  # fmt: skip
        print("| step | processor time | time | read | peak memory |\n|---|---|---|---|---|", flush=True)
        for label, (step, *arguments) in steps.items():
            if given.sensitivity and label == "sensitivity":
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                busy, seconds, read, peak = pool.apply(measured, (step, *arguments))
            cells = label, f"{busy:.1f} s", f"{seconds:.1f} s", f"{read / 1e9:.2f} GB", f"{peak / 1024:.2f} GiB"
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
