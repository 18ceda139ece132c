"""The check of scripts/arm_check: sets up the emulator, runs the parts, compares with x86-64, and says the time."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import conversions
import numpy as np
from emulator import ROOT, Emulator, MissingError, emulator
from numpy.typing import NDArray

from ggufmoe.folders import cache_directory
from ggufmoe.gguf.stored_rows import OpenModel
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import has_kernel

HERE = Path(__file__).resolve().parent
TESTS = (
    "tests/gguf/test_floats.py",
    "tests/quant/kernels/test_conversions.py",
    "tests/quant/kernels/test_probe_tile.py",
    "tests/quant/kernels/test_grids.py",
)
WITHOUT_GGML = "not those_of_ggml and not every_quantizer"
THREADS = (1, 2, 7)
CLOSE = 0.9999
"""The least cosine of router rows that two machines compute."""


def main() -> int:
    """Run the parts that were asked for; 1 if one fails or something is missing."""
    parser = argparse.ArgumentParser(description="Check on an emulated ARM processor that files are those of x86-64.")
    parser.add_argument("--folder", type=Path, help="where the emulator is kept; default: ~/.cache/ggufmoe/arm")
    parser.add_argument("--part", choices=("probe", "tests", "convert"), help="only this part")
    options = parser.parse_args()
    folder = options.folder or (cache_directory() or Path.cwd() / "cache") / "arm"
    begun, failed = time.perf_counter(), []
    try:
        arm = emulator(folder.absolute())
    except MissingError as error:
        print(f"arm_check: {error}", file=sys.stderr)
        return 1
    print(f"set up in {time.perf_counter() - begun:.0f} s: {arm.qemu.name}, {arm.python.name}", flush=True)
    for name, part in (("tests", run_tests), ("convert", compare_conversions), ("probe", probe_kernels)):
        if options.part in (None, name):
            start = time.perf_counter()
            passed = part(arm)
            failed += [] if passed else [name]
            print(f"=== {name}: {'passed' if passed else 'failed'}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"=== all: {time.perf_counter() - begun:.0f} s")
    return int(bool(failed))


def run_tests(arm: Emulator) -> bool:
    """The tests that need no ggml, under emulation."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore:Unknown config option"]
    options += ["-k", WITHOUT_GGML]
    command = arm.command("-m", "pytest", *options, *TESTS)
    return subprocess.run(command, cwd=ROOT, env=arm.environment()).returncode == 0


def probe_kernels(arm: Emulator) -> bool:
    """Every kernel, judged under emulation by the stored hashes; two at a time."""

    def judge(type_: GGMLType) -> bool:
        command = arm.command(str(HERE / "probe.py"), "BF16", type_.name)
        done = subprocess.run(command, env=arm.environment(), capture_output=True, text=True)
        print(done.stdout + done.stderr, end="", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(2) as pool:
        return all(list(pool.map(judge, filter(has_kernel, GGMLType))))


def compare_conversions(arm: Emulator) -> bool:
    """Convert everything here, by our kernels and by llama.cpp's routines, and under emulation; compare the hashes."""
    inputs = arm.folder / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    for made in ("here", "arm"):
        (inputs / made).mkdir(parents=True)
    conversions.make_inputs(inputs)
    script = [str(HERE / "conversions.py"), str(inputs)]
    threads = ["--threads", *map(str, THREADS)]
    runs = {
        "x86-64": [sys.executable, *script, *threads, "--quantizer", "fast", "--keep", str(inputs / "here")],
        "llama.cpp": [sys.executable, *script, *threads, "--quantizer", "ggml"],
        "ARM": arm.command(*script, *threads, "--keep", str(inputs / "arm")),
    }
    hashes = {}
    for name, command in runs.items():
        environment = arm.environment() if name == "ARM" else None
        done = subprocess.run(command, cwd=inputs, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: converting failed", file=sys.stderr)
            return False
        hashes[name] = json.loads(done.stdout)
    same = [_compare(job, {name: found[job] for name, found in hashes.items()}, inputs) for job in hashes["ARM"]]
    shutil.rmtree(inputs)
    return all(same)


def _compare(job: str, found: dict[str, str], inputs: Path) -> bool:
    """Print the line of a job, and say whether its files are equal, or of a recipe equal but for close router rows."""
    others = [name for name, value in found.items() if value != found["ARM"]]
    told, same = "equal", not others
    recipe = job.partition(" ")[0]
    if others and recipe in conversions.RECIPES:
        told, same = router_difference(inputs / "here" / f"{recipe}.gguf", inputs / "arm" / f"{recipe}.gguf")
    elif others:
        told = f"differs from {' and '.join(others)}"
    print(f"{job:36} {found['ARM'][:16]} {told}", flush=True)
    return same


def router_difference(here: Path, arm: Path) -> tuple[str, bool]:
    """In what two files differ, in words, and whether that is only router rows that are nearly parallel."""
    with OpenModel(here) as ours, OpenModel(arm) as theirs:
        if ours.header.metadata != theirs.header.metadata or list(ours.tensors) != list(theirs.tensors):
            return "differs in metadata or in the order of tensors", False
        least = 1.0
        for name, tensor in ours.tensors.items():
            a, b = (rows.read(0, tensor.n_rows) for rows in (tensor, theirs.tensors[name]))
            if a.tobytes() == b.tobytes():
                continue
            if "ffn_gate_inp" not in name:
                return f"differs in {name}", False
            least = min(least, _cosine(a.view(np.float32), b.view(np.float32)))
    return f"equal but for router rows, cosine 1 - {1 - least:.1e}", least > CLOSE


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    first, second = a.astype(np.float64), b.astype(np.float64)
    products = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return float(products.min())


if __name__ == "__main__":
    raise SystemExit(main())
