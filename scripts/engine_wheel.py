"""Build a wheel of the pinned engine for machines without a compiler, and test it on several kinds of processor.

The wheel has llama-cpp-python's Python files and its metadata, and llama.cpp's libraries, each once: one of ggml's CPU
backend for every set of instructions that ggml knows, of which the fastest that the processor has is loaded. Compiled
by zig, which carries clang and the symbols of old glibc versions. ``scripts/engine_wheel`` calls this.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import setup_environment as setup

sys.path.insert(0, str(setup.ROOT))

from ggufmoe.evaluation.probe import PROBE_PROMPT, write_probe_model

ROOT = setup.ROOT
WHEELS = ROOT / "wheels"
PLAINEST = "qemu64"
"""A processor without SSE4, of which numpy needs some: there the engine runs without it."""
EXPECTED_BACKEND = {
    PLAINEST: "x64",
    "Nehalem": "sse42",
    "Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm": "haswell",
}
"""The processors that qemu pretends to be, without SSE4, with SSE4.2 and with AVX2, and what has to be loaded there."""
MAX_MIB = 40

PATCH = ROOT / "vendor" / "portable.patch"
"""Changes of llama.cpp's sources, each with its reason in vendor/README.md."""
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DGGML_RPC=ON",
    "-DGGML_RPC_RDMA=OFF",
    "-DGGML_OPENMP=OFF",  # there is no libgomp that could be relied on; ggml's own threads compute
    "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
    "-DGIT_EXE=OFF",  # else the commit would be that of a repository around the build
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",  # wheels have no links: with versions each library would be there thrice
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)
UNWINDER = "libgcc_s.so.1"
UNWINDING = (
    "Backtrace", "DeleteException", "FindEnclosingFunction", "ForcedUnwind", "GetCFA", "GetDataRelBase", "GetGR",
    "GetIP", "GetIPInfo", "GetLanguageSpecificData", "GetRegionStart", "GetTextRelBase", "RaiseException", "Resume",
    "Resume_or_Rethrow", "SetGR", "SetIP",
)  # fmt: skip
"""The functions of libgcc that unwind a stack, without ``_Unwind_``."""


@dataclass(frozen=True)
class Portable:
    """What ``[portable]`` of vendor/llama.cpp.toml says."""

    zig: str
    target: str
    glibc: str
    tag: str


def main() -> int:
    """Build and test, or test only; an error is one message and exit code 1."""
    parser = argparse.ArgumentParser(description="Build a portable wheel of the engine, and test it.")
    parser.add_argument("--test-only", action="store_true", help="test the wheel that is in wheels/")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="files compiled at the same time")
    given = parser.parse_args()
    try:
        pin = setup.read_pin(setup.PIN_FILE, "cpu-rpc")
        table = setup._parse_toml(setup.PIN_FILE.read_text(encoding="utf-8"))["portable"]
        portable = Portable(table["zig"], table["target"], table["glibc"], table["tag"])
        if not given.test_only:
            build(pin, portable, given.jobs)
        test(pin, wheel_path(pin, portable))
    except setup.SetupError as error:
        setup.say(str(error))
        return 1
    return 0


def wheel_path(pin: setup.Pin, portable: Portable) -> Path:
    return WHEELS / f"llama_cpp_python-{pin.version}-py3-none-{portable.tag}.whl"


# ---- building


def build(pin: setup.Pin, portable: Portable, jobs: int) -> None:
    """Compile the engine and put the wheel into WHEELS."""
    started = time.monotonic()
    for program in ("cmake", "git", "ninja"):
        if shutil.which(program) is None:
            raise setup.SetupError(f"{program} is not on PATH; install it (pip install {program})")
    zig = zig_program(portable)
    with tempfile.TemporaryDirectory(prefix="engine-wheel-") as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(setup.llama_cpp_sources(pin).parents[1], source, ignore=shutil.ignore_patterns(".git"))
        compilers = wrappers(zig, portable, Path(scratch) / "bin")
        setup.say("compiling ggml's CPU backend for every set of instructions: about 13 minutes of one core")
        libraries = compile_all(pin, source, compilers, Path(scratch) / "build", jobs)
        check_libraries(libraries, portable)
        target = wheel_path(pin, portable)
        WHEELS.mkdir(exist_ok=True)
        write_wheel(source, libraries, portable, target)
    mib = target.stat().st_size / 2**20
    if mib > MAX_MIB:
        raise setup.SetupError(f"{target.name} has {mib:.1f} MiB, more than {MAX_MIB}")
    setup.say(f"{target} has {mib:.1f} MiB and {len(libraries)} libraries, made in {time.monotonic() - started:.0f} s")


def zig_program(portable: Portable) -> Path:
    """The compiler, from an environment of its own in the user's cache folder."""
    folder = setup.cache_directory() / "tools" / f"zig-{portable.zig}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        setup.say(f"installing zig {portable.zig} into {folder}")
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", f"ziglang=={portable.zig}"]
        if subprocess.run(pip, check=False).returncode:
            raise setup.SetupError(f"zig {portable.zig} cannot be installed from PyPI (package ziglang)")
        (folder / "complete").touch()
    where = "import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent / 'zig')"
    return Path(subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True).stdout.strip())


def wrappers(zig: Path, portable: Portable, folder: Path) -> dict[str, Path]:
    """Programs for CMake that call zig as compiler for the old glibc, as archiver and as indexer."""
    folder.mkdir()
    calls = {
        "C_COMPILER": f"cc -target {portable.target}",
        "CXX_COMPILER": f"c++ -target {portable.target}",
        "AR": "ar",
        "RANLIB": "ranlib",
    }
    made = {}
    for name, call in calls.items():
        made[name] = folder / f"zig-{name.lower()}"
        made[name].write_text(f'#!/bin/sh\nexec "{zig}" {call} "$@"\n')
        made[name].chmod(0o755)
    return made


def compile_all(pin: setup.Pin, source: Path, compilers: dict[str, Path], build_dir: Path, jobs: int) -> list[Path]:
    """Run CMake and ninja; gives the libraries."""
    llama = source / "vendor" / "llama.cpp"
    run(["git", "-C", str(llama), "apply", "--whitespace=nowarn", str(PATCH)])
    linked = f"-s {unwinder(compilers, build_dir.parent)}"
    flags = [f"-DCMAKE_{kind}_LINKER_FLAGS={linked}" for kind in ("SHARED", "MODULE")]
    tools = [f"-DCMAKE_{name}={path}" for name, path in compilers.items()]
    commit = f"-DLLAMA_BUILD_COMMIT={pin.commit[:9]}"
    run(["cmake", "-S", str(llama), "-B", str(build_dir), "-G", "Ninja", *tools, *CMAKE, *flags, commit])
    run(["cmake", "--build", str(build_dir), "-j", str(jobs), "--target", "llama", "ggml-rpc"])
    return sorted((build_dir / "bin").glob("lib*.so"))


def unwinder(compilers: dict[str, Path], folder: Path) -> Path:
    """Make a library that has the names of libgcc_s, so that the system's is used to unwind stacks.

    zig puts an unwinder into each library. But glibc ends a thread by unwinding its stack with libgcc_s, whose notes
    another unwinder cannot read: a thread that Python ends at exit while llama.cpp waits for it would end the process.
    """
    source, made = folder / "unwinder.c", folder / UNWINDER
    source.write_text("".join(f"void _Unwind_{name}(void) {{}}\n" for name in UNWINDING), encoding="utf-8")
    name = f"-Wl,-soname,{UNWINDER}"
    run([str(compilers["C_COMPILER"]), "-shared", "-nostdlib", name, "-o", str(made), str(source)])
    return made


def run(command: list[str]) -> None:
    """Run a program that says what it does. Raises SetupError if it fails."""
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise setup.SetupError(f"{' '.join(command[:3])} ... failed")


def check_libraries(libraries: list[Path], portable: Portable) -> None:
    """Raise SetupError if a library needs a newer glibc than the wheel's name promises, or has the wrong companions."""
    newest = tuple(map(int, portable.glibc.split(".")))
    for library in libraries:
        content = library.read_bytes()
        names = re.findall(rb"GLIBC_(\d+(?:\.\d+)+)\0", content)
        needed = max(tuple(map(int, name.split(b"."))) for name in names)
        if needed > newest:
            raise setup.SetupError(f"{library.name} needs glibc {'.'.join(map(str, needed))}")
        if foreign := re.findall(rb"lib(?:stdc\+\+|c\+\+|gomp|omp)\.so[.\d]*\0", content):
            raise setup.SetupError(f"{library.name} needs {foreign}")
        if b"_Unwind_" in content and UNWINDER.encode() not in content:
            raise setup.SetupError(f"{library.name} does not take its unwinder from {UNWINDER}")


def write_wheel(source: Path, libraries: list[Path], portable: Portable, target: Path) -> None:
    """Pack the package's Python files, the libraries and the metadata."""
    info = f"llama_cpp_python-{target.name.split('-')[1]}.dist-info"
    package = sorted(path for path in (source / "llama_cpp").rglob("*") if path.suffix in (".py", ".pyi", ".typed"))
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in package}
    files |= {f"llama_cpp/lib/{path.name}": path.read_bytes() for path in libraries}
    files[f"{info}/METADATA"] = (source / "PKG-INFO").read_bytes()
    files[f"{info}/licenses/LICENSE.md"] = (source / "LICENSE.md").read_bytes()
    files[f"{info}/licenses/llama.cpp/LICENSE"] = (source / "vendor" / "llama.cpp" / "LICENSE").read_bytes()
    about = ("Wheel-Version: 1.0", "Generator: ggufmoe", "Root-Is-Purelib: false", f"Tag: py3-none-{portable.tag}", "")
    files[f"{info}/WHEEL"] = "\n".join(about).encode()
    rows = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}\n")
    files[f"{info}/RECORD"] = ("".join(rows) + f"{info}/RECORD,,\n").encode()
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
    partial.replace(target)


# ---- testing


def test(pin: setup.Pin, wheel: Path) -> None:
    """Answer with the wheel's engine on this processor and on emulated ones; the texts and tokens must be the same."""
    if not wheel.exists():
        raise setup.SetupError(f"{wheel} is not there; run scripts/engine_wheel without --test-only")
    with tempfile.TemporaryDirectory(prefix="engine-wheel-test-") as scratch:
        unpacked = Path(scratch) / "engine"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        model = Path(scratch) / "demo.gguf"
        expected = answer(None, [], model)
        check_answer("the installed engine", expected, expected)
        check_answer("this processor", answer(unpacked, [], model), expected)
        qemu = os.environ.get("QEMU") or shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
        if qemu is None:
            raise setup.SetupError("qemu-x86_64 is not on PATH (Debian: qemu-user-static), and QEMU does not name it")
        probe = write_probe_model(Path(scratch) / "probe.gguf")
        for processor, backend in EXPECTED_BACKEND.items():
            emulator = [qemu, "-cpu", processor]
            if processor == PLAINEST:
                found = expected | answer(unpacked, emulator, probe, TOKENS)
            else:
                found = answer(unpacked, emulator, model)
            check_answer(processor, found, expected)
            if found["backend"] != backend:
                raise setup.SetupError(f"on {processor} the backend {found['backend']} was loaded, not {backend}")


LOADED = """
import json, pathlib, re, sys
def backend():
    maps = pathlib.Path("/proc/self/maps").read_text()
    return ", ".join(sorted(set(re.findall(r"libggml-cpu-?(\\w*)\\.so", maps))))
"""
ANSWER = """
from ggufmoe import Chat, ContextOptions, Engine, OffloadOptions, SamplingOptions, convert
from ggufmoe.demo import RECIPE, questions
from ggufmoe.evaluation.probe import probe_answer
from ggufmoe.native import library, rpc_calls
model, answers = pathlib.Path(sys.argv[1]), []
if not model.exists():
    convert(RECIPE, model, "Q4_K_M")
with Engine(model, ContextOptions(n_ctx=512)) as engine:
    chat = Chat(engine, sampling=SamplingOptions(temperature=0, n_predict=64))
    for question in questions():
        chat.reset()
        answers.append("".join(event.text for event in chat.send(question.text)))
print(json.dumps({"answers": answers, "tokens": probe_answer(OffloadOptions()), "rpc": rpc_calls.has_rpc(),
    "backend": backend(), "package": library.engine_version().package, "path": str(library.found_library().path)}))
"""
"""Runs in a process of its own, on an emulated processor too: what the engine answers, and what it consists of."""
TOKENS = """
import ctypes
from ggufmoe.native import lookup
from ggufmoe.native.llama_api import LlamaApi, llama_log_callback
path = pathlib.Path(sys.argv[2])
library = ctypes.CDLL(str(path))
lookup.load_backends(library, path.parent)
lookup.check_interface(library)
api = LlamaApi(library)
quiet = llama_log_callback(lambda *_: None)
api.llama_log_set(quiet, None)
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
parameters = api.llama_context_default_params()
parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 256, 1, 1
context = api.llama_init_from_model(model, parameters)
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
prompt, tokens = json.loads(sys.argv[3]), []
while len(tokens) < 20:
    array = (ctypes.c_int32 * len(prompt))(*prompt)
    assert api.llama_decode(context, api.llama_batch_get_one(array, len(prompt))) == 0
    logits = api.llama_get_logits(context)[:n_vocab]
    prompt = [logits.index(max(logits))]
    tokens += prompt
print(json.dumps({"tokens": tokens, "backend": backend(), "path": str(path)}))
"""
"""The same without numpy: the tokens after the prompt of the tiny model."""


def answer(engine: Path | None, emulator: list[str], model: Path, code: str = ANSWER) -> dict[str, Any]:
    """What the engine in the folder ``engine`` answers, or the installed one, in a Python that ``emulator`` runs."""
    started = time.monotonic()
    paths = [str(path) for path in (engine, ROOT) if path is not None]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    library = str(engine and engine / "llama_cpp" / "lib" / "libllama.so")
    command = [*emulator, sys.executable, "-c", LOADED + code, str(model), library, json.dumps(PROBE_PROMPT)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise setup.SetupError(f"{' '.join(emulator) or 'this processor'}: python ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if engine is not None and not found["path"].startswith(str(engine)):
        raise setup.SetupError(f"the engine was loaded from {found['path']}, not from {engine}")
    return found | {"seconds": time.monotonic() - started}


def check_answer(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Say what was found. Raises SetupError for other answers, tokens or features than expected."""
    setup.say(f"{name}: backend {found['backend'] or 'built in'}, {found['seconds']:.0f} s")
    for key in ("answers", "tokens", "rpc", "package"):
        if found[key] != expected[key]:
            raise setup.SetupError(f"{name}: {key} {found[key]}, expected {expected[key]}")


if __name__ == "__main__":
    sys.exit(main())
