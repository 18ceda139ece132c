"""Fill the environment of the comparisons and fetch llama.cpp's converter; prints the directory of llama.cpp.

usage: environment.py PYTHON_OF_THE_ENVIRONMENT

The converter comes from the source distribution of the pinned llama-cpp-python, which carries the whole of llama.cpp
at the pinned commit, and is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import setup_environment
from setup_environment import Pin, SetupError, say

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def install_requirements(python: Path) -> None:
    """Install ``requirements.txt`` unless that very file was installed before."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    stamp = python.parent.parent / "ggufmoe-stamp"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    say("installing torch and transformers to compare with (large, once)")
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-r", str(REQUIREMENTS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SetupError(f"pip install -r {REQUIREMENTS} failed:\n{done.stdout[-6000:]}")
    stamp.write_text(wanted, encoding="utf-8")


def llama_cpp_sources(pin: Pin) -> Path:
    """The directory of llama.cpp's sources at the pin; fetched when the cache has none."""
    kept = setup_environment.cache_directory() / "sources" / f"llama_cpp_python-{pin.version}"
    sources = kept / "vendor" / "llama.cpp"
    if (sources / "convert_hf_to_gguf.py").is_file():
        return sources
    say(f"fetching the sources of llama-cpp-python {pin.version}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        setup_environment.pip("download", "--no-deps", "--no-binary=:all:", "-d", scratch, pin.requirement)
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


def main() -> int:
    """Prepare; the directory goes to stdout, everything else to stderr."""
    try:
        install_requirements(Path(sys.argv[1]))
        print(llama_cpp_sources(setup_environment.read_pin(setup_environment.PIN_FILE, None)))
    except SetupError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
