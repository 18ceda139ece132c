"""Measure convert and quantize beside llama.cpp's converter and llama_model_quantize, on the same cores, in turn.

The checkpoint is a slice of two merged Mistral-7B (2 of 32 layers: 2.1 GB of bfloat16) unless one is given. The sides
take turns in each round; the ratio is the median of the rounds' ratios, with their range. ``quantize`` starts from the
lossless GGUF of the same checkpoint. ``cold`` takes the input files out of the page cache before each run (Linux), and
``warm`` reads them into it. Peak memory counts a process and its children; bytes written are what the process handed
to the system (Linux only). The load of the machine when a round began is printed: other work makes all of it wrong.

    python scripts/bench_convert.py [--source DIR] [--rounds 3] [--types BF16,Q8_0,Q4_K_M] [--quantize Q4_K_M]
        [--imatrix] [--cache warm,cold] [--llama-cpp DIR --peer-python PYTHON]

``--llama-cpp`` is the directory of llama.cpp's sources, ``--peer-python`` an interpreter with torch and transformers;
without them only ``quantize`` has somebody to compare with. scripts/peers/run makes both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent

QUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(sys.argv[3]), int(sys.argv[4])
if len(sys.argv) > 5:
    import numpy as np
    weights = dict(np.load(sys.argv[5]))
    entry, floats = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
    entries = [entry(name.encode(), values.ctypes.data_as(floats), values.size) for name, values in weights.items()]
    parameters.imatrix = (entry * (len(entries) + 1))(*entries, entry(None, None, 0))
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


@dataclass(frozen=True)
class Cost:
    """What one command cost."""

    seconds: float
    peak_bytes: int
    written_bytes: int
    cpu_seconds: float = 0.0
    """Of the process and its children; other work on the machine changes it little."""

    def __add__(self, other: Cost) -> Cost:
        peak = max(self.peak_bytes, other.peak_bytes)
        written, cpu = self.written_bytes + other.written_bytes, self.cpu_seconds + other.cpu_seconds
        return Cost(self.seconds + other.seconds, peak, written, cpu)


def measure(command: list[str]) -> Cost:
    """Run a command to its end; its output is shown only if it fails."""
    started, before = time.monotonic(), os.times()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        watch = Watch(process.pid)
        code = process.wait()
        seconds = time.monotonic() - started
        watch.stop()
        if code:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Cost(seconds, watch.peak_bytes, watch.written_bytes, cpu)


class Watch(threading.Thread):
    """Looks at a process and its children fifty times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = self.written_bytes = 0
        self._process = psutil.Process(pid)
        self._written: dict[int, int] = {}
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            try:
                self._look()
            except psutil.Error:
                continue

    def _look(self) -> None:
        family = [self._process, *self._process.children(recursive=True)]
        self.peak_bytes = max(self.peak_bytes, sum(member.memory_info().rss for member in family))
        for member in family:
            if hasattr(member, "io_counters"):
                self._written[member.pid] = member.io_counters().write_chars
        self.written_bytes = sum(self._written.values())

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self.join()


def set_cache(paths: list[Path], cache: str) -> None:
    """Have files in the page cache, or out of it."""
    for path in paths:
        with path.open("rb") as file:
            if cache == "warm":
                while file.read(1 << 24):
                    pass
                continue
            os.fsync(file.fileno())  # what is not on disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Importances:
    """One importance matrix as each side reads it: a GGUF file for ggufmoe, arrays by tensor name for llama.cpp."""

    gguf: Path
    arrays: Path


def make_importances(source: Path, scratch: Path) -> Importances:
    """A made-up importance for each column of each matrix of the checkpoint."""
    from check_bytes import importance

    made = Importances(scratch / "imatrix.gguf", scratch / "imatrix.npz")
    weights = importance(source, made.gguf)
    np.savez(made.arrays, **weights)  # type: ignore[arg-type]  # its names are those of tensors, none is allow_pickle
    return made


def ours(
    verb: str, source: Path, output: Path, file_type: str, threads: int, importances: Importances | None = None
) -> Cost:
    """ggufmoe, from the command line, start of Python included."""
    command = [sys.executable, "-m", "ggufmoe", verb, str(source), "-o", str(output), "-q", file_type]
    if importances is not None:
        command += ["--imatrix", str(importances.gguf)]
    return measure([*command, "-t", str(threads), "--force", "--json"])


def convert_theirs(
    arguments: argparse.Namespace, source: Path, output: Path, file_type: str, importances: Importances | None
) -> Cost:
    """llama.cpp: its converter, and llama_model_quantize on what that wrote."""
    direct = file_type in ("BF16", "F16", "F32", "Q8_0")
    lossless = output if direct else output.with_suffix(".lossless.gguf")
    converter = [arguments.peer_python, str(Path(arguments.llama_cpp) / "convert_hf_to_gguf.py"), str(source)]
    outtype = file_type.lower() if direct else "bf16"
    cost = measure([*converter, "--outtype", outtype, "--outfile", str(lossless)])
    if direct:
        return cost
    cost += quantize_theirs(lossless, output, file_type, arguments.threads, importances)
    lossless.unlink()
    return cost


def quantize_theirs(
    source: Path, output: Path, file_type: str, threads: int, importances: Importances | None = None
) -> Cost:
    """llama_model_quantize, from a Python that loads nothing else."""
    from ggufmoe.quant.filetypes import FileType

    number = str(FileType.from_name(file_type).id)
    arrays = [] if importances is None else [str(importances.arrays)]
    return measure([sys.executable, "-c", QUANTIZE, str(source), str(output), number, str(threads), *arrays])


@dataclass(frozen=True)
class Contest:
    """One thing that both sides do; ``theirs`` is None where llama.cpp's side is not there."""

    name: str
    inputs: list[Path]
    output: Path
    ours: Callable[[], Cost]
    theirs: Callable[[], Cost] | None


def run(contest: Contest, caches: list[str], rounds: int) -> None:
    """All rounds of a contest, and what they gave."""
    for cache in caches:
        costs: dict[str, list[Cost]] = {"ggufmoe": [], "llama.cpp": []}
        for number in range(rounds):
            print(f"{contest.name}, {cache}, round {number + 1}: load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            set_cache(contest.inputs, cache)
            costs["ggufmoe"].append(contest.ours())
            if contest.theirs is not None:
                set_cache(contest.inputs, cache)
                costs["llama.cpp"].append(contest.theirs())
        report(f"{contest.name}, {cache}", costs, contest)


def report(name: str, costs: dict[str, list[Cost]], contest: Contest) -> None:
    """Two lines and a ratio."""
    source_bytes = sum(path.stat().st_size for path in contest.inputs)
    for side, runs in costs.items():
        if runs:
            seconds = statistics.median(cost.seconds for cost in runs)
            cpu = statistics.median(cost.cpu_seconds for cost in runs)
            peak, written = max(cost.peak_bytes for cost in runs), max(cost.written_bytes for cost in runs)
            print(
                f"{name}: {side:10} {seconds:6.1f} s ({cpu:.1f} of CPU)  "
                f"{source_bytes / seconds / 1e6:7.0f} MB/s of source  peak {peak / 1e6:6.0f} MB  "
                f"written {written / contest.output.stat().st_size:.2f} x the output",
                flush=True,
            )
    ratios = [their.seconds / our.seconds for our, their in zip(costs["ggufmoe"], costs["llama.cpp"], strict=False)]
    if ratios:
        middle = statistics.median(ratios)
        cpu = statistics.median(c.cpu_seconds for c in costs["llama.cpp"])
        cpu /= statistics.median(c.cpu_seconds for c in costs["ggufmoe"])
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: {middle:.2f} times as fast ({spread}), with {1 / cpu:.2f} of the CPU time", flush=True)


def contests(arguments: argparse.Namespace, source: Path, scratch: Path) -> Iterator[Contest]:
    """Every conversion, then every quantization, whose source is made when its turn comes."""
    weights = sorted(source.glob("*.safetensors"))
    output, other, threads = scratch / "ours.gguf", scratch / "theirs.gguf", arguments.threads
    matrix = make_importances(source, scratch) if arguments.imatrix else None
    for file_type in filter(None, arguments.types.split(",")):
        theirs = partial(convert_theirs, arguments, source, other, file_type, matrix) if arguments.llama_cpp else None
        mine = partial(ours, "convert", source, output, file_type, threads, matrix)
        yield Contest(f"convert {file_type}", weights, output, mine, theirs)
    other.unlink(missing_ok=True)
    lossless = scratch / "lossless.gguf"
    if arguments.quantize:
        ours("convert", source, lossless, "BF16", threads)
    for file_type in filter(None, arguments.quantize.split(",")):
        theirs = partial(quantize_theirs, lossless, other, file_type, threads, matrix)
        mine = partial(ours, "quantize", lossless, output, file_type, threads, matrix)
        yield Contest(f"quantize {file_type}", [lossless], output, mine, theirs)


def make_slice(scratch: Path, layers: str) -> Path:
    """A checkpoint of the seed's shapes with a small tokenizer; both converters pad it to the embedding's rows."""
    from tests.tiny_tokenizers import tokenizer_files

    tokenizer = scratch / "tokenizer.model"
    tokenizer.write_bytes(tokenizer_files("spm")["tokenizer.model"])
    maker = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(scratch / "slice")]
    measure([*maker, "--layers", layers, "--tokenizer", str(tokenizer)])
    return scratch / "slice"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a checkpoint; made if not given")
    parser.add_argument("--layers", default="2", help="layers of the checkpoint that is made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--types", default="BF16,Q8_0,Q4_K_M")
    parser.add_argument("--quantize", default="Q4_K_M", help="file types to quantize the BF16 file to")
    parser.add_argument("--imatrix", action="store_true", help="with an importance matrix, which is made up")
    parser.add_argument("--cache", default="warm,cold", help="states of the page cache to measure in")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", help="llama.cpp's sources")
    parser.add_argument("--peer-python", default=sys.executable, help="Python with torch and transformers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.source
        if source is None:
            source = make_slice(Path(scratch), arguments.layers)
        print(json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "python": sys.version.split()[0]}))
        for contest in contests(arguments, source, Path(scratch)):
            run(contest, arguments.cache.split(","), arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
