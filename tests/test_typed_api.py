"""What a type checker, and with it an editor, accepts and refuses of calls of the public functions.

One run of mypy over one file with a call on each line: those that must be refused say so in a comment.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ggufmoe

CALLS = """\
from pathlib import Path

from ggufmoe import ConvertOptions, MergeOptions, QuantizeOptions, convert, merge, quantize
from ggufmoe.convert import plan_convert
from ggufmoe.quantize import plan_quantize

convert("a", "b")
convert("a", Path("b"), "Q4_K_M")
convert("a", "b", quant="Q4_K_M", threads=4)
convert("a", "b", options=ConvertOptions(threads=4))
convert("a", "b", thread=4)  # refused
convert("a", "b", threads="x")  # refused
convert("a", "b", quantizer="quick")  # refused
convert("a", "b", options=QuantizeOptions())  # refused
convert("a", "b", options={"threads": 4})  # refused
convert("a", "b", "Q4_K_M", 4)  # refused

plan_convert("a", "b", quant="Q4_K_M", threads=4)
plan_convert("a", "b", options=ConvertOptions(threads=4))
plan_convert("a", "b", thread=4)  # refused
plan_convert("a", "b", threads="x")  # refused

quantize("a", "b", quant="Q4_K_M", threads=4, allow_requantize=True)
quantize("a", "b", options=QuantizeOptions(threads=4))
quantize("a", "b", thread=4)  # refused
quantize("a", "b", threads="x")  # refused
quantize("a", "b", options=ConvertOptions())  # refused

plan_quantize("a", "b", quant="Q4_K_M", threads=4)
plan_quantize("a", "b", options=QuantizeOptions(threads=4))
plan_quantize("a", "b", thread=4)  # refused
plan_quantize("a", "b", threads="x")  # refused

merge("a", "b", layout="fused", threads=4)
merge("a", "b", options=MergeOptions(threads=4))
merge("a", "b", thread=4)  # refused
merge("a", "b", threads="x")  # refused
merge("a", "b", quant="Q4_K_M")  # refused
"""


@pytest.fixture(scope="module")
def refused_lines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """mypy's errors by line of CALLS."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "calls.py").write_text(CALLS, encoding="utf-8")
    root = Path(ggufmoe.__file__).parent.parent
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--no-error-summary"]
    done = subprocess.run(
        [*mypy, "--cache-dir", str(folder / "cache"), str(folder / "calls.py")],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.stderr == ""
    errors: dict[int, str] = {}
    for line in done.stdout.splitlines():
        place, number, kind, what = line.split(":", 3)
        assert place.endswith("calls.py"), line
        if kind.strip() == "error":
            errors[int(number)] = what.strip()
    return errors


@pytest.mark.parametrize(("number", "call"), [(i, c) for i, c in enumerate(CALLS.splitlines(), 1) if "(" in c])
def test_a_call_is_accepted_or_refused(refused_lines: dict[int, str], number: int, call: str) -> None:
    assert (number in refused_lines) is call.endswith("# refused"), refused_lines.get(number, "accepted")
