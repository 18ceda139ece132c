"""``ggufmoe doctor`` at the door of the command line: the table, the JSON and the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggufmoe import doctor
from ggufmoe.cli.app import exit_code

Capture = pytest.CaptureFixture[str]
SOUND = [
    doctor.Finding("software", "program", "ok", "ggufmoe 0"),
    doctor.Finding("kernels", "Q4_K", "note", "ggml, right but slower: [red]no[/red]", "pip install llvmlite"),
]
SICK = doctor.Finding(
    "engine", "CPU answer", "wrong", "a tiny model generates 3 of 20 expected tokens", "compile it " + "again " * 20
)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[doctor.Finding]:
    """What the doctor finds, for the test to fill; the folders that it is given are looked at."""
    findings: list[doctor.Finding] = []

    def examine(folders: dict[str, Path]) -> Iterator[doctor.Finding]:
        assert folders["chats"].name == "ggufmoe"
        yield from findings

    monkeypatch.setattr("ggufmoe.cli.doctor.examine", examine)
    return findings


def test_a_sound_machine(found: list[doctor.Finding], capsys: Capture) -> None:
    found += SOUND
    assert exit_code(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split() for line in out.splitlines() if line] == [
        ["software"],
        ["ok", "program", "ggufmoe", "0"],
        ["kernels"],
        ["note", "Q4_K", "ggml,", "right", "but", "slower:", "[red]no[/red]"],
        ["->", "pip", "install", "llvmlite"],
    ]


@pytest.mark.parametrize("columns", [50, 80])
def test_something_wrong_ends_with_1_and_the_way_out(
    columns: int, found: list[doctor.Finding], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found += [SOUND[0], SICK, SICK]
    assert exit_code(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: engine, CPU answer: a tiny model generates 3 of 20 expected tokens; compile it again")
    assert err.endswith("(and 1 more)\n")
    assert err.count("\n") == 1
    assert "wrong" in out
    assert max(map(len, out.splitlines())) <= columns


def test_a_way_out_that_several_share_is_said_once(found: list[doctor.Finding], capsys: Capture) -> None:
    found += [SOUND[1], SOUND[1], SOUND[0]]
    assert exit_code(["doctor"]) == 0
    assert capsys.readouterr().out.count("-> pip install llvmlite") == 1


def test_json(found: list[doctor.Finding], capsys: Capture) -> None:
    found += [*SOUND, SICK]
    assert exit_code(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["ok"] is False
    assert [doctor.Finding(**check) for check in report["checks"]] == found
    assert err.startswith("error: engine, CPU answer: ")
    found.pop()
    assert exit_code(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
