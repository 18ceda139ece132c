"""Where the time of a conversion goes: CPU seconds of the workers by stage, and what is left outside kernels and disk.

    python scripts/profile_convert.py SOURCE [--type Q4_K_M] [--threads N]

SOURCE is a checkpoint or a GGUF file; the output goes to a temporary directory. CPU time is that of each thread, so
other work on the machine changes it little; the kernel's and the file system's share of reading and writing counts as
disk. What precedes the workers (start of Python, planning, compiling kernels) does not grow with the model and is
told apart.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.convert import convert
from ggufmoe.quantize import quantize
from ggufmoe.writing import place, tiling, writer


class Stages:
    """CPU seconds and calls by stage, of all threads together."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count the time of ``owner.name`` as a stage."""
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return original(*arguments, **named)
            finally:
                with self._lock:
                    self.seconds[stage] += time.thread_time() - started
                    self.calls[stage] += 1

        setattr(owner, name, watched)


def watch_all() -> Stages:
    """Every stage of the pipeline."""
    stages = Stages()
    stages.watch(tiling.TileMaker, "read", "read")
    stages.watch(tiling, "_first_damaged", "check")
    stages.watch(tiling, "quantize_rows", "kernels")
    stages.watch(place.PartialFile, "write_at", "write")
    stages.watch(place.PartialFile, "sync", "flush")
    stages.watch(writer, "prepare_kernels", "compile kernels")
    stages.watch(writer._Run, "_worker", "workers")
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    stages = watch_all()
    with tempfile.TemporaryDirectory() as scratch:
        make = quantize if arguments.source.is_file() else convert
        result = make(arguments.source, Path(scratch) / "out.gguf", arguments.type, threads=arguments.threads)
    seconds = stages.seconds
    workers = seconds["workers"]
    rest = workers - seconds["read"] - seconds["write"] - seconds["kernels"]
    print(f"{result.plan.n_weights:,} weights, {stages.calls['check']:,} checks, {result.seconds:.2f} s of wall time")
    for stage in ("kernels", "read", "write", "check"):
        print(f"{stage:32} {seconds[stage]:7.3f} s of CPU  {seconds[stage] / workers:6.1%} of the workers'")
    print(
        f"{'outside kernels and disk':32} {rest:7.3f} s of CPU  {rest / workers:6.1%} of the workers', checks included"
    )
    for stage in ("flush", "compile kernels"):
        print(f"{stage:32} {seconds[stage]:7.3f} s of CPU  not the workers'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
