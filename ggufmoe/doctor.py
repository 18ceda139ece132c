"""Checks whether everything that ggufmoe needs works on this machine: software, folders, engine, quantization kernels.

Each check gives a Finding that says what to do if something is wrong. The engine and the kernels are checked in child
processes, because native code that does not fit the machine can end its process.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ggufmoe.errors import GgufmoeError, one_line
from ggufmoe.folders import cache_directory
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ALL_LAYERS, OffloadOptions
from ggufmoe.sizes import counted, file_size, memory_size
from ggufmoe.version import __version__

if TYPE_CHECKING:
    from ggufmoe.native import backends, lookup
    from ggufmoe.native import library as native
    from ggufmoe.quant.kernels import KernelReport

Status = Literal["ok", "note", "wrong"]
TOPICS = ("software", "folders", "engine", "kernels")

_SLOWER = "quantizing goes through ggml's routines, which takes longer"
_PACKAGES = {"numpy": "", "llvmlite": _SLOWER} | dict.fromkeys(
    ("gguf", "safetensors", "sentencepiece", "tokenizers", "jinja2", "pydantic"), ""
)
"""Package name to the effect of its absence if the package is optional, else an empty text."""
_TEMPORARY = "temporary"
_TIMEOUT_S = 120
_MAX_CHARS = 500
"""Longest text of a finding, which is a cell of a table."""
_N_PARTS = 2
"""Number of child processes that check the kernels in parallel."""
_CHILD = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from ggufmoe.doctor import answer; answer()"


@dataclass(frozen=True)
class Finding:
    """One line of the report: the result of one check.

    ``way_out`` says what to do; it is set if ``status`` is ``wrong`` and may be set for ``note``. ``data`` holds the
    facts of the text as plain values for JSON.
    """

    topic: str
    name: str
    status: Status
    text: str
    way_out: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain values for JSON."""
        return asdict(self)


def examine(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Run all checks and yield their findings in the order of TOPICS, each as soon as it is known; takes a few seconds.

    ``folders`` maps the purpose of each further folder that must be writable to its path. Starts child processes,
    which are ended when the iterator ends or is closed.
    """
    questions = [["engine"], *(["kernels", str(part)] for part in range(_N_PARTS))]
    with ExitStack() as stack:
        children = [stack.enter_context(_child(question)) for question in questions]
        yield from check_software()
        yield from check_folders({**default_folders(), **folders})
        yield from _answers(children[0], "engine")
        kernels = [finding for child in children[1:] for finding in _answers(child, "kernels")]
        unique = [finding for i, finding in enumerate(kernels) if finding not in kernels[:i]]  # both may fail alike
        order = {name: i for i, name in enumerate(GGMLType.__members__)}
        yield from sorted(unique, key=lambda finding: order.get(finding.name, len(order)))


# ---- software and folders


def check_software(packages: Mapping[str, str] = _PACKAGES) -> Iterator[Finding]:
    """Check that packages are installed, and report their versions and that of Python.

    ``packages`` maps each name to the effect of its absence if the package is optional, else to an empty text.
    """
    machine = f"{platform.system()} {platform.release()} on {platform.machine()}"
    text = f"ggufmoe {__version__}, Python {platform.python_version()}, {machine}"
    yield Finding("software", "program", "ok", text, data={"ggufmoe": __version__, "python": sys.version})
    found = {name: _version(name) for name in packages}
    there = {name: number for name, number in found.items() if number}
    yield Finding("software", "packages", "ok", ", ".join(f"{n} {v}" for n, v in there.items()), data=there)
    for name, without in packages.items():
        if name not in there:
            text = f"not installed: {without}" if without else "not installed"
            yield Finding("software", name, "note" if without else "wrong", text, f"pip install {name}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def default_folders() -> dict[str, Path]:
    """Purpose to path of the folders for files of the Hugging Face Hub, temporary files and compiled kernels."""
    from huggingface_hub import constants

    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # Python can write to none of the folders that it tries
        temporary = Path("/tmp")
    found = {"hub models": Path(constants.HF_HUB_CACHE), _TEMPORARY: temporary}
    kept = cache_directory()
    return found if kept is None else found | {"compiled kernels": kept / "kernels"}


def check_folders(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Check that folders, given by purpose, are writable or can be created, and report their free space."""
    for use, folder in folders.items():
        there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path(folder.anchor))
        data = {"path": str(folder), "exists": folder.exists()}
        if there.is_dir() and os.access(there, os.W_OK):
            free_bytes = shutil.disk_usage(there).free
            text = f"{folder}{'' if data['exists'] else ' (not there yet)'}, {file_size(free_bytes)} free"
            yield Finding("folders", use, "ok", text, data=data | {"free_bytes": free_bytes})
        else:
            status: Status = "wrong" if use == _TEMPORARY else "note"
            way_out = f"make {there} a writable folder{', or set TMPDIR' if use == _TEMPORARY else ''}"
            yield Finding("folders", use, status, f"{folder}: not writable", way_out, data)


# ---- the engine


def check_engine() -> Iterator[Finding]:
    """Check which engine is used, its version, build and devices, and what it computes on them."""
    from ggufmoe.native import backends, rpc_calls
    from ggufmoe.native import library as native

    yield from judge_lookup(native.engine_lookup())
    if not native.has_engine():
        return
    yield judge_version(native.engine_version())
    yield Finding("engine", "built for", "ok", flags_text(native.build_flags()), data={"flags": native.build_flags()})
    yield judge_rpc(rpc_calls.has_rpc())
    yield from judge_amx(backends.has_broken_amx())
    devices = backends.devices()
    for device in devices:
        yield _about_device(device)
    yield check_answer("CPU answer", 0)
    if any(device.type in (backends.DeviceType.GPU, backends.DeviceType.IGPU) for device in devices):
        yield check_answer("GPU answer", ALL_LAYERS)


def judge_lookup(looked_up: lookup.Lookup) -> Iterator[Finding]:
    """Findings for the engine that is used, and for each that was refused; without any, models cannot be run."""
    for refusal in looked_up.refused:
        text = one_line(f"{refusal.origin} is not used: {refusal.reason}", _MAX_CHARS)
        status: Status = "note" if looked_up.found else "wrong"
        yield Finding("engine", "refused", status, text, reinstall(), asdict(refusal))
    if looked_up.found is not None:
        found = looked_up.found
        text = f"{found.origin}, {found.path}"
        yield Finding("engine", "in use", "ok", text, data={"origin": found.origin, "path": str(found.path)})
    elif not looked_up.refused:
        from ggufmoe.native.library import INSTALL

        text = "none: converts and quantizes, to types that have kernels, and cannot run models"
        yield Finding("engine", "in use", "note", text, INSTALL, {"origin": None})


def judge_version(found: native.EngineVersion) -> Finding:
    """The finding for an engine of this version.

    Ok if it is the pinned one, a note if it is another package's and has the pinned interface, else wrong.
    """
    from ggufmoe.native.library import PINNED_ENGINE as pin  # noqa: N811

    data = {"found": asdict(found), "pinned": asdict(pin)}
    if not found.package[:1].isdigit():
        text = f"llama.cpp {found.llama_cpp_commit}, ggml {found.ggml}: not the pinned one, and of the same interface"
        return Finding("engine", "version", "note", text, data=data)
    text = f"llama-cpp-python {found.package}, llama.cpp {found.llama_cpp_commit}, ggml {found.ggml}"
    if found.is_pinned:
        return Finding("engine", "version", "ok", f"{text}: the pinned ones", data=data)
    expected = f"llama-cpp-python {pin.package}, llama.cpp {pin.llama_cpp_commit[:7]}, ggml {pin.ggml}"
    return Finding("engine", "version", "wrong", f"{text}; expected {expected}", reinstall(), data)


def flags_text(flags: str) -> str:
    """llama.cpp's line of build flags in a shorter form: ``CPU: AVX2 FMA; CUDA: ARCHS=890``."""
    parts: list[str] = []
    for piece in filter(None, (piece.strip() for piece in flags.split("|"))):
        backend, _, flag = piece.rpartition(" : ")
        name, _, value = flag.partition(" = ")
        shown = name if value in ("", "1") else f"{name}={value}"
        parts.append(f"; {backend}: {shown}" if backend else f" {shown}")
    return "".join(parts).strip("; ") or "nothing in particular"


def judge_rpc(has_rpc: bool) -> Finding:
    """The finding for whether the engine is built with RPC, which workers on other machines need."""
    if has_rpc:
        return Finding("engine", "workers", "ok", "can use other machines (RPC)", data={"rpc": True})
    text = "cannot use other machines: built without RPC"
    return Finding("engine", "workers", "note", text, reinstall(), {"rpc": False})


def judge_amx(is_broken: bool) -> Iterator[Finding]:
    """A finding if the engine is built with AMX code that crashes; none otherwise."""
    if is_broken:
        text = "compiled with AMX, whose code in llama.cpp crashes: weights are not rearranged, which is slower"
        yield Finding("engine", "AMX", "note", text, reinstall(), {"amx": True})


def _about_device(device: backends.Device) -> Finding:
    from ggufmoe.native import backends

    facts = backends.device_facts(device)
    data: dict[str, Any] = {"type": device.type.name, "backend": device.backend, "description": facts.description}
    data |= {"free_bytes": facts.free_bytes, "total_bytes": facts.total_bytes}
    memory = memory_size(facts.total_bytes)
    if device.type is not backends.DeviceType.CPU:  # ggml reports all memory of a CPU as free
        memory += f", {memory_size(facts.free_bytes)} free"
    text = f"{facts.description or device.backend} ({device.type.name}), {memory}"
    return Finding("engine", f"device {device.name}", "ok", text, data=data)


def check_answer(name: str, n_gpu_layers: int) -> Finding:
    """Run a fixed tiny model and compare its tokens with the known answer; ``name`` is the name of the finding."""
    from ggufmoe.evaluation.probe import probe_answer

    start = time.perf_counter()
    try:
        found = probe_answer(OffloadOptions(n_gpu_layers=n_gpu_layers))
    except (GgufmoeError, OSError) as error:
        text = one_line(f"a tiny model cannot be run: {error}", _MAX_CHARS)
        return Finding("engine", name, "wrong", text, _way_to_answers(n_gpu_layers))
    return judge_answer(name, n_gpu_layers, found, time.perf_counter() - start)


def judge_answer(name: str, n_gpu_layers: int, found: tuple[int, ...], elapsed_s: float) -> Finding:
    """The finding for the tokens that the tiny model generated: ok if they equal PROBE_ANSWER, else wrong."""
    from ggufmoe.evaluation.probe import PROBE_ANSWER

    n_expected = len(PROBE_ANSWER)
    data = {"tokens": list(found), "expected": list(PROBE_ANSWER), "seconds": round(elapsed_s, 3)}
    if found == PROBE_ANSWER:
        text = f"a tiny model generates the {n_expected} expected tokens ({elapsed_s:.1f} s)"
        return Finding("engine", name, "ok", text, data=data)
    n_same = next((i for i, token in enumerate(PROBE_ANSWER) if found[i : i + 1] != (token,)), n_expected)
    text = f"a tiny model generates {n_same} of {n_expected} expected tokens, then others: results here are wrong"
    return Finding("engine", name, "wrong", text, _way_to_answers(n_gpu_layers), data)


def _way_to_answers(n_gpu_layers: int) -> str:
    if n_gpu_layers:
        return "update the GPU's driver, or run models with -ngl 0"
    return f"compile the engine on this machine: {reinstall()}"


def reinstall() -> str:
    """The command that installs the pinned engine again."""
    from ggufmoe.native.library import PINNED_ENGINE

    pip = "pip install --no-cache-dir --force-reinstall --no-deps --no-binary llama-cpp-python"
    return f"{pip} llama-cpp-python=={PINNED_ENGINE.package}, with the variables of vendor/README.md"


# ---- workers on other machines


def check_workers(workers: Sequence[tuple[str, int]]) -> Iterator[Finding]:
    """Check that workers, given as host and port, answer, and report their devices. Takes a few seconds at most."""
    from ggufmoe.errors import WorkerError
    from ggufmoe.remote.rpc import find_workers

    for host, port in workers:
        name = f"{host}:{port}"
        try:
            devices = find_workers([(host, port)])
        except WorkerError as error:
            text, _, way_out = one_line(error, _MAX_CHARS).partition("; ")
            way_out = way_out or "check that 'ggufmoe worker' runs there and that no firewall blocks the port"
            yield Finding("workers", name, "wrong", text, way_out)
            continue
        memory = ", ".join(f"{memory_size(d.total_bytes)}, {memory_size(d.free_bytes)} free" for d in devices)
        data = {"devices": [asdict(device) for device in devices]}
        yield Finding("workers", name, "ok", f"answers: {counted(len(devices), 'device')} with {memory}", data=data)


# ---- the kernels


def check_kernels(part: int) -> Iterator[Finding]:
    """Compile or load every second kernel, from ``part`` on, for bfloat16 weights, and check it on a tile.

    Part 0 also reports the types that ggml's routines quantize.
    """
    from ggufmoe.native import library as native
    from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, FileType
    from ggufmoe.quant.kernels import has_kernel, prepare

    ours = [kind for kind in GGMLType if has_kernel(kind)]
    for kind in ours[part::_N_PARTS]:
        if (report := prepare(kind, "uint16", weighted=kind in ABORTS_WITHOUT_IMATRIX)) is not None:
            yield judge_kernel(report)
    if part == 0:
        used = {file_type.default_type for file_type in FileType if file_type.default_type.is_quantized}
        names = [kind.name for kind in GGMLType if kind in used.difference(ours)]
        status: Status = "ok" if native.has_engine() else "note"
        text = f"{'ggml' if native.has_engine() else 'only with an engine'}: {', '.join(names)}"
        yield Finding("kernels", "others", status, text, data={"types": names})


def judge_kernel(report: KernelReport) -> Finding:
    """The finding for a format: ok if its kernel is used, else a note with the reason for using ggml's routine."""
    name, data = report.type.name, {"routine": report.routine, "reason": report.reason}
    if report.routine == "fast":
        text = f"fast: {report.reason} ({report.compile_s:.1f} s)"
        return Finding("kernels", name, "ok", text, data=data | {"compile_s": round(report.compile_s, 3)})
    text = one_line(f"ggml, slower: {report.reason}", _MAX_CHARS)
    way_out = "pip install --upgrade llvmlite" if report.reason.startswith("no kernel") else ""
    return Finding("kernels", name, "note", text, way_out, data)


# ---- processes


@contextmanager
def _child(question: Sequence[str], code: str = _CHILD) -> Iterator[subprocess.Popen[str]]:
    """A Python process with the import path of this one that answers ``question``; killed when the context ends."""
    command = [sys.executable, "-c", code, os.pathsep.join(sys.path), *question]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def answer() -> None:
    """In a child process: run the checks named in ``sys.argv`` and print their findings as one line of JSON."""
    topic, *part = sys.argv[2:]
    findings: list[Finding] = []
    try:
        findings += check_engine() if topic == "engine" else check_kernels(int(part[0]))
    except GgufmoeError as error:
        findings.append(Finding(topic, "engine", "wrong", one_line(error, _MAX_CHARS), reinstall()))
    print(json.dumps([finding.to_dict() for finding in findings]))


def _answers(child: subprocess.Popen[str], topic: str, timeout_s: float = _TIMEOUT_S) -> list[Finding]:
    try:
        out, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        text = f"has not ended after {timeout_s:.0f} s"
        return [Finding(topic, "check", "wrong", text, "try again when the machine is less busy")]
    if child.returncode:
        return [judge_end(topic, child.returncode, errors)]
    return [Finding(**found) for found in json.loads(out.strip().splitlines()[-1])]


def judge_end(topic: str, code: int, errors: str) -> Finding:
    """The finding for a child process that ended with exit code ``code`` before it answered; ``errors``: its stderr."""
    last = (errors.strip().splitlines() or ["no reason given"])[-1]
    crashed = code < 0 or code > 255  # by a signal, or by an exception of Windows
    names = {number.value: number.name for number in signal.Signals}
    how = f"crashed ({names.get(-code, hex(code & 0xFFFFFFFF))})" if crashed else f"ended with exit code {code}"
    way_out = "install the packages that are missing; otherwise this is a defect of ggufmoe"
    if crashed:
        way_out = f"compile the engine on this machine: {reinstall()}"
        way_out = "if the engine works, convert with --quantizer ggml" if topic == "kernels" else way_out
    return Finding(topic, "check", "wrong", one_line(f"{how}: {last}", _MAX_CHARS), way_out)
