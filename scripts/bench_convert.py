"""Measure a plain convert beside llama.cpp's converter and llama_model_quantize, on the same cores in the same run.

The checkpoint is a slice of two merged Mistral-7B (2 of 32 layers: 2.1 GB of bfloat16) unless one is given. The sides
take turns; the ratio is that of the medians, with the range over the rounds. Peak memory counts a process and its
children; bytes written are what the process handed to the system (Linux only).

    python scripts/bench_convert.py [--source DIR] [--rounds 3] [--types BF16,Q8_0,Q4_K_M]
        [--llama-cpp DIR --peer-python PYTHON]

``--llama-cpp`` is the directory of llama.cpp's sources, ``--peer-python`` an interpreter with torch and transformers;
without them only ggufmoe is measured. scripts/peers/run makes both.
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
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent

QUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


@dataclass(frozen=True)
class Cost:
    """What one command cost."""

    seconds: float
    peak_bytes: int
    written_bytes: int

    def __add__(self, other: Cost) -> Cost:
        peak = max(self.peak_bytes, other.peak_bytes)
        return Cost(self.seconds + other.seconds, peak, self.written_bytes + other.written_bytes)


def measure(command: list[str]) -> Cost:
    """Run a command to its end; its output is shown only if it fails."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        watch = Watch(process.pid)
        code = process.wait()
        seconds = time.monotonic() - started
        watch.stop()
        if code:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    return Cost(seconds, watch.peak_bytes, watch.written_bytes)


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


def convert_ours(source: Path, output: Path, file_type: str, threads: int) -> Cost:
    """ggufmoe, from the command line, start of Python included."""
    command = [sys.executable, "-m", "ggufmoe", "convert", str(source), "-o", str(output), "-q", file_type]
    return measure([*command, "-t", str(threads), "--force", "--json"])


def convert_theirs(arguments: argparse.Namespace, source: Path, output: Path, file_type: str) -> Cost:
    """llama.cpp: its converter, and llama_model_quantize on what that wrote."""
    from ggufmoe.quant.types import FileType

    direct = file_type in ("BF16", "F16", "F32", "Q8_0")
    lossless = output if direct else output.with_suffix(".lossless.gguf")
    converter = [arguments.peer_python, str(Path(arguments.llama_cpp) / "convert_hf_to_gguf.py"), str(source)]
    outtype = file_type.lower() if direct else "bf16"
    cost = measure([*converter, "--outtype", outtype, "--outfile", str(lossless)])
    if direct:
        return cost
    number = str(FileType.from_name(file_type).id)
    command = [sys.executable, "-c", QUANTIZE, str(lossless), str(output), number, str(arguments.threads)]
    cost += measure(command)
    lossless.unlink()
    return cost


def report(file_type: str, ours: list[Cost], theirs: list[Cost], source_bytes: int, output_bytes: int) -> None:
    """Two lines and a ratio."""
    for name, costs in (("ggufmoe", ours), ("llama.cpp", theirs)):
        if costs:
            seconds = statistics.median(cost.seconds for cost in costs)
            peak, written = max(cost.peak_bytes for cost in costs), max(cost.written_bytes for cost in costs)
            print(
                f"{file_type:8} {name:10} {seconds:7.1f} s  {source_bytes / seconds / 1e6:7.0f} MB/s of source  "
                f"peak {peak / 1e6:6.0f} MB  written {written / max(output_bytes, 1):.2f} x the output",
                flush=True,
            )
    if theirs:
        ratios = [their.seconds / our.seconds for our, their in zip(ours, theirs, strict=True)]
        median = statistics.median(t.seconds for t in theirs) / statistics.median(o.seconds for o in ours)
        print(f"{file_type:8} {median:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def bench(arguments: argparse.Namespace, source: Path, directory: Path) -> None:
    """All types, in turn."""
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for file_type in arguments.types.split(","):
        ours: list[Cost] = []
        theirs: list[Cost] = []
        output = directory / "ours.gguf"
        for _ in range(arguments.rounds):
            ours.append(convert_ours(source, output, file_type, arguments.threads))
            if arguments.llama_cpp:
                theirs.append(convert_theirs(arguments, source, directory / "theirs.gguf", file_type))
        report(file_type, ours, theirs, source_bytes, output.stat().st_size)


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
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", help="llama.cpp's sources")
    parser.add_argument("--peer-python", default=sys.executable, help="Python with torch and transformers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.source
        if source is None:
            source = make_slice(Path(scratch), arguments.layers)
        print(json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "python": sys.version.split()[0]}))
        bench(arguments, source, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
