"""What a type checker, and with it an editor, accepts and refuses of calls of the public functions.

One run of mypy over one file with a call on each line: those that must be refused say so in a comment.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ggufmoe

CALLS = """\
from pathlib import Path
from threading import Event

from ggufmoe import (
    ConvertOptions, Engine, EvaluationOptions, ImatrixOptions, MergeOptions, Progress, QuantizeOptions,
    RefitOptions, RoutingOptions, SamplingOptions,
    convert, imatrix, kl_divergence, merge, perplexity, quantize, refit, trace_routing,
)
from ggufmoe.convert import plan_convert
from ggufmoe.quantize import plan_quantize

def show(progress: Progress) -> None: ...
def show_float(part: float) -> None: ...

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
convert("a", "b", on_progress=show, cancel=Event())
convert("a", "b", on_progress=show_float)  # refused
convert("a", "b", cancel=True)  # refused

plan_convert("a", "b", quant="Q4_K_M", threads=4)
plan_convert("a", "b", options=ConvertOptions(threads=4))
plan_convert("a", "b", thread=4)  # refused
plan_convert("a", "b", threads="x")  # refused

quantize("a", "b", quant="Q4_K_M", threads=4, allow_requantize=True)
quantize("a", "b", options=QuantizeOptions(threads=4))
quantize("a", "b", thread=4)  # refused
quantize("a", "b", threads="x")  # refused
quantize("a", "b", options=ConvertOptions())  # refused
quantize("a", "b", on_progress=show, cancel=Event())

plan_quantize("a", "b", quant="Q4_K_M", threads=4)
plan_quantize("a", "b", options=QuantizeOptions(threads=4))
plan_quantize("a", "b", thread=4)  # refused
plan_quantize("a", "b", threads="x")  # refused

merge("a", "b", layout="fused", threads=4)
merge("a", "b", options=MergeOptions(threads=4))
merge("a", "b", thread=4)  # refused
merge("a", "b", threads="x")  # refused
merge("a", "b", quant="Q4_K_M")  # refused
merge("a", "b", on_progress=show, cancel=Event())

refit("a", "b", ["c", Path("d")], text_tokens=512, seed=1)
refit("a", "b", {"base": "c", "math": ["d", "e"]}, options=RefitOptions(threads=4))
refit("a", "b", {0: "c", 1: ["d", "e"]})
refit("a", "b", router="c")  # refused
refit("a", "b", router=Path("c"), on_progress=show, cancel=Event())
refit("a", "b", "Q4_K_M", 1)  # refused
refit("a", "b", ["c"], tokens=512)  # refused
refit("a", "b", ["c"], seed="x")  # refused

perplexity("a", "a text", n_ctx=256, flash_attn="off")
perplexity("a", text_file=Path("b"), options=EvaluationOptions(n_ctx=256))
perplexity("a", "a text", on_progress=show, cancel=Event())
perplexity("a", Path("b"))  # refused
perplexity("a", "a text", n_context=256)  # refused
perplexity("a", "a text", n_ctx=None)  # refused
perplexity("a", "a text", overflow="shift")  # refused

kl_divergence("a", "b", "a text", n_ctx=256, round_reference=True)
kl_divergence("a", "b", text_file="c", options=EvaluationOptions(n_ctx=256))
kl_divergence("a", "b", "a text", on_progress=show, cancel=Event())
kl_divergence("a", "b", Path("c"))  # refused
kl_divergence("a", "b", "a text", n_context=256)  # refused
kl_divergence("a", "b", "a text", n_ctx="x")  # refused

imatrix("a", "b", "a text", n_ctx=256, process_output=True)
imatrix("a", Path("b"), text_file="c", options=ImatrixOptions(n_ctx=256))
imatrix("a", "b", "a text", on_progress=show, cancel=Event())
imatrix("a", "b", Path("c"))  # refused
imatrix("a", "b", text_file="c", options=EvaluationOptions())  # refused
imatrix("a", "b", "a text", n_context=256)  # refused
imatrix("a", "b", "a text", n_ctx="x")  # refused

engine = Engine("a")
trace_routing(engine, "a text", generate=4, sampling=SamplingOptions(seed=1))
trace_routing(engine, [1, 2], options=RoutingOptions(generate=4))
trace_routing(engine, "a text", on_progress=show, cancel=Event())
trace_routing(engine, "a text", n_predict=4)  # refused
trace_routing(engine, "a text", generate="x")  # refused
trace_routing(engine, "a text", options=EvaluationOptions())  # refused
trace_routing(engine, Path("b"))  # refused
trace_routing(engine, "a text", on_progress=show_float)  # refused
"""


@pytest.fixture(scope="module")
def refused_lines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """mypy's errors by line of CALLS."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "calls.py").write_text(CALLS, encoding="utf-8")
    root = Path(ggufmoe.__file__).parent.parent
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--no-error-summary"]
    # with the cache of the checkout, which scripts/check leaves
    done = subprocess.run([*mypy, str(folder / "calls.py")], capture_output=True, text=True, cwd=root)
    assert done.stderr == ""
    errors: dict[int, str] = {}
    for line in done.stdout.splitlines():
        place, number, kind, what = line.split(":", 3)
        assert place.endswith("calls.py"), line
        if kind.strip() == "error":
            errors[int(number)] = what.strip()
    return errors


@pytest.mark.parametrize(
    ("number", "call"), [(i, line) for i, line in enumerate(CALLS.splitlines(), 1) if re.match(r"\w+\(", line)]
)
def test_a_call_is_accepted_or_refused(refused_lines: dict[int, str], number: int, call: str) -> None:
    assert (number in refused_lines) is call.endswith("# refused"), refused_lines.get(number, "accepted")
