"""``ggufmoe convert`` as its users meet it: output, exit codes, signals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggufmoe import files
from ggufmoe.cli import jobs
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.conversion import default_output
from ggufmoe.cli.jobs import Interrupt
from ggufmoe.files import partial_path
from ggufmoe.gguf.header import read_header

Make = Callable[..., Path]


def test_a_summary_goes_to_stderr_and_nothing_to_stdout(
    tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.gguf"
    assert exit_code(["convert", str(tiny_checkpoint()), "-o", str(output), "-q", "Q8_0", "-t", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{output}: 2.33 MB, 8.5" in printed.err
    assert "bits per weight" in printed.err
    assert "MB/s" in printed.err
    assert read_header(output).tensors


def test_the_output_is_named_after_the_source(
    tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_checkpoint()
    assert exit_code(["convert", f"{source}/", "-q", "q8_0", "-t", "2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{source.name}-Q8_0.gguf"]
    err = capsys.readouterr().err
    assert err.startswith(f"writes {source.name}-Q8_0.gguf; -o gives another name\n")
    for wrong in ([str(source), "-q", "q8_0"], ["nothing"], [str(source), "-q", "IQ2_XS"], [str(source), "--dry-run"]):
        exit_code(["convert", *wrong])
        assert "gives another name" not in capsys.readouterr().err
    assert exit_code(["convert", str(source), "-q", "q8_0"]) == 1
    assert "--force" in capsys.readouterr().err
    assert exit_code(["convert", str(source), "-q", "q8_0", "--force", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "quant", "name"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "Q4_K_M", "Mixtral-8x7B-v0.1-Q4_K_M.gguf"),
        ("org/name@main", "q4_k", "name-Q4_K_M.gguf"),
        ("some/recipe.v2.yaml", "F16", "recipe.v2-F16.gguf"),
        ("my-mixtral-BF16.gguf", "Q5_K_M", "my-mixtral-Q5_K_M.gguf"),
        ("/there/My.fp16.GGUF", "Q8_0", "My-Q8_0.gguf"),
        ("m-q4_k_m-00001-of-00003.gguf", "Q2_K", "m-Q2_K.gguf"),
        ("m-F16-00001-of-00003.gguf", "copy", "m-F16-COPY.gguf"),
        ("Q8_0.gguf", "Q2_K", "Q8_0-Q2_K.gguf"),
        (".", "Q2_K", "here-Q2_K.gguf"),
        ("../here/", "Q2_K", "here-Q2_K.gguf"),
        ("./my-mixtral", "Q2_K", "my-mixtral-Q2_K.gguf"),
    ],
)
def test_names_of_outputs(
    source: str,
    quant: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "stored-elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("my-mixtral").symlink_to(tmp_path / "stored-elsewhere")
    assert str(default_output(source, quant)) == name
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/con.v1", "_con.v1-Q2_K.gguf"),
        ("org/LPT1.x@main", "_LPT1.x-Q2_K.gguf"),
        ("org/con", "con-Q2_K.gguf"),
        ("org/console.v1", "console.v1-Q2_K.gguf"),
        ("a<b>:c?.yaml", "a_b__c_-Q2_K.gguf"),
    ],
)
def test_names_of_outputs_are_allowed_on_windows(source: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    assert str(default_output(source, "Q2_K")) == name


def test_types_that_do_not_fit_the_rows_are_told(
    tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.gguf"
    command = ["convert", str(tiny_checkpoint(n_embd=128, n_ff=256)), "-o", str(output), "-q", "Q4_K_M", "-t", "2"]
    assert exit_code([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    fallbacks = json.loads(out)["fallbacks"]
    tensors = read_header(output).tensors
    assert fallbacks["blk.0.attn_q.weight"] == "Q4_K"
    assert fallbacks["output.weight"] in ("Q4_K", "Q6_K")
    assert not any("ffn_down" in name for name in fallbacks)  # rows of 256
    (told,) = (line for line in err.splitlines() if "not a multiple" in line)
    assert told.startswith(f"{len(fallbacks)} of {len(tensors)} tensors, ")
    assert "% of the weights, are Q5_0, Q8_0 and not Q4_K or Q6_K" in told
    assert told.endswith(": their rows of 128 are not a multiple of 256")
    assert exit_code([*command, "--dry-run"]) == 0
    assert told in capsys.readouterr().out


def test_nothing_is_told_where_all_types_fit(
    tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny_checkpoint(n_embd=128, n_ff=256))
    for quant in ("Q8_0", "F16"):
        assert exit_code(["convert", source, "-o", str(tmp_path / f"{quant}.gguf"), "-q", quant, "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["fallbacks"] == {}
        assert "not a multiple" not in err


def test_json_ends_with_one_object(tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.gguf"
    assert exit_code(["convert", str(tiny_checkpoint()), "-o", str(output), "--json", "--quiet", "--manifest"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert content["files"] == [{"path": str(output), "bytes": output.stat().st_size}]
    assert content["file_type"] == "Q4_K_M"
    assert content["types"].keys() == {"Q4_K", "Q6_K", "F32"}
    assert content["seconds"] > 0
    assert 10**7 < content["peak_memory_bytes"] < 10**10
    assert Path(content["manifest"]).exists()


def test_shards_are_summed_up(tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-o", str(tmp_path / "a.gguf"), "-q", "F16", "--split-max-size", "1M"]
    assert exit_code(["convert", str(tiny_checkpoint()), *arguments]) == 0
    n_files = len(list(tmp_path.glob("a-0*.gguf")))
    assert f"a-00001-of-{n_files:05d}.gguf and {n_files - 1} more" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(tiny_checkpoint(n_layer=1)), "-o", str(tmp_path / "a.gguf"), "--dry-run"]
    assert exit_code([*arguments, "--tensor-type", "ffn_up=q8_0", "--tensor-type", "attn_q=f16"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert any("blk.0.ffn_up_exps.weight" in line and "Q8_0" in line and "2 x 512 x 256" in line for line in table)
    assert any("blk.0.attn_q.weight" in line and "F16" in line for line in table)
    assert table[-1].startswith("in all ")
    assert exit_code([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["files"][0]["path"] == str(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [50, 60, 80])
def test_a_plan_fits_the_terminal(
    columns: int, tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", str(tiny_checkpoint(n_layer=1, n_embd=96)), "-o", "a.gguf", "--dry-run", "-q", "Q4_K_M"]
    assert exit_code(arguments) == 0
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("  blk.0.ffn_up_exps.weight ") for line in lines)
    assert ("2 x 512 x 96" in screen.getvalue()) == (columns >= 60)
    assert "their rows of 96 are not a multiple" in " ".join(screen.getvalue().split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-q", "Q4_X"], 2, "unknown file type"),
        (["--split-max-size", "0"], 2, "not a size"),
        (["-q", "IQ2_XXS"], 1, "--imatrix"),
        (["-o", "/none/a.gguf"], 1, "/none is not a directory"),
        (["--threads", "many"], 2, "threads"),
        (["--fast"], 2, "--fast"),
    ],
)
def test_mistakes_get_one_line(
    tiny_checkpoint: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    output = ["-o", str(tmp_path / "a.gguf")]
    assert exit_code(["convert", str(tiny_checkpoint()), *output, *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SLOWED = """
import itertools, os, select, signal, sys, time
sys.path.insert(0, {root!r})
from ggufmoe.cli.app import main
from ggufmoe.writing import writer

signals, told = os.pipe()
os.set_blocking(told, False)
signal.set_wakeup_fd(told)
writes = itertools.count()

class Slow(writer.PartialFile):
    def write_at(self, offset, data):
        super().write_at(offset, data)
        if next(writes) >= 3:
            select.select([signals], [], [], 60)  # until a signal has come; then each write takes 0.1 s
            time.sleep(0.1)

writer.PartialFile = Slow
main(sys.argv[1:])
"""


def _has_data(path: Path) -> bool:
    """Whether a partial file, which has its full size from the start, holds anything yet."""
    return path.exists() and any(path.read_bytes())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_resume_goes_on_from(tiny_checkpoint: Make, tmp_path: Path, number: int) -> None:
    output = tmp_path / "a.gguf"
    arguments = ["convert", str(tiny_checkpoint(n_layer=4)), "-o", str(output), "-q", "Q8_0"]
    script = SLOWED.format(root=str(Path(__file__).parents[2]))
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "-t", "1"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not _has_data(partial_path(output)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "--resume" in printed[1]
    assert "Traceback" not in printed[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf.partial", "a.gguf.partial.journal"]
    assert exit_code([*arguments, "--resume", "--quiet"]) == 0
    assert exit_code([*arguments[:3], str(tmp_path / "b.gguf"), *arguments[4:], "--quiet"]) == 0
    assert output.read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_an_interrupt_before_the_work_begins_and_a_second_one_are_at_once() -> None:
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    with interrupt.handled():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.is_set()
        interrupt.be_gentle()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_break_of_windows_stops_gently_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = signal.SIGTERM if sys.platform == "win32" else signal.SIGUSR1
    monkeypatch.setattr(signal, "SIGBREAK", stand_in, raising=False)
    monkeypatch.setattr(jobs, "sys", SimpleNamespace(platform="win32"))
    before, interrupt = signal.getsignal(stand_in), Interrupt(gentle=True)
    with interrupt.handled():
        signal.raise_signal(stand_in)
        assert interrupt.is_set()
    assert signal.getsignal(stand_in) is before
    with interrupt.handled(signal.SIGINT):
        assert signal.getsignal(stand_in) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with Interrupt().handled():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
