"""The line of progress: fits, says nothing untrue about the time left, and is gone at the end."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.cli.console import cell_width
from ggufmoe.cli.progress import Pace, ProgressLine, chunk_display, duration, progress_display
from ggufmoe.work import Progress
from tests.placement.shapes import model_of


class Terminal(io.StringIO):
    """A terminal of some encoding."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True

    @property
    def drawn(self) -> list[str]:
        """What stood in the line, one after the other."""
        return [line.rstrip() for line in self.getvalue().split("\r")[1:]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that displays see."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def put(seconds: float) -> None:
        now[0] = seconds

    return put


def line_of(screen: Terminal) -> ProgressLine:
    return ProgressLine("convert Q4_K_M", screen, phase="write", ticking=False)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (40, "convert Q4_K_M ████░░░░  50%  10 s left"),
        (60, "convert Q4_K_M ████░░░░  50%  10 s left  50.0 MB/s"),
        (
            80,
            "convert Q4_K_M ████████░░░░░░░░  50%  10 s left  50.0 MB/s",
        ),
        (
            120,
            "convert Q4_K_M ████████████░░░░░░░░░░░░  50%  10 s left  50.0 MB/s  blk.3.ffn_gate_exps.weight",
        ),
    ],
)
def test_one_line_at_every_width(
    columns: int, shown: str, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    with line_of(screen) as line:
        clock(101)
        line.update(Progress("write", 0, 10**9, "bytes", "output_norm.weight"))
        clock(111)
        line.update(Progress("write", 5 * 10**8, 10**9, "bytes", "blk.3.ffn_gate_exps.weight"))
        assert screen.drawn[-1] == shown
        line.update(Progress("write", 10**9, 10**9, "bytes", "漢字" * 100))
    assert screen.drawn[0] == "convert Q4_K_M: preparing"
    assert screen.drawn[-3:] == ["convert Q4_K_M: finishing", "", ""]
    assert "\n" not in screen.getvalue()
    assert max(map(cell_width, screen.drawn)) < columns


@pytest.mark.parametrize("columns", [20, 60])
def test_hostile_and_wide_names_stay_within_the_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    with ProgressLine("漢" * 99, screen, phase="load", ticking=False) as line:
        for name in ("漢字" * 100, "\x1b[2Jx\n" * 9):
            line.update(Progress("load", 0.5, 1, "parts", name))
            line.update(Progress("write", 1, 3, "bytes", name))
    assert max(map(cell_width, screen.drawn)) < columns
    assert "\x1b" not in screen.getvalue()
    assert "\n" not in screen.getvalue()


def test_terminals_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal("ascii")
    with line_of(screen) as line:
        line.update(Progress("write", 1, 4, "bytes", "x"))
    assert screen.drawn[1] == "convert Q4_K_M ##......  25%  x"


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_written_elsewhere(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal() if quiet else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    for display in (progress_display("x", quiet=quiet), chunk_display("x", str, at_once=1, quiet=quiet)):
        with display as line:
            line.update(Progress("load", 0, 1, "parts"))
            line.update(Progress("chunks", 1, 9, "chunks"))
    assert screen.getvalue() == ""


def test_no_estimate_before_there_is_enough() -> None:
    pace = Pace(0, 0)
    assert pace.left_s(5) is None
    pace.report(10, 100, 1)
    assert pace.left_s(1) is None
    pace.report(10, 1000, 10)
    assert pace.left_s(10) is None
    pace.report(20, 1000, 10)
    assert pace.left_s(10) == 490
    pace.report(20, 10000, 20)
    assert pace.left_s(20) == 9980


def test_the_estimate_counts_down_between_reports() -> None:
    pace = Pace(0, 0)
    pace.report(50, 100, 10)
    assert [pace.left_s(now) for now in (10, 14, 30)] == [10, 6, 0]


def test_what_was_there_already_is_no_speed() -> None:
    pace = Pace(900, 0)
    pace.report(910, 1000, 5)
    assert pace.units_per_s == 2
    assert pace.left_s(5) == 45


@pytest.mark.parametrize(("n_chunks", "left"), [(1, 30), (8, 30), (16, 5), (19, 0)])
def test_chunks_that_are_computed_together(
    n_chunks: int, left: int, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    display = chunk_display("perplexity", str, at_once=8, quiet=False)
    clock(120)
    display.update(Progress("chunks", n_chunks, 20, "chunks", result=7.5))
    bar = "█" * (8 * n_chunks // 20)
    assert screen.drawn == [f"perplexity {bar:░<8} {n_chunks:2}/20  {left} s left  7.5"]


def test_seconds_pass_while_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    with ProgressLine("merge", screen, phase="write"):
        assert screen.drawn == ["merge: preparing"]
        deadline = time.monotonic() + 30
        while "merge: preparing, 1 s" not in screen.drawn and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "merge: preparing, 1 s" in screen.drawn
    assert screen.drawn[-1] == ""


def test_other_phases_have_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    with line_of(screen) as line:
        line.update(Progress("router", 1, 4, "bytes", "layer 1 of 4"))
        line.update(Progress("router", 4, 4, "bytes", "layer 4 of 4"))
        line.update(Progress("load", 0.25, 1, "parts", "m.gguf"))
    assert screen.drawn[1:4] == [
        "router ██░░░░░░  25%  layer 1 of 4",
        "convert Q4_K_M: preparing",
        "loading m.gguf ██░░░░░░  25%",
    ]


def test_warnings_stand_on_lines_of_their_own() -> None:
    screen = Terminal()
    logger, handler = logging.getLogger("ggufmoe"), logging.StreamHandler(screen)
    logger.addHandler(handler)
    try:
        with line_of(screen) as line:
            logger.warning("mind this")
            line.update(Progress("write", 1, 4, "bytes", "x"))
        logger.warning("and that")
    finally:
        logger.removeHandler(handler)
    assert "\rmind this\n\r" in screen.getvalue()
    assert handler.filters == []
    assert screen.getvalue().endswith("\rand that\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_first_sign_of_life_needs_no_array_library(tmp_path: Path) -> None:
    """The line is there before numpy and the writer are imported: they take longer than people wait in silence."""
    code = """
import sys
from ggufmoe.cli import progress
from ggufmoe.cli.app import exit_code
draw = progress.ProgressLine.__enter__
def enter(self):
    print(sorted({"numpy", "llvmlite", "rich"} & sys.modules.keys()))
    return draw(self)
progress.ProgressLine.__enter__ = enter
exit_code(sys.argv[1:])
"""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base_model: x\n", encoding="utf-8")
    for arguments in (["convert", "r.yaml", "-o", "x.gguf"], ["merge", "r.yaml", "out"], ["quantize", "a", "-o", "b"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
        assert done.stdout == "[]\n", done.stderr


def test_convert_on_a_terminal_ends_with_its_summary(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert exit_code(["convert", str(tiny_checkpoint()), "-o", str(tmp_path / "m.gguf"), "-q", "F16"]) == 0
    drawn = screen.drawn
    assert drawn[0] == "convert F16: preparing"
    assert any(re.fullmatch(r"convert F16 \S{8} +\d+%(  \S+)?", line) for line in drawn)
    assert drawn[-1].startswith(f"{tmp_path / 'm.gguf'}:")
    assert drawn[-2] == ""
    assert all(cell_width(line) < 60 for line in drawn[:-1])


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        (["inspect", "m.gguf"], ["inspect: preparing", "", "", "inspect: reading the header", "", ""]),
        (["plan", "m.gguf"], ["plan: preparing", "", "", "plan: looking at devices", "", ""]),
        (["demo", "-q", "nothing"], ["demo: preparing", "", "", "demo: preparing", "", ""]),
        (["worker", "-d", "GPU9"], ["worker: preparing", "", "", "worker: preparing", "", ""]),
    ],
)
def test_a_terminal_is_told_what_is_waited_for(
    arguments: list[str], drawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    model_of(tmp_path / "m.gguf")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    exit_code(arguments)
    assert screen.drawn[: len(drawn) - 1] == drawn[:-1]
