"""Converting and quantizing without an engine: the same files, and one line about what needs one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ggufmoe
from ggufmoe.quant import importances as imatrix
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from tests.quant.llama_quantize import Specimen, quantize, write_model
from tests.tiny import make_checkpoint

CONVERTED = ("F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q5_0", "Q2_K", "IQ4_XS")
WEIGHTED = ("Q4_K_M", "IQ2_XXS", "Q4_0")
HIDE = "import sys; sys.modules['llama_cpp'] = None  # as if it were not installed\n"
MAKE = """
import pathlib
import ggufmoe
checkpoint, folder, converted, weighted, engine = sys.argv[1:]
folder = pathlib.Path(folder)
for name in converted.split():
    ggufmoe.convert(checkpoint, folder / engine / f"{name}.gguf", name)
for name in weighted.split():
    options = {"imatrix": folder / "i.gguf", "allow_requantize": True}
    ggufmoe.quantize(folder / "in.gguf", folder / engine / f"{name}-weighted.gguf", name, **options)
ggufmoe.quantize(folder / "q.gguf", folder / engine / "again.gguf", "Q5_K_S", allow_requantize=True)
ggufmoe.quantize(folder / "q.gguf", folder / engine / "copy.gguf", "COPY")
from ggufmoe.native import library
assert library.has_engine() == (engine == "with")
"""


def python(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GGUF model, with its importances and a quantized one beside it."""
    specimen = Specimen(n_expert=2)
    importance = specimen.importance()
    entries = {name: (values, np.ones(len(values), np.float32)) for name, values in importance.items()}
    imatrix.save(tmp_path / "i.gguf", entries, ["text.txt"], chunk_count=4)
    source = write_model(tmp_path / "in.gguf", specimen, specimen.weights())
    assert quantize(source, TypePolicy(FileType.Q6_K), None, tmp_path / "q.gguf").ok
    return source


def test_the_files_are_the_same_without_an_engine(tiny_checkpoint: Callable[..., Path], model: Path) -> None:
    folder = model.parent
    for engine, start in (("with", "import sys\n"), ("without", HIDE)):
        (folder / engine).mkdir()
        python(start + MAKE, tiny_checkpoint(), folder, " ".join(CONVERTED), " ".join(WEIGHTED), engine)
    made = sorted(path.name for path in (folder / "without").iterdir())
    assert len(made) == len(CONVERTED) + len(WEIGHTED) + 2
    for name in made:
        assert (folder / "without" / name).read_bytes() == (folder / "with" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["-q", "TQ2_0"], "error: TQ2_0 has to be quantized by llama.cpp here (it has no kernel), and there is none"),
        (
            ["-q", "Q4_K_M", "--quantizer", "ggml"],
            "error: Q4_K has to be quantized by llama.cpp here (--quantizer ggml)",
        ),
    ],
)
def test_what_needs_an_engine_is_said_before_anything_is_written(flags: list[str], reason: str, model: Path) -> None:
    output = model.with_name("out.gguf")
    code, errors = without_engine("quantize", model, "-o", output, *flags)
    assert code == 1
    assert reason in errors[-1]
    assert "pip install llama-cpp-python==" in errors[-1]
    assert not list(model.parent.glob("out*"))


def test_fitting_needs_an_engine_and_taking_a_router_does_not(tmp_path: Path) -> None:
    model, output, texts = (tmp_path / name for name in ("m.gguf", "out.gguf", "a.txt"))
    ggufmoe.convert(make_checkpoint(tmp_path / "model", n_embd=64, n_ff=64), model, "F32")
    texts.write_text("one\ntwo\n", encoding="utf-8")
    code, errors = without_engine("refit", model, texts, texts, "-o", output)
    assert code == 1
    assert "pip install llama-cpp-python==" in errors[-1]
    code, _ = without_engine("refit", model, "--router", model, "-o", output)
    assert code == 0
    assert output.exists()


def test_types_that_only_llama_cpp_reads_are_said(model: Path) -> None:
    ggufmoe.quantize(model, model.with_name("q2.gguf"), "Q2_0")
    output = model.with_name("out.gguf")
    code, errors = without_engine(
        "quantize", model.with_name("q2.gguf"), "-o", output, "-q", "Q4_0", "--allow-requantize"
    )
    assert (code, len(errors)) == (1, 1)
    assert (
        "error: Q2_0 can only be read by llama.cpp, and there is none: llama-cpp-python is not installed" in errors[0]
    )


@pytest.mark.parametrize("verb", ["run", "perplexity"])
def test_models_are_not_run_without_an_engine(verb: str, model: Path) -> None:
    (model.parent / "text.txt").write_text("once upon a time")
    more = ["once"] if verb == "run" else ["-f", model.parent / "text.txt"]
    code, errors = without_engine(verb, model, *more)
    assert code == 1
    assert errors[-1].startswith("error: llama-cpp-python is not installed; install it with `pip install llama-cpp")
    assert "Traceback" not in "".join(errors)


def without_engine(*arguments: object) -> tuple[int, list[str]]:
    """Exit code and stderr of ggufmoe where llama-cpp-python is not installed."""
    code = HIDE + "from ggufmoe.cli.app import main; sys.argv[0] = 'ggufmoe'; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stderr.splitlines()
