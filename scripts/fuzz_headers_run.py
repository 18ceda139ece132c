"""Change one value of a GGUF header at a time, and check that the change ends neither the command line nor an app.

    python scripts/fuzz_headers_run.py [MODEL.gguf ...] [--changes 48] [--seconds 60]

Without models it makes three of different architectures from those of the demo: a dense Llama, a Mixtral, and a Qwen3
with experts. Each changed file goes through ``ggufmoe plan``, ``ggufmoe run`` and, all files of a model in one process,
``Engine``. A result is fine when it is an answer or a known error (exit code 0, 1 or 2, no traceback, no defect), in
time and in 2 GB of memory. Exits with 1 if any is not. Not for Windows, which does not tell the memory of a child.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np

from ggufmoe import ContextOptions, Engine, GgufmoeError, convert, demo
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, Header, TensorInfo, padded, read_header
from ggufmoe.gguf.types import GGMLType, ValueType

MAX_BYTES = 2 * 10**9
_COUNTS = (0, 1, 3, 2**31, 2**32 - 1)
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e30)
_API = "--api"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, what it wrote, and its peak memory."""

    code: int
    written: str
    peak_bytes: int

    @property
    def outcome(self) -> str:
        """``answer`` or ``refused``; anything else breaks a promise."""
        if self.code < 0:
            return f"signal {-self.code}"
        if "Traceback" in self.written or "defect of ggufmoe" in self.written:
            return "defect"
        if self.peak_bytes > MAX_BYTES:
            return f"{self.peak_bytes / 1e9:.1f} GB"
        return {0: "answer", 1: "refused", 2: "refused"}.get(self.code, f"exit code {self.code}")


def main() -> int:
    if sys.argv[1:2] == [_API]:
        return _through_the_api([Path(name) for name in sys.argv[2:]])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--changes", type=int, default=48, help="changes of each model")
    parser.add_argument("--seconds", type=float, default=60, help="what one process may take")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as made:
        for model in arguments.models or _three_models(Path(made)):
            with tempfile.TemporaryDirectory() as folder:
                changed = dict(islice(_changed_files(model, Path(folder)), arguments.changes))
                print(f"{model.name}: {len(changed)} changes", flush=True)
                for way, outcome, what in _outcomes(changed, arguments.seconds):
                    counts[way, outcome] += 1
                    if outcome not in ("answer", "refused"):
                        print(f"{model.name}: {what}: {way}: {outcome}", flush=True)
    for (way, outcome), n in sorted(counts.items()):
        print(f"{way}: {n} {outcome}")
    return int(any(outcome not in ("answer", "refused") for _, outcome in counts))


def _three_models(folder: Path) -> Iterator[Path]:
    llama, mixtral, qwen = (folder / f"{name}.gguf" for name in ("llama", "mixtral", "qwen3moe"))
    convert(demo.DIRECTORY / "base", llama, quant="Q8_0")
    yield llama
    convert(demo.RECIPE, mixtral, quant="Q8_0")
    yield mixtral
    header, raw = read_header(mixtral), mixtral.read_bytes()
    metadata = {key.replace("llama.", "qwen3moe."): value for key, value in header.metadata.items()}
    metadata["general.architecture"] = replace(metadata["general.architecture"], value="qwen3moe")
    width = metadata["qwen3moe.feed_forward_length"]
    metadata["qwen3moe.expert_feed_forward_length"] = width
    norm = np.ones(header.get("llama.rope.dimension_count"), dtype="<f4").tobytes()
    tensors, data = list(header.tensors), raw[header.data_offset :]
    for layer in range(header.get("llama.block_count")):
        for part in ("q", "k"):  # what a Qwen3 has and a Mixtral has not
            data = data.ljust(padded(len(data), header.alignment), b"\0")
            name, shape = f"blk.{layer}.attn_{part}_norm.weight", (len(norm) // 4,)
            tensors.append(TensorInfo(name, GGMLType.F32, shape, len(data), len(norm)))
            data += norm
    qwen.write_bytes(encode_header(metadata, tensors, header.alignment) + data)
    yield qwen


def _outcomes(changed: dict[Path, str], seconds: float) -> Iterator[tuple[str, str, str]]:
    """Way, outcome and change, for each way and each changed file."""
    ggufmoe = [sys.executable, "-m", "ggufmoe"]
    for path, what in changed.items():
        yield "plan", _run([*ggufmoe, "plan", str(path)], seconds).outcome, what
        run = [*ggufmoe, "run", str(path), "a", "--raw", "-n", "2", "-t", "1", "--quiet"]
        yield "run", _run(run, seconds).outcome, what
    ended = _run([sys.executable, __file__, _API, *map(str, changed)], seconds * len(changed))
    told = ended.written.splitlines()
    if ended.outcome != "answer":
        yield "api", ended.outcome, f"after {len(told)} files: {told[-1:]}"
    for line in told:
        yield "api", line, "one of its files"


def _through_the_api(paths: list[Path]) -> int:
    """Load and ask every file in this process, and print what became of it."""
    for path in paths:
        try:
            with Engine(path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
                list(islice(engine.generate([1, 2]), 3))
            print("answer", flush=True)
        except GgufmoeError:
            print("refused", flush=True)
    return 0


def _run(command: list[str], seconds: float) -> Ended:
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(process.returncode, file.read(), usage.ru_maxrss * unit)


def _changed_files(model: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Copies of the model, each with one value of its header changed, and what was changed."""
    header, raw = read_header(model), model.read_bytes()
    for number, (key, value) in enumerate(_changes(header)):
        path = folder / f"{number}.gguf"
        head = encode_header({**header.metadata, key: value}, header.tensors, header.alignment)
        path.write_bytes(head + raw[header.data_offset :])
        yield path, f"{key} = {value.value!r}"


def _changes(header: Header) -> Iterator[tuple[str, GGUFValue]]:
    """One change of every scalar in turn, then a second one of every scalar, and so on: the network's keys first."""
    architecture = header.get("general.architecture")
    scalars = sorted(header.metadata, key=lambda key: not key.startswith(f"{architecture}."))
    each = [[(key, value) for value in _other_values(header.metadata[key])] for key in scalars]
    return (change for change in chain.from_iterable(zip_longest(*each)) if change is not None)


def _other_values(value: GGUFValue) -> list[GGUFValue]:
    if value.type in (ValueType.FLOAT32, ValueType.FLOAT64):
        return [replace(value, value=other) for other in _FLOATS]
    if value.type in (ValueType.UINT32, ValueType.UINT64):
        return [replace(value, value=other) for other in _COUNTS if other != value.value]
    if value.type is ValueType.INT32:
        return [replace(value, value=other) for other in (0, -1, 2**31 - 1)]
    if value.type is ValueType.BOOL:
        return [replace(value, value=not value.value)]
    return [replace(value, value="?")] if value.type is ValueType.STRING else []


if __name__ == "__main__":
    sys.exit(main())
