"""``ggufmoe perplexity`` and ``ggufmoe imatrix`` as their users meet them."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.imatrix import _summary as imatrix_summary
from ggufmoe.evaluation.imatrix import ImatrixResult, LayerCoverage
from ggufmoe.quant.importances import Imatrix
from tests.scripted import Scripted

TEXT = "the model reads a number and writes the sum of two numbers " * 6
FLAGS = ["-c", "32", "-t", "1", "-b", "64"]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoint = tiny_checkpoint(dtype="F32", n_embd=64, n_ff=64, n_expert=4, n_expert_used=2)
    for kind in ("F32", "Q4_0"):
        ggufmoe.convert(checkpoint, folder / f"{kind}.gguf", quant=kind, threads=1)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder / "Q4_0.gguf"


def run(verb: str, model: Path, *arguments: str) -> int:
    return exit_code([verb, str(model), "-f", str(model.with_name("text.txt")), *FLAGS, *arguments])


def test_perplexity_is_printed_and_nothing_else(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("perplexity", model, "--quiet") == 0
    printed = capsys.readouterr()
    value = ggufmoe.perplexity(model, TEXT, n_ctx=32, n_batch=64, n_threads=1).value
    assert printed.out.startswith(f"perplexity  {value:.4f} ± ")
    assert "chunks of 32" in printed.out
    assert printed.err == ""


def test_json_holds_the_numbers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("perplexity", model, "--json", "--chunks", "2") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["chunks"], told["total_chunks"], told["tokens"]) == (2, 2, 30)
    assert run("perplexity", model, "--against", str(model.with_name("F32.gguf")), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kl"]["mean"]["value"] > 0
    assert 0 < told["same_top"]["value"] <= 1


def test_a_reference_gives_the_table_of_what_it_costs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("perplexity", model, "--against", str(model.with_name("F32.gguf"))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Q4_0.gguf beside F32.gguf"
    for start in (
        "perplexity ",
        "  of the reference ",
        "KL divergence ",
        "  99.9 % quantile ",
        "same likeliest token ",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_several_models_are_told_apart(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, kept = model.with_name("F32.gguf"), tmp_path / "kept"
    more = (str(reference), "--against", str(reference), "--logits", str(kept))
    assert run("perplexity", model, *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "beside F32.gguf"
    assert lines[2].startswith("Q4_0.gguf  0.")
    assert lines[3].split()[4].startswith("-0.")
    assert kept.read_bytes().startswith(b"_logits_")
    assert run("perplexity", model, *more, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["kl_differences"]) == 1
    assert run("perplexity", model, str(reference)) == 2
    assert "give --against REFERENCE too" in capsys.readouterr().err


def test_the_coverage_of_many_experts_fits_a_line() -> None:
    rows = (LayerCoverage(0, (5, 7)), LayerCoverage(1, (0,) * 100 + (4,) * 156))
    lines = imatrix_summary(ImatrixResult(Path("x"), 512, 3, 3, 6, rows, 1.0))
    assert lines[2:] == ["    0:       5       7", "    1: 0 to 4, half of the 256 experts got 4 or more"]


def test_imatrix_writes_what_quantize_reads(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = model.with_name("F32.gguf"), tmp_path / "imatrix.gguf"
    assert run("imatrix", source, "-o", str(output)) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{output}: 16 matrices" in printed.err
    assert "tokens that reached each expert, by layer:" in printed.err
    assert "warning: fewer than 512 tokens reached experts (layer 0: " in printed.err
    assert Imatrix.load(output).chunk_size == 32
    assert run("imatrix", source, "-o", str(output)) == 1
    assert "exists already" in capsys.readouterr().err
    assert run("imatrix", source, "-o", str(output), "--force", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 16
    quantized = ["quantize", str(source), "-o", str(tmp_path / "q.gguf"), "-q", "IQ4_NL", "--quiet"]
    assert exit_code([*quantized, "--imatrix", str(output)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-c", "4"], 2, "--ctx-size must be at least 8, not 4"),
        (["--chunks", "0"], 2, "--chunks takes -1 or at least 1"),
        (["-c", "2048"], 1, "take a longer text, or shorter chunks"),
        (["--against", "nowhere.gguf"], 1, "nowhere.gguf"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run("perplexity", model, *arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_ctrl_c_prints_what_is_done(model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 400, encoding="utf-8")
    flags = ["perplexity", str(model), "-f", str(long), "-c", "256", "-b", "256", "-t", "1"]
    command = [sys.executable, "-m", "ggufmoe", *flags]
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        err = ""
        while " 1/" not in err:
            err += os.read(ours, 1000).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        while piece := _read(ours):
            err += piece
        out, _ = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 130
    assert out.startswith("perplexity  ")
    assert "the result covers these" in re.split(r"[\r\n]+", err.strip())[-1]


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 1000).decode(errors="replace")
    except OSError:  # Linux says so when the last writer has gone
        return ""


def test_a_terminal_shows_the_loading_and_the_chunks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "60")
    assert run("perplexity", model) == 0
    shown = [line.strip() for line in screen.getvalue().split("\r")]
    assert shown[1] == "perplexity: preparing"
    assert any(re.fullmatch(r"loading Q4_0.gguf \S{8}   0%", line) for line in shown)
    assert any(re.match(r"perplexity \S{8} \d+/\d+  \d+\.\d{4} ± ", line) for line in shown)
    assert shown[-1] == ""


@pytest.mark.parametrize(("columns", "n_expert"), [(60, 6), (80, 9), (400, 16)])
def test_counts_of_experts_fit_the_terminal(columns: int, n_expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Screen())
    for n, is_listed in ((n_expert, True), (n_expert + 1, False)):
        coverage = (LayerCoverage(0, tuple(range(1_234_000, 1_234_000 + n))),)
        *_, line = imatrix_summary(ImatrixResult(Path("i.gguf"), 512, 1, 1, 1, coverage, 1.0))
        assert (str(1_234_001) in line) == is_listed
        assert line.startswith("    0: 1234000 to ") != is_listed
        assert len(line) <= columns or not is_listed


def test_answers_are_scored_alone(
    write_model: Callable[[Scripted], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, talks = write_model(Scripted({" a": " b"}, chat_template="{{ messages[-1].content }}")), tmp_path / "t.jsonl"
    messages = [{"role": "user", "content": " b"}, {"role": "assistant", "content": " a b"}]
    talks.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    asked = ["perplexity", str(path), "-f", str(talks), "--answers", "-t", "1"]
    assert exit_code([*asked, "--quiet"]) == 0
    assert re.search(r"^\d tokens in 1 conversation, ", capsys.readouterr().out, re.MULTILINE)
    assert exit_code([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] is True
    assert exit_code([*asked, "--against", str(path)]) == 2
    assert "--against compares two" in capsys.readouterr().err
