"""Put the pinned engine and this project into the environment that runs this file; check that it is that engine.

Owns the engine's build and its cache: one wheel for each version, flavour and kind of processor, in the user's cache
directory, because compiling takes minutes and pip's own cache does not look at CMAKE_ARGS. ``scripts/setup`` calls
this with the Python of ``.venv``; it needs nothing but the standard library and pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIN_FILE = ROOT / "vendor" / "llama.cpp.toml"
STAMP = Path(sys.prefix) / "ggufmoe-stamp"
ENGINE_STAMP = Path(sys.prefix) / "ggufmoe-engine-stamp"
"""Names the build of the engine that was installed into this environment."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


class SetupError(Exception):
    """The environment cannot be made; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Pin:
    """The engine as ``vendor/llama.cpp.toml`` fixes it, in one flavour."""

    version: str
    commit: str
    flavour: str
    cmake_args: str
    symbol: str
    """Exported by a build of this flavour only."""
    abi: dict[str, Any]
    compiler_flags: str = ""
    """For the C and C++ compilers on this processor, besides what the environment gives."""
    core_minutes: int | None = None
    """Minutes that one core takes to compile it; None if nobody has measured it."""

    @property
    def requirement(self) -> str:
        return f"llama-cpp-python=={self.version}"


def say(message: str) -> None:
    print(f"set-up: {message}", file=sys.stderr, flush=True)


def read_pin(path: Path, flavour: str | None) -> Pin:
    """The pin in one flavour; None means the file's default."""
    table = _parse_toml(path.read_text(encoding="utf-8"))
    engine = table["engine"]
    name = flavour or engine["default_flavour"]
    if name not in table["flavours"]:
        raise SetupError(f"GGUFMOE_ENGINE={name} is no flavour of {path.name}; it has {', '.join(table['flavours'])}")
    chosen = table["flavours"][name]
    amx = table["amx"]
    return Pin(
        engine["version"],
        engine["llama_cpp_commit"],
        name,
        chosen["cmake_args"],
        chosen["symbol"],
        table["abi"],
        amx["compiler_flags"] if amx["processor_flag"] in processor().split() else "",
        chosen.get("core_minutes"),
    )


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    return tomllib.loads(text)


def cache_directory() -> Path:
    """Where things that are slow to make are kept between checkouts."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "ggufmoe"


def processor() -> str:
    """A description of this processor that changes when compiled code might no longer run on it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("flags", "Features", "model name", "CPU part", "isa")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout
    return platform.processor()


def engine_cache(pin: Pin) -> Path:
    """The directory that holds the wheel of this engine for this machine."""
    told = f"{pin.cmake_args}\n{os.environ.get('CMAKE_ARGS', '')}\n{processor()}"
    if pin.compiler_flags:
        told += f"\n{pin.compiler_flags}"
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    machine = f"{platform.system()}-{platform.machine()}".lower()
    return cache_directory() / "engine" / f"{pin.version}-{pin.flavour}-{machine}-{digest}"


def stamp(pin: Pin) -> str:
    """What this environment was made from; when it is unchanged there is nothing to do."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", PIN_FILE, Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(f"{ROOT}\n{pin.flavour}\n{engine_name(pin)}\n{sys.version}".encode())
    return digest.hexdigest()


def given_wheel(pin: Pin) -> Path | None:
    """The wheel of the engine that is there already, so that nothing is compiled.

    That is the file which GGUFMOE_ENGINE_WHEEL names, or one in ``wheels/`` that fits this machine, unless a flavour
    is asked for. Raises SetupError if the named file is not there.
    """
    named = os.environ.get("GGUFMOE_ENGINE_WHEEL")
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise SetupError(f"GGUFMOE_ENGINE_WHEEL={named} is no file")
        return path
    if os.environ.get("GGUFMOE_ENGINE"):
        return None
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import parse_wheel_filename

    fitting = set(sys_tags())
    for path in sorted((ROOT / "wheels").glob(f"llama_cpp_python-{pin.version}-*.whl")):
        if fitting & parse_wheel_filename(path.name)[3]:
            return path
    return None


def engine_name(pin: Pin) -> str:
    """What names the build of the engine that is to be installed: the given wheel, or the place in the cache."""
    wheel = given_wheel(pin)
    if wheel is None:
        return engine_cache(pin).name
    return f"{wheel.name} {hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]}"


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pip of this environment, quietly; its output is shown when it fails."""
    command = [*PIP, *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SetupError(f"pip {' '.join(arguments)} failed:\n{done.stdout[-6000:]}")


_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
"""How ninja, and make in CMake's words, count what they compile."""
_SAY_EVERY_S = 15.0


def pip_showing_progress(*arguments: str, env: dict[str, str]) -> None:
    """Run pip, and say how far the compiler is; its whole output is shown when it fails."""
    command = [*PIP, *arguments, "-v"]
    lines: deque[str] = deque(maxlen=200)
    started = said = time.monotonic()
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            step, now = _STEP.search(line), time.monotonic()
            if step and (now - said >= _SAY_EVERY_S or step[1] == step[2]):
                say(f"{step[1]} of {step[2]} steps, {now - started:.0f} s")
                said = now
    if process.returncode:
        raise SetupError(f"pip {' '.join(arguments)} failed:\n{''.join(lines)[-6000:]}")


def compile_time(pin: Pin) -> str:
    """About how long compiling takes on this machine, in words."""
    if pin.core_minutes is None:
        return "half an hour and more"
    return f"about {max(1, round(pin.core_minutes / (os.cpu_count() or 1)))} minutes on this machine"


def check_tools() -> None:
    """What compiling the engine needs, before minutes are spent."""
    if shutil.which("cmake") is None:
        raise SetupError("cmake is not on PATH; install cmake 3.21 or later (apt, dnf, brew or winget install cmake)")
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    if sys.platform != "win32" and not any(name and shutil.which(name.split()[0]) for name in compilers):
        raise SetupError(
            "no C++ compiler is on PATH; install g++ or clang (apt install g++, or xcode-select --install)"
        )


def build_wheel(pin: Pin, target: Path) -> Path:
    """Compile the engine and keep its wheel in ``target``; gives the wheel."""
    check_tools()
    say(f"compiling llama.cpp (llama-cpp-python {pin.version}, flavour {pin.flavour}): {compile_time(pin)}, once")
    say("a wheel of the engine in GGUFMOE_ENGINE_WHEEL or wheels/ would be installed instead (vendor/README.md)")
    target.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("CMAKE_ARGS", "")
    env = os.environ | {"CMAKE_ARGS": f"{given} {pin.cmake_args}".strip(), "FORCE_CMAKE": "1"}
    if pin.compiler_flags:  # CMake adds these to its own flags
        env |= {name: f"{os.environ.get(name, '')} {pin.compiler_flags}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        pip_showing_progress(
            "wheel", "--no-deps", "--no-cache-dir", "--no-binary=llama-cpp-python", "-w", scratch, pin.requirement,
            env=env,
        )  # fmt: skip
        built = next(Path(scratch).glob("llama_cpp_python-*.whl"))
        kept = target / built.name
        os.replace(built, kept)
    say(f"compiled in {time.monotonic() - started:.0f} s, kept in {target}")
    return kept


def llama_cpp_sources(pin: Pin) -> Path:
    """The directory of llama.cpp's sources at the pin; fetched when the cache has none."""
    kept = cache_directory() / "sources" / f"llama_cpp_python-{pin.version}"
    sources = kept / "vendor" / "llama.cpp"
    if (sources / "convert_hf_to_gguf.py").is_file():
        return sources
    say(f"fetching the sources of llama-cpp-python {pin.version}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        pip("download", "--no-deps", "--no-binary=:all:", "-d", scratch, pin.requirement)
        archive = next(Path(scratch).glob("*.tar.gz"))
        with tarfile.open(archive) as packed:
            _extract(packed, Path(scratch))
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(Path(scratch) / archive.name.removesuffix(".tar.gz"), kept)
    return sources


def _extract(packed: tarfile.TarFile, target: Path) -> None:
    # the safe filter came with Python 3.12 and late patches of 3.10 and 3.11
    if hasattr(tarfile, "data_filter"):
        packed.extractall(target, filter="data")
    else:
        packed.extractall(target)


def cached_wheel(pin: Pin) -> Path | None:
    return next(iter(sorted(engine_cache(pin).glob("llama_cpp_python-*.whl"))), None)


CHECK = """
import ctypes, importlib.metadata, json, pathlib, sys
from llama_cpp import llama_cpp
abi, faults, libraries = json.loads(sys.argv[1]), [], [llama_cpp._lib]
beside = pathlib.Path(llama_cpp.__file__).parent / "lib"
if sys.platform == "win32":  # there a library does not show what it imports from others
    libraries += [ctypes.CDLL(str(path)) for path in beside.glob("ggml*.dll")]
elif not hasattr(llama_cpp._lib, "ggml_backend_rpc_add_server"):  # backends that are loaded when they are needed
    libraries += [ctypes.CDLL(str(path)) for path in beside.glob("libggml-rpc.so")]
def find(name):
    return next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
def expect(what, found, wanted):
    if found != wanted:
        faults.append(f"{what} is {found}, expected {wanted}")
expect("version", importlib.metadata.version("llama-cpp-python"), abi["version"])
missing = [name for name in abi["symbols"] if find(name) is None]
faults += [f"{name} is not exported" for name in missing]
for name, size in abi["struct_bytes"].items():
    expect(f"size of {name}", ctypes.sizeof(getattr(llama_cpp, name)), size)
if not missing:
    ggml_commit, block_size, type_size = map(find, ("ggml_commit", "ggml_blck_size", "ggml_type_size"))
    ggml_commit.restype, block_size.restype, type_size.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    commit = ggml_commit().decode().split("-")[0]
    if commit != "unknown" and not abi["commit"].startswith(commit):
        faults.append(f"llama.cpp commit is {commit}, expected {abi['commit']}")
    for name, (number, block, size) in abi["tensor_types"].items():
        expect(f"block of {name}", [block_size(number), type_size(number)], [block, size])
print("; ".join(faults))
"""
"""Runs in a process of its own: a broken library may end it."""


def engine_faults(pin: Pin) -> str:
    """How the installed engine differs from the pin; empty when it is the one."""
    expected = pin.abi | {"version": pin.version, "commit": pin.commit}
    expected["symbols"] = [*pin.abi["symbols"], "ggml_blck_size", "ggml_commit", "ggml_type_size", pin.symbol]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(expected)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"python ended with {done.returncode}"])[-1]
    return done.stdout.strip()


def was_built_here(pin: Pin) -> bool:
    """Whether the installed engine is the build that this pin makes on this processor, its compiler flags included."""
    return ENGINE_STAMP.exists() and ENGINE_STAMP.read_text(encoding="utf-8") == engine_name(pin)


def install_engine(pin: Pin) -> None:
    """Install the pinned engine: from a wheel that is given, else from the cache, else after compiling it.

    A cached wheel that turns out to be another one is built again, once. Raises SetupError for a given one.
    """
    wheel = given_wheel(pin)
    if wheel is not None:
        say(f"installing the engine from {wheel}")
        pip("install", "--no-cache-dir", "--force-reinstall", "--no-deps", str(wheel))
        if faults := engine_faults(pin):
            raise SetupError(f"{wheel} is not the pinned engine ({faults}); take it away to have the engine compiled")
        return
    wheel = cached_wheel(pin)
    if wheel is not None:
        say(f"installing the engine that was compiled before ({wheel.parent})")
        pip("install", "--force-reinstall", "--no-deps", str(wheel))
        if not (faults := engine_faults(pin)):
            return
        say(f"that is not the pinned engine ({faults}): compiling it again")
        wheel.unlink()
    wheel = build_wheel(pin, engine_cache(pin))
    pip("install", "--no-cache-dir", "--force-reinstall", "--no-deps", str(wheel))
    if faults := engine_faults(pin):
        raise SetupError(f"the engine that was compiled is not the pinned one: {faults}")


def install() -> None:
    """Bring the environment up to date with pyproject.toml and the pin."""
    if sys.prefix == sys.base_prefix:
        raise SetupError(f"{sys.executable} belongs to no virtual environment; run scripts/setup, which makes one")
    pin = read_pin(PIN_FILE, os.environ.get("GGUFMOE_ENGINE"))
    wanted = stamp(pin)
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    STAMP.unlink(missing_ok=True)
    say("installing what the engine needs")
    pip("install", "diskcache", "jinja2", "numpy", "typing-extensions")
    if engine_faults(pin) or not was_built_here(pin):
        install_engine(pin)
        ENGINE_STAMP.write_text(engine_name(pin), encoding="utf-8")
    say(f"engine: llama-cpp-python {pin.version}, {engine_name(pin)}, checked")
    say("installing ggufmoe and what its tests need")
    pip("install", "-e", f"{ROOT}[dev]")
    if faults := engine_faults(pin):
        raise SetupError(f"installing ggufmoe changed the engine: {faults}")
    STAMP.write_text(wanted, encoding="utf-8")
    say(f"ready: {Path(sys.prefix)}")


def engine_wheel() -> Path:
    """The wheel of the engine that is pinned: one that is given, else one that is compiled if need be."""
    pin = read_pin(PIN_FILE, os.environ.get("GGUFMOE_ENGINE"))
    return given_wheel(pin) or cached_wheel(pin) or build_wheel(pin, engine_cache(pin))


def main() -> int:
    """Install, or print where the engine's wheel is; an error is one message and exit code 1."""
    try:
        if sys.argv[1:] == ["--engine-wheel"]:
            print(engine_wheel())
        else:
            install()
    except SetupError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
