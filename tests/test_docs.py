"""What README and vendor/README promise: commands parse, the library's example runs, tables say what scripts print."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.cli.app import root_command
from ggufmoe.merge.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VENDOR_README = (ROOT / "vendor" / "README.md").read_text(encoding="utf-8")
INSPECTING = (ROOT / "docs" / "inspecting.md").read_text(encoding="utf-8")
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"


def commands(page: str = README) -> list[str]:
    """Every line of a page that begins with ``ggufmoe``, as it would be typed."""
    return re.findall(r"^    (?:\$ )?(ggufmoe .*)$", page, re.MULTILINE)


def arguments_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)[1:]
    redirections = [i for i, word in enumerate(words) if word in ("<", ">", "|")]
    return words[: redirections[0]] if redirections else words


def parse(arguments: list[str]) -> Any:
    """The parameters of the verb; raises what a wrong command line raises. Nothing is run."""
    root = root_command()
    context = root.make_context("ggufmoe", list(arguments))
    name, verb, rest = root.resolve_command(context, arguments)
    return verb.make_context(name, rest, parent=context).params


def test_readme_shows_commands_of_every_verb() -> None:
    verbs = {arguments_of(command)[0] for command in commands()}
    assert verbs >= set(root_command().commands)


@pytest.mark.parametrize("command", commands() + commands(INSPECTING))
def test_commands_in_pages_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(command)
    for word in arguments:
        if word.endswith((".gguf", ".yaml", ".txt")):
            Path(word).touch()
    assert parse(arguments)


def test_a_command_with_a_wrong_flag_does_not_parse() -> None:
    with pytest.raises(Exception, match="--no-such-flag"):
        parse(["convert", "somewhere", "-o", "out.gguf", "--no-such-flag"])


def test_the_two_commands_come_first_and_are_there() -> None:
    head = README.splitlines()[:20]
    for script in ("scripts/demo", "scripts/test"):
        assert any(line.startswith(f"    {script} ") for line in head)
        assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_scripts_that_readme_names_exist() -> None:
    named = set(re.findall(r"scripts/[a-z_./]+[a-z_]", README + VENDOR_README))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_librarys_example_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    assert len([line for line in found[1].splitlines() if line]) <= 8
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint(tokenizer="json", chat_template=TEMPLATE), "my-mixtral")
    names: dict[str, Any] = {}
    exec(found[1], names)
    question, answer = names["chat"].messages
    assert (question.role, answer.role) == ("user", "assistant")
    assert capsys.readouterr().out.strip() == answer.content.strip()


def test_the_recipe_is_one(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert found is not None
    (tmp_path / "recipe.yaml").write_text(found[1], encoding="utf-8")
    recipe, _ = load_recipe(tmp_path / "recipe.yaml")
    assert [len(expert.positive_prompts) for expert in recipe.experts] == [1, 1]


def test_the_table_of_sizes_is_what_the_script_prints() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "file_sizes.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()
    assert len(printed.splitlines()) > 10
    assert printed in README


def test_the_changelog_begins_with_this_version() -> None:
    import ggufmoe

    found = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert found[1].rstrip(",") == ggufmoe.__version__


def samples(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def embedded(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ``model.gguf`` of the samples."""
    from ggufmoe import convert

    folder = tmp_path_factory.mktemp("embedded")
    convert(tiny_checkpoint(tokenizer="json", chat_template=TEMPLATE), folder / "model.gguf", quant="F32")
    return folder


@pytest.mark.parametrize("sample", samples("embedding.md"))
def test_samples_of_embedding_run(sample: str, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(embedded)
    names: dict[str, Any] = {}
    exec(sample, names)
    if "engine" in names:
        names["engine"].close()


def test_the_sample_of_evaluation_runs(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ggufmoe import convert

    monkeypatch.chdir(tmp_path)
    for quant in ("BF16", "Q4_K_M"):
        convert(tiny_checkpoint(n_embd=256, n_ff=256), f"my-{quant}.gguf", quant=quant)
    Path("text.txt").write_text("the model reads a number and writes the sum of two numbers " * 60, encoding="utf-8")
    (sample,) = samples("evaluation.md")
    exec(sample, {})
    assert float(capsys.readouterr().out.split()[0]) > 1
    assert Path("imatrix.gguf").exists()
