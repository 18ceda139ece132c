"""The set-up: the pin is read as it stands, a wrong engine is noticed, and what is missing is said."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "scripts" / "setup_environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pin_is_the_version_that_the_project_asks_for(setup: ModuleType) -> None:
    pin = setup.read_pin(setup.PIN_FILE, None)
    assert (pin.flavour, pin.symbol) == ("cpu-rpc", "ggml_backend_rpc_add_server")
    assert re.fullmatch(r"[0-9a-f]{40}", pin.commit)
    assert f'"{pin.requirement}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("flavour", ["cpu", "cpu-rpc", "metal", "cuda", "vulkan"])
def test_vendor_readme_gives_each_flavours_command(setup: ModuleType, flavour: str) -> None:
    pin = setup.read_pin(setup.PIN_FILE, flavour)
    row = next(line for line in _vendor_readme().splitlines() if line.startswith(f"| `{flavour}` |"))
    assert f'CMAKE_ARGS="{pin.cmake_args}" pip install ' in row
    assert pin.requirement in row


def _vendor_readme() -> str:
    return (ROOT / "vendor" / "README.md").read_text(encoding="utf-8")


def test_an_unknown_flavour_is_refused(setup: ModuleType) -> None:
    with pytest.raises(setup.SetupError, match=r"GGUFMOE_ENGINE=rocket is no flavour .* cpu, cpu-rpc, metal"):
        setup.read_pin(setup.PIN_FILE, "rocket")


def test_the_installed_engine_is_the_pinned_one(setup: ModuleType) -> None:
    assert setup.engine_faults(setup.read_pin(setup.PIN_FILE, None)) == ""


def test_another_engine_is_noticed(setup: ModuleType) -> None:
    pin = setup.read_pin(setup.PIN_FILE, None)
    structures = {**pin.abi["struct_bytes"], "llama_model_params": 72}
    types = {**pin.abi["tensor_types"], "Q4_K": [12, 256, 140]}
    wrong = replace(
        pin, version="0.3.35", commit="f" * 40, abi={**pin.abi, "struct_bytes": structures, "tensor_types": types}
    )
    faults = setup.engine_faults(wrong)
    assert f"version is {pin.version}, expected 0.3.35" in faults
    assert re.search(f"llama.cpp commit is {pin.commit[:7]}[0-9a-f]*, expected ffff", faults)
    assert "size of llama_model_params is 80, expected 72" in faults
    assert "block of Q4_K is [256, 144], expected [256, 140]" in faults


def test_another_flavour_is_noticed(setup: ModuleType) -> None:
    pin = replace(setup.read_pin(setup.PIN_FILE, None), symbol="ggml_backend_rocket_reg")
    assert setup.engine_faults(pin) == "ggml_backend_rocket_reg is not exported"


def test_each_flavour_has_a_place_of_its_own_in_the_cache(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = {setup.engine_cache(setup.read_pin(setup.PIN_FILE, flavour)) for flavour in ("cpu", "cpu-rpc", "cuda")}
    assert len(places) == 3
    assert all(place.parent == tmp_path / "ggufmoe" / "engine" for place in places)


def test_a_missing_compiler_is_said_before_anything_is_fetched(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    pin = setup.read_pin(setup.PIN_FILE, None)
    with pytest.raises(setup.SetupError, match=r"cmake is not on PATH; install cmake 3\.21"):
        setup.build_wheel(pin, tmp_path / "wheels")
    cmake = tmp_path / ("cmake.exe" if sys.platform == "win32" else "cmake")
    cmake.touch()
    cmake.chmod(0o755)
    if sys.platform != "win32":
        with pytest.raises(setup.SetupError, match=r"no C\+\+ compiler is on PATH"):
            setup.build_wheel(pin, tmp_path / "wheels")
    assert not (tmp_path / "wheels").exists()


@pytest.fixture
def checkout(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without wheels, in an environment that asks for nothing."""
    for name in ("GGUFMOE_ENGINE", "GGUFMOE_ENGINE_WHEEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "wheels").mkdir()
    return tmp_path


def test_a_wheel_that_fits_takes_the_place_of_compiling(
    setup: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = setup.read_pin(setup.PIN_FILE, None)
    assert setup.given_wheel(pin) is None
    assert setup.engine_name(pin) == setup.engine_cache(pin).name
    for tag in ("win_arm64", "macosx_26_0_arm64", "linux_riscv64"):
        (checkout / "wheels" / f"llama_cpp_python-{pin.version}-py3-none-{tag}.whl").touch()
    (checkout / "wheels" / "llama_cpp_python-0.3.1-py3-none-any.whl").touch()
    assert setup.given_wheel(pin) is None
    fitting = checkout / "wheels" / f"llama_cpp_python-{pin.version}-py3-none-any.whl"
    fitting.write_bytes(b"one")
    assert setup.given_wheel(pin) == fitting
    name = setup.engine_name(pin)
    fitting.write_bytes(b"another")
    assert setup.engine_name(pin) != name, "an environment made from the other wheel is not up to date"
    monkeypatch.setenv("GGUFMOE_ENGINE", "cpu-rpc")
    assert setup.given_wheel(pin) is None


def test_a_named_wheel_comes_before_all(setup: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = setup.read_pin(setup.PIN_FILE, None)
    (checkout / "wheels" / f"llama_cpp_python-{pin.version}-py3-none-any.whl").touch()
    monkeypatch.setenv("GGUFMOE_ENGINE_WHEEL", str(checkout / "mine.whl"))
    with pytest.raises(setup.SetupError, match=r"GGUFMOE_ENGINE_WHEEL=.*mine\.whl is no file"):
        setup.given_wheel(pin)
    (checkout / "mine.whl").touch()
    assert setup.given_wheel(pin) == checkout / "mine.whl"


def test_compiling_says_how_long_it_takes_and_how_far_it_is(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.os, "cpu_count", lambda: 2)
    assert setup.compile_time(setup.read_pin(setup.PIN_FILE, "cpu-rpc")) == "about 5 minutes on this machine"
    assert setup.compile_time(setup.read_pin(setup.PIN_FILE, "cuda")) == "half an hour and more"
    pip = tmp_path / "pip.py"
    steps = "print('[1/3] Building C'); print('a warning'); print('  [2/3] Linking', flush=True)"
    pip.write_text(f"{steps}\nraise SystemExit('it broke')")
    monkeypatch.setattr(setup, "PIP", [sys.executable, str(pip)])
    monkeypatch.setattr(setup, "_SAY_EVERY_S", 0.0)
    with pytest.raises(setup.SetupError, match=r"(?s)pip wheel x failed:.*a warning.*it broke"):
        setup.pip_showing_progress("wheel", "x", env=dict(os.environ))
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told] == ["set-up: 1 of 3 steps", "set-up: 2 of 3 steps"]
    pip.write_text("print('[3/3] Linking')")
    setup.pip_showing_progress("wheel", "x", env=dict(os.environ))
    assert capsys.readouterr().err.startswith("set-up: 3 of 3 steps, ")
