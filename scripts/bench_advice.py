"""Compare the tokens a second that `ggufmoe plan` expects with those that `ggufmoe bench` measures.

    python scripts/bench_advice.py MODEL.gguf ... [--depth 2000] [--repetitions 3]

The engine's speeds are measured first and kept, as `plan` does; on a busy machine neither side is worth reading.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.gguf.model import read_model_header
from ggufmoe.options import ContextOptions
from ggufmoe.store.type_advice import Machine, advise_models, this_machine


def expected(path: Path, depth: int, machine: Machine) -> tuple[float, float]:
    """Tokens a second in an empty context and in one of ``depth`` tokens. Raises ValueError where a GPU computes."""
    (advice,) = advise_models({path.name: read_model_header(path)}, machine, ContextOptions(n_ctx=depth))
    if advice.tokens_per_s is None or advice.tokens_per_s_full is None:
        raise ValueError(f"{path}: the GPU computes all layers, and nothing is expected of the CPU")
    return advice.tokens_per_s, advice.tokens_per_s_full


def measured(path: Path, depth: int, repetitions: int) -> list[float]:
    """The same two by ``ggufmoe bench``."""
    bench = [sys.executable, "-m", "ggufmoe", "bench", str(path), "-p", "0", "-n", "16"]
    options = ["-r", str(repetitions), "-d", f"0,{depth}", "-o", "csv"]
    printed = subprocess.run([*bench, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(row["avg_ts"]) for row in csv.DictReader(printed.splitlines())]


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--depth", type=int, default=2000, metavar="N", help="tokens of a long context")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    given = parser.parse_args(args)
    machine = this_machine()
    print("| model | context | expected | measured | ratio |\n|---|---|---|---|---|")
    for path in given.models:
        pairs = zip(expected(path, given.depth, machine), measured(path, given.depth, given.repetitions), strict=True)
        for n_tokens, (guess, truth) in zip((0, given.depth), pairs, strict=True):
            print(f"| {path.stem} | {n_tokens} | {guess:.0f} | {truth:.0f} | {guess / truth:.2f} |", flush=True)


if __name__ == "__main__":
    main()
