"""Fill the environment of the comparisons and fetch llama.cpp's converter; prints the directory of llama.cpp.

usage: environment.py PYTHON_OF_THE_ENVIRONMENT [REQUIREMENTS]

With the name of a file of requirements beside this one, installs those alone, and fetches and prints nothing.

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

HERE = Path(__file__).parent


def install_requirements(python: Path, requirements: Path) -> None:
    """Install ``requirements`` unless that very file was installed before."""
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    stamp = python.parent.parent / "ggufmoe-stamp"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    say(f"installing {requirements.name} to compare with (large, once)")
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-r", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SetupError(f"pip install -r {requirements} failed:\n{done.stdout[-6000:]}")
    stamp.write_text(wanted, encoding="utf-8")


def main() -> int:
    """Prepare; the directory goes to stdout, everything else to stderr."""
    try:
        if len(sys.argv) > 2:
            install_requirements(Path(sys.argv[1]), HERE / sys.argv[2])
            return 0
        install_requirements(Path(sys.argv[1]), HERE / "requirements.txt")
        print(setup_environment.llama_cpp_sources(setup_environment.read_pin(setup_environment.PIN_FILE, None)))
    except SetupError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
