"""``ggufmoe merge`` as its users meet it: help, output, exit codes, signals, tables on narrow terminals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ggufmoe.checkpoint.source import PromptPreference, RouterReport, TextScore
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.router import print_router
from tests.merge.test_merged import TEMPLATE, write_recipe
from tests.tiny import make_checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "base", arch="mistral", seed=1, chat_template=TEMPLATE)
    make_checkpoint(tmp_path / "math", arch="mistral", seed=2)
    return write_recipe(tmp_path, "base", "math")


def test_help_names_the_arguments_and_the_short_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["merge", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("RECIPE.yaml", "OUT_DIR", "--layout", "--max-shard-size", "--router-report", "convert RECIPE.yaml"):
        assert word in text


def test_the_summary_and_the_router_go_to_stderr(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    assert exit_code(["merge", str(recipe), str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Router rows (hidden)" in printed.err
    assert "solve for x" in printed.err
    assert printed.err.splitlines()[-1].startswith(f"{out}: 4.35 MB, ")
    assert (out / "model.safetensors").is_file()


def test_json_is_one_object_on_stdout_and_quiet_says_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    assert exit_code(["merge", str(recipe), str(out), "--json", "--quiet", "--max-shard-size", "2M"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert content["directory"] == str(out)
    assert [Path(file).is_file() for file in content["files"]] == [True] * 3
    assert content["router"]["gate_mode"] == "hidden"
    assert content["bytes_written"] > 4_000_000
    assert exit_code(["merge", str(recipe), str(out), "--quiet", "--force"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "arguments", "code", "message"),
    [
        ("", ["--layout", "new"], 2, "'new' is not one of"),
        ("", ["--max-shard-size", "big"], 2, "'big' is not a size"),
        ("", ["--router-report", "nowhere/report.json"], 1, "nowhere is not a directory; make it first"),
        ("zzz: 1", [], 1, "mixture.yaml:9: zzz: unknown key"),
        ("dtype: int8", [], 1, "unknown dtype 'int8'"),
        ("base_model: base", [], 1, "base_model is given twice; keep one"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    recipe.write_text(recipe.read_text() + change)
    assert exit_code(["merge", str(recipe), str(recipe.parent / "out"), *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert {path.name for path in recipe.parent.iterdir()} == {"base", "math", "mixture.yaml"}


def test_models_that_cannot_be_opened_are_named_with_their_place(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text()
    for name in ("maths", "./maths"):
        recipe.write_text(text.replace("source_model: math", f"source_model: {name}"))
        assert exit_code(["merge", str(recipe), str(recipe.parent / "out")]) == 1
        error = capsys.readouterr().err
        assert "mixture.yaml:8: experts.1.source_model: " in error
        assert f"{recipe.parent / 'maths'} does not exist; give a checkpoint directory or a hub id" in error


def test_relative_models_start_at_the_recipes_folder(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "base").mkdir()
    monkeypatch.chdir(elsewhere)
    assert exit_code(["merge", str(recipe), "out", "--quiet"]) == 0
    assert (elsewhere / "out" / "config.json").is_file()


def test_a_hub_that_does_not_answer_is_told_with_the_place(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe.write_text(recipe.read_text().replace("source_model: math", "source_model: org/maths"))
    assert exit_code(["merge", str(recipe), str(recipe.parent / "out")]) == 1
    error = capsys.readouterr().err
    assert "mixture.yaml:8: experts.1.source_model: org/maths is not in the cache" in error
    assert "no directory either" in error
    assert error.count("\n") == 1


def test_the_current_directory_is_no_place_for_a_checkpoint(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["merge", str(recipe), "."]) == 1
    assert "no name of a new directory; give one" in capsys.readouterr().err


SLOWED = """
import sys, time
sys.path.insert(0, {root!r})
from ggufmoe.cli.app import main
from ggufmoe.writing import writer
from ggufmoe.merge import router

class Slow(writer.PartialFile):
    def write_at(self, offset, data):
        time.sleep(0.1)
        super().write_at(offset, data)

class SlowPass(router.ForwardPass):
    def layers(self, prompts):
        for state in super().layers(prompts):
            time.sleep({router_s})
            yield state

writer.PartialFile = Slow
router.ForwardPass = SlowPass
main(sys.argv[1:])
"""


def interrupted(arguments: list[str], router_s: float, sign: Path) -> tuple[int, str]:
    """Exit code and stderr of a run that gets Ctrl-C once ``sign`` is there."""
    script = SLOWED.format(root=str(Path(__file__).parents[2]), router_s=router_s)
    command = [sys.executable, "-c", script, *arguments, "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=200)
    return process.returncode, error


def test_an_interrupt_while_the_router_is_made_leaves_nothing(recipe: Path) -> None:
    out = recipe.parent / "out"
    code, error = interrupted(["merge", str(recipe), str(out)], 1.0, recipe.parent / "out.partial")
    assert code == 130
    assert "Traceback" not in error
    assert not list(recipe.parent.glob("out*"))


def test_an_interrupt_while_writing_leaves_what_resume_goes_on_from(recipe: Path) -> None:
    out, partial = recipe.parent / "out", recipe.parent / "out.partial"
    arguments = ["merge", str(recipe), str(out)]
    code, error = interrupted(arguments, 0.0, partial / "model.safetensors.partial.journal")
    assert code == 130
    assert "--resume" in error
    assert "Traceback" not in error
    assert not out.exists()
    assert exit_code([*arguments, "--resume", "--quiet"]) == 0
    assert exit_code(["merge", str(recipe), str(recipe.parent / "whole"), "--quiet"]) == 0
    for path in out.iterdir():
        assert path.read_bytes() == (recipe.parent / "whole" / path.name).read_bytes()
    assert not partial.exists()


def report_of(n_expert: int, prompt: str) -> RouterReport:
    weights = (0.0, 1.0) + (0.0,) * (n_expert - 2)
    cosines = tuple(tuple(1.0 if i == j else 0.25 for j in range(n_expert)) for i in range(n_expert))
    return RouterReport(
        gate_mode="hidden",
        cosines=(cosines,) * 20,
        condition_numbers=(1.5,) * 18 + (1e9, float("inf")),
        preferences=tuple(PromptPreference(expert, expert == 0, prompt, (weights,) * 20) for expert in range(2)),
    )


def drawn(report: RouterReport, columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    print_router(report, stream)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("n_expert", [2, 8])
@pytest.mark.parametrize("columns", [50, 80])
def test_tables_fit_the_terminal(columns: int, n_expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(report_of(n_expert, "Calculate the answer to this math problem " * 3), columns, monkeypatch)
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    assert "Calculate the" in text
    assert "…" in text
    assert "│ +0 " in text
    assert "│ −1 " in text
    # two experts have a column each; eight leave no room for the prompt, so the favourite alone is named
    assert ("100% │" in text and "to 1" in text) if n_expert == 2 else "1 (100%) │" in text


def test_few_layers_are_shown_with_the_last_and_the_degenerate_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(report_of(2, "x"), 80, monkeypatch)
    layers = [line for line in lines if "+0.250" in line]
    assert len(layers) == 8
    assert layers[0].split()[1] == "0"
    assert layers[-1].split()[1] == "19"
    assert "inf !" in layers[-1]
    assert "In 2 of 20 layers the experts' rows are nearly alike" in "\n".join(lines)


def test_of_many_prompts_and_experts_the_first_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(300, "x")
    many = replace(report, preferences=report.preferences * 500)
    lines = drawn(many, 100_000, monkeypatch)
    assert sum("1 (100%)" in line for line in lines) == 100
    assert "and 900 more; --router-report FILE writes all" in lines


def test_prompts_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are no markup, and nothing in a recipe steers the terminal."""
    text = "\n".join(drawn(report_of(2, "[/INST] [bold]two[/bold]\n\x1b[31mlines"), 80, monkeypatch))
    assert "[/INST] [bold]two[/bold] \ufffd[31mlines" in text
    assert "\x1b" not in text


def test_a_random_router_has_no_prompts_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    report = RouterReport("random", (((1.0,),),), (1.0,), ())
    lines = drawn(report, 80, monkeypatch)
    assert lines[0] == "Router rows (random)"
    assert not any("prompt" in line for line in lines)


def test_what_fitting_gained_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"base": 2.0, "expert 0": 2.0, "expert 1": 0.5, "uniform": 0.7, "fitted": 0.6}
    worse = losses | {"fitted": 0.8, "hidden": 0.9}
    scores = (TextScore(1, "sums.jsonl", 900, 200, losses, 0.75, 0.8), TextScore(0, "[a].txt", 9, 2, worse, 0.5, 0.25))
    lines = drawn(replace(report_of(2, "x"), preferences=(), scores=scores), 80, monkeypatch)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "│ 1   │ sums.jsonl │" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert ["1", "sums.jsonl", "0.500", "2.000", "0.700", "0.600", "75%", "80%"] in cells
    assert ["0", "[a].txt", "2.000", "2.000", "0.700", "0.800 !", "50%", "25%"] in cells
    assert "nearly alike; texts that differ more" in text
