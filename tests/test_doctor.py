"""What the doctor finds: a sound machine, and each way in which one can be unwell."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ggufmoe import doctor
from ggufmoe.doctor import Finding
from ggufmoe.evaluation.probe import PROBE_ANSWER
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import library as native
from ggufmoe.options import OffloadOptions
from ggufmoe.quant.kernels import KernelReport, has_kernel
from tests.remote.workers import pretender, speak_version, talk_garbage

ROOT = Path(__file__).resolve().parents[1]


def one_line(finding: Finding) -> bool:
    return all("\n" not in text and text.strip() == text for text in (finding.text, finding.way_out))


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    return list(doctor.examine({"notes": tmp_path_factory.mktemp("notes")}))


def test_this_machine_is_well(findings: list[Finding]) -> None:
    assert [finding for finding in findings if finding.status == "wrong"] == []
    assert list(dict.fromkeys(finding.topic for finding in findings)) == list(doctor.TOPICS)
    names = [finding.name for finding in findings]
    assert {"packages", "hub models", "temporary", "notes", "version", "workers", "device CPU"} < set(names)
    assert all(one_line(finding) for finding in findings)


def test_findings_are_plain_data(findings: list[Finding]) -> None:
    assert [Finding(**found) for found in json.loads(json.dumps([f.to_dict() for f in findings]))] == findings


def test_each_kernel_is_listed_once_with_what_it_did(findings: list[Finding]) -> None:
    kernels = {finding.name: finding for finding in findings if finding.topic == "kernels"}
    listed = [finding.name for finding in findings if finding.topic == "kernels"]
    assert listed == [kind.name for kind in GGMLType if kind.name in kernels] + ["others"]
    assert set(listed) == {kind.name for kind in GGMLType if has_kernel(kind)} | {"others"}
    assert {finding.data["routine"] for name, finding in kernels.items() if name != "others"} <= {"fast", "ggml"}
    assert kernels["others"].data["types"] == ["TQ1_0", "TQ2_0", "MXFP4", "Q1_0", "Q2_0"]
    assert "Q8_1" not in kernels["others"].text


def test_the_answer_on_the_cpu_is_the_stored_one(findings: list[Finding]) -> None:
    found = next(finding for finding in findings if finding.name == "CPU answer")
    assert found.data["tokens"] == found.data["expected"] == list(PROBE_ANSWER)


def test_checks_give_here_what_children_give(findings: list[Finding]) -> None:
    engine = [finding.name for finding in findings if finding.topic == "engine"]
    assert [finding.name for finding in doctor.check_engine()] == engine


# ---- the engine


def test_the_pin_is_vendors() -> None:
    spec = importlib.util.spec_from_file_location("setup_for_doctor", ROOT / "scripts" / "setup_environment.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup
    spec.loader.exec_module(setup)
    engine = setup._parse_toml((ROOT / "vendor" / "llama.cpp.toml").read_text(encoding="utf-8"))["engine"]
    pin = native.PINNED_ENGINE
    assert (pin.package, pin.llama_cpp_commit, pin.ggml) == (
        engine["version"],
        engine["llama_cpp_commit"],
        engine["ggml_version"],
    )


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"llama_cpp_commit": "unknown"}, "ok"),
        ({"llama_cpp_commit": native.PINNED_ENGINE.llama_cpp_commit[:7] + "-dirty"}, "ok"),
        ({"llama_cpp_commit": "1234567"}, "wrong"),
        ({"llama_cpp_commit": ""}, "wrong"),
        ({"package": "0.3.35"}, "wrong"),
        ({"ggml": "0.24.0"}, "wrong"),
    ],
)
def test_another_engine_is_wrong(change: dict[str, str], status: str) -> None:
    found = doctor.judge_version(replace(native.PINNED_ENGINE, **change))
    assert found.status == status
    if status == "wrong":
        assert next(iter(change.values())) in found.text
        assert "expected llama-cpp-python 0.3.36, llama.cpp 0c1e570, ggml 0.25.3" in found.text
        assert "llama-cpp-python==0.3.36" in found.way_out


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("CPU : AVX2 = 1 | FMA = 1 | ", "CPU: AVX2 FMA"),
        ("CUDA : ARCHS = 890,900 | GRAPHS = 1 | CPU : NEON = 1 | ", "CUDA: ARCHS=890,900 GRAPHS; CPU: NEON"),
        ("", "nothing in particular"),
    ],
)
def test_build_flags_are_shown_by_backend(flags: str, shown: str) -> None:
    assert doctor.flags_text(flags) == shown


def test_an_engine_without_rpc_is_noted() -> None:
    found = doctor.judge_rpc(False)
    assert (found.status, found.data) == ("note", {"rpc": False})
    assert "vendor/README.md" in found.way_out


def test_an_engine_with_amx_is_told_apart() -> None:
    assert list(doctor.judge_amx(False)) == []
    (found,) = doctor.judge_amx(True)
    assert found.status == "note"
    assert "vendor/README.md" in found.way_out


@pytest.mark.parametrize(
    ("tokens", "text"),
    [((*PROBE_ANSWER[:7], 9, 9), "generates 7 of 20 expected"), ((), " 0 of 20 "), (PROBE_ANSWER[:19], " 19 of 20 ")],
)
def test_another_answer_is_wrong(tokens: tuple[int, ...], text: str) -> None:
    found = doctor.judge_answer("CPU answer", 0, tokens, 0.1)
    assert found.status == "wrong"
    assert text in found.text
    assert "compile the engine on this machine" in found.way_out
    assert "-ngl 0" in doctor.judge_answer("GPU answer", -2, tokens, 0.1).way_out


def test_a_model_that_cannot_be_run_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    found = doctor.check_answer("CPU answer", 0)
    assert found.status == "wrong"
    assert "a tiny model cannot be run" in found.text


# ---- kernels


@pytest.mark.parametrize(
    ("reason", "way_out"),
    [
        ("no kernel could be compiled: No module named 'llvmlite'", "pip install --upgrade llvmlite"),
        ("a test tile's bytes are not those of ggml on x86-64", ""),
    ],
)
def test_a_kernel_that_is_not_used_is_noted_with_its_cause(reason: str, way_out: str) -> None:
    found = doctor.judge_kernel(KernelReport(GGMLType.Q4_K, "BF16", False, "ggml", reason, 0.1))
    assert (found.status, found.way_out, found.data["routine"]) == ("note", way_out, "ggml")
    assert reason in found.text


# ---- software and folders


def test_packages_that_are_missing_are_said() -> None:
    packages = {"numpy": "", "no-such-package": "", "llvmlite-that-is-not-there": "slower"}
    found = {finding.name: finding for finding in doctor.check_software(packages)}
    assert found["packages"].text.startswith("numpy ")
    assert (found["no-such-package"].status, found["no-such-package"].text) == ("wrong", "not installed")
    assert found["no-such-package"].way_out == "pip install no-such-package"
    optional = found["llvmlite-that-is-not-there"]
    assert (optional.status, optional.text) == ("note", "not installed: slower")


def test_folders_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folders = {"new": tmp_path / "a" / "b", "chats": file / "x", "temporary": file}
    found = {finding.name: finding for finding in doctor.check_folders(folders)}
    assert found["new"].status == "ok"
    assert " (not there yet), " in found["new"].text
    assert (found["chats"].status, found["temporary"].status) == ("note", "wrong")
    assert str(file) in found["chats"].way_out
    assert found["temporary"].way_out.endswith("or set TMPDIR")


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.gettempdir", refuse)
    assert doctor.default_folders()["temporary"] == Path("/tmp")


# ---- processes


def ask(*question: str, code: str = doctor._CHILD, path: str | None = None) -> subprocess.CompletedProcess[str]:
    where = os.pathsep.join(sys.path) if path is None else path
    return subprocess.run([sys.executable, "-c", code, where, *question], capture_output=True, text=True, check=False)


def hidden_engine(folder: Path) -> str:
    """A search path on which llama-cpp-python cannot be imported."""
    (folder / "llama_cpp").mkdir()
    (folder / "llama_cpp" / "__init__.py").write_text("raise ImportError('libllama.so is not there')\n")
    return os.pathsep.join([str(folder), *sys.path])


def test_kernels_need_no_engine(tmp_path: Path) -> None:
    done = ask("kernels", "1", path=hidden_engine(tmp_path))
    found = [Finding(**one) for one in json.loads(done.stdout)]
    assert {(finding.topic, finding.status) for finding in found} == {("kernels", "ok")}
    assert {finding.data["routine"] for finding in found} == {"fast"}


def test_a_missing_engine_is_a_finding(tmp_path: Path) -> None:
    done = ask("engine", path=hidden_engine(tmp_path))
    (found,) = [Finding(**one) for one in json.loads(done.stdout)]
    assert (found.topic, found.status) == ("engine", "wrong")
    assert "libllama.so is not there" in found.text
    assert "pip install" in found.way_out


@pytest.mark.parametrize("topic", ["engine", "kernels"])
def test_a_crash_is_a_finding(topic: str) -> None:
    found = doctor.judge_end(topic, -signal.SIGSEGV, "loading\nillegal instruction\n")
    assert (found.status, found.text) == ("wrong", "crashed (SIGSEGV): illegal instruction")
    assert {"engine": "compile the engine", "kernels": "--quantizer ggml"}[topic] in found.way_out


def test_windows_calls_a_crash_by_its_number() -> None:
    assert doctor.judge_end("engine", 0xC000001D, "").text == "crashed (0xc000001d): no reason given"


def test_a_python_error_is_a_finding() -> None:
    found = doctor.judge_end("engine", 1, "Traceback\nModuleNotFoundError: No module named 'numpy'\n")
    assert found.text == "ended with exit code 1: ModuleNotFoundError: No module named 'numpy'"
    assert found.way_out.startswith("install the packages that are missing")


def test_children_that_die_or_hang_do_not_take_the_doctor_along() -> None:
    hangs, dies = "import time; time.sleep(99)", "import os; os._exit(7)"
    with doctor._child(["engine"], dies) as dying, doctor._child(["kernels", "0"], hangs) as hanging:
        (dead,), (late,) = doctor._answers(dying, "engine"), doctor._answers(hanging, "kernels", timeout_s=0.1)
    assert (dead.topic, dead.text) == ("engine", "ended with exit code 7: no reason given")
    assert (late.topic, late.text) == ("kernels", "has not ended after 0 s")
    assert hanging.poll() is not None


def test_workers_are_looked_at_one_by_one() -> None:
    with pretender(speak_version(7, 0, 0)) as good, pretender(talk_garbage) as bad:
        workers = OffloadOptions(rpc=f"{good},{bad}").workers
        fine, wrong = doctor.check_workers(workers)
    assert (fine.status, fine.name) == ("ok", good)
    assert fine.text == "answers: 1 device with 3.00 GiB, 2.00 GiB free"
    assert (wrong.status, wrong.name) == ("wrong", bad)
    assert "no worker of llama.cpp" in wrong.text
    assert wrong.way_out is not None
    assert wrong.way_out not in wrong.text
