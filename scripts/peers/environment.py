"""Fill the environment of the comparisons and fetch llama.cpp's converter; prints the directory of llama.cpp.

usage: environment.py PYTHON_OF_THE_ENVIRONMENT

The converter comes from the source distribution of the pinned llama-cpp-python, which carries the whole of llama.cpp
at the pinned commit, and is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import setup_environment
from setup_environment import SetupError, say

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


def main() -> int:
    """Prepare; the directory goes to stdout, everything else to stderr."""
    try:
        install_requirements(Path(sys.argv[1]))
        print(setup_environment.llama_cpp_sources(setup_environment.read_pin(setup_environment.PIN_FILE, None)))
    except SetupError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
