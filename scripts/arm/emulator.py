"""An emulated 64-bit ARM Linux with Python and this package's dependencies, but for the engine; made once in a folder.

The emulator is qemu-user-static; the system's Python and C library come from Debian or Ubuntu through apt, with a state
directory of its own, so that nothing is installed; the packages are wheels for ARM of the versions that this
environment has.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM_PACKAGES = ("python3-minimal", "python3", "libstdc++6", "libgomp1", "zlib1g", "libffi8", "libssl3")
TEST_PACKAGES = ("pytest", "hypothesis")
ENGINE = "llama-cpp-python"
_GLIBC = (17, 24, 26, 27, 28, 31, 34)


class MissingError(Exception):
    """What the check needs and this machine does not have, in one line."""


@dataclass(frozen=True)
class Emulator:
    """A Python for ARM that runs here. ``folder`` holds all of it."""

    folder: Path
    qemu: Path
    python: Path

    @property
    def root(self) -> Path:
        """The root directory of the emulated system."""
        return self.folder / "system"

    def command(self, *arguments: str) -> list[str]:
        """The command that runs the emulated Python."""
        return [str(self.qemu), "-L", str(self.root), str(self.python), *arguments]

    def environment(self) -> dict[str, str]:
        """Environment variables: packages for ARM, this project, and a cache of its own for compiled kernels."""
        paths = os.pathsep.join([str(self.folder / "site"), str(ROOT)])
        ours = {"PYTHONPATH": paths, "GGUFMOE_CACHE": str(self.folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**os.environ, "PYTHONNOUSERSITE": "1", **ours}


def emulator(folder: Path) -> Emulator:
    """The emulator in ``folder``, set up if it is not there. Raises MissingError for what is missing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise MissingError(f"this needs Linux on x86-64, not {sys.platform} on {platform.machine()}")
    folder.mkdir(parents=True, exist_ok=True)
    qemu = _qemu(folder)
    if not (folder / "system" / "complete").exists():
        _unpack(folder, "arm64", SYSTEM_PACKAGES, folder / "system")
        (folder / "system" / "complete").touch()
    pythons = sorted((folder / "system" / "usr" / "bin").glob("python3.[0-9]*[0-9]"))
    if not pythons:
        raise MissingError(f"no python3 for ARM in {folder}/system; remove that folder and run this again")
    made = Emulator(folder, qemu, pythons[-1])
    _install(made)
    return made


def _qemu(folder: Path) -> Path:
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        if found := shutil.which(name):
            return Path(found)
    found_here = folder / "emulator" / "usr" / "bin" / "qemu-aarch64-static"
    if not found_here.exists():
        _unpack(folder, "amd64", ("qemu-user-static",), folder / "emulator")
    return found_here


def _unpack(folder: Path, architecture: str, packages: tuple[str, ...], target: Path) -> None:
    """Download packages and what they depend on for an architecture, and unpack them into ``target``."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise MissingError("this needs apt-get and dpkg-deb, or an emulator: on Debian and Ubuntu, qemu-user-static")
    apt = folder / f"apt-{architecture}"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "state/status").touch()
    settings = {
        "APT::Architecture": architecture,
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "state/status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    lines = [f'{key} "{value}";\n' for key, value in settings.items()]
    (apt / "apt.conf").write_text("".join(lines) + f'APT::Architectures {{ "{architecture}"; }};\n')
    install = ["install", "-q", "-y", "--download-only", "--no-install-recommends", *packages]
    for arguments in (["update", "-q"], install):
        _run(["apt-get", *arguments], "packages of the system", APT_CONFIG=str(apt / "apt.conf"))
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True)
    shutil.rmtree(apt)


def _install(made: Emulator) -> None:
    """Download wheels for ARM in the versions of this environment, and unpack them into ``site``."""
    version = made.python.name.removeprefix("python")
    wanted = "\n".join([version, *_requirements()])
    done = made.folder / "site" / "complete"
    if done.exists() and done.read_text() == wanted:
        return
    shutil.rmtree(made.folder / "site", ignore_errors=True)
    wheels = made.folder / "wheels"
    tags = [f"manylinux_2_{number}_aarch64" for number in _GLIBC] + ["manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", str(wheels)]
    command += ["--only-binary", ":all:", "--python-version", version, "--implementation", "cp"]
    command += [f"--abi={abi}" for abi in (f"cp{version.replace('.', '')}", "abi3", "none")]
    command += [f"--platform={tag}" for tag in tags]
    _run([*command, *_requirements()], "wheels for ARM")
    for wheel in sorted(wheels.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(made.folder / "site")
    shutil.rmtree(wheels)
    done.write_text(wanted)


def _requirements() -> list[str]:
    requirements = map(Requirement, metadata.requires("ggufmoe") or ())
    names = [needed.name for needed in requirements if needed.marker is None]
    return [f"{name}=={metadata.version(name)}" for name in (*names, *TEST_PACKAGES) if name != ENGINE]


def _run(command: list[str], purpose: str, **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise MissingError(f"this needs {purpose}, and a network to fetch them: {command[0]} says: {last}")
