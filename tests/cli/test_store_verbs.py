"""MODEL on the command line, and ``list``, ``show``, ``rm``, ``prune``: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from ggufmoe.cli import wanted_model
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.params import model_names, stored_names
from ggufmoe.store.model_store import ModelStore
from tests.tiny import make_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path / "home"))
    return ModelStore()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny", n_layer=1)


@pytest.fixture
def run(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str | Path) -> tuple[int, str, str]:
        return exit_code([str(arg) for arg in args]), *capsys.readouterr()

    return call


def test_a_directory_is_converted_and_run(run: Run, source: Path) -> None:
    args = ("run", source, "-q", "Q8_0", "hello", "--raw", "-n", "2", "--temp", "0", "-t", "1")
    code, out, err = run(*args)
    assert code == 0
    assert f"converts {source} to Q8_0: reads " in err
    assert "stored as tiny-Q8_0" in err
    again = run(*args)
    assert again[:2] == (code, out)
    assert "converts" not in again[2]
    assert run("run", "tiny-Q8_0", *args[4:])[:2] == (code, out)
    code, listed, err = run("list")
    assert (code, listed.split()[:4]) == (0, ["name", "size", "used", "source"])
    assert "tiny-Q8_0" in listed
    assert str(source) in "".join(listed.split())  # a long path goes on in the next line
    assert err.startswith("1 model, ")
    found = json.loads(run("list", "--json")[1])
    assert [model["source"] for model in found["models"]] == [str(source)]


def test_a_recipe_is_run_from_the_store(run: Run, tmp_path: Path, store: ModelStore) -> None:
    for name in ("base", "math"):
        make_checkpoint(tmp_path / name, arch="mistral", n_layer=1)
    (tmp_path / "both.yaml").write_text(
        "base_model: base\ngate_mode: random\ndtype: bfloat16\nexperts:\n"
        "- source_model: base\n  positive_prompts: [a]\n- source_model: math\n  positive_prompts: [b]\n"
    )
    assert run("run", tmp_path / "both.yaml", "-q", "F16", "hello", "--raw", "-n", "2", "-t", "1", "--quiet")[0] == 0
    assert [model.name for model in store.models()] == ["both-F16"]


def test_nothing_on_stderr_when_quiet(run: Run, source: Path) -> None:
    code, _, err = run("run", source, "-q", "F16", "hello", "--raw", "-n", "1", "-t", "1", "--quiet")
    assert (code, err) == (0, "")


def test_what_is_no_model(run: Run) -> None:
    code, out, err = run("run", "nothing", "hello")
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: nothing is neither a file, a stored model, a checkpoint directory nor a name on the hub"
    )
    assert len(err.splitlines()) == 1


def test_an_unknown_type_is_wrong_usage_and_leaves_nothing(run: Run, source: Path, store: ModelStore) -> None:
    code, _, err = run("run", source, "-q", "Q9_K", "hello")
    assert (code, "Q9_K" in err) == (2, True)
    assert not store.directory.exists()


def test_a_model_without_a_chat_template_is_not_made_for_a_conversation(
    run: Run, source: Path, store: ModelStore
) -> None:
    for command in (("chat", source), ("run", source, "hello")):
        code, out, err = run(*command, "-q", "F16")
        assert (code, out, store.directory.exists()) == (1, "", False)
        assert err == (
            f"error: {source}: the model has no chat template: name one with --chat-template NAME|FILE, or continue "
            "plain text with 'run --raw'\n"
        )
    assert run("run", source, "hello", "--chat-template", "nothing")[0] == 2
    assert not store.directory.exists()
    assert run("run", source, "hello", "-q", "F16", "--chat-template", "chatml", "-n", "1", "-t", "1")[0] == 0


def test_a_size_needs_a_text_to_measure_on(run: Run, source: Path, store: ModelStore) -> None:
    code, _, err = run("run", source, "-q", "4.5bpw", "hello", "--raw")
    assert (code, len(err.splitlines()), store.directory.exists()) == (2, 1, False)
    assert f"`ggufmoe convert {source} -q 4.5bpw --sensitivity-text FILE`" in err


def test_large_models_are_asked_for_on_a_terminal_only(
    run: Run, source: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wanted_model, "LARGE_BYTES", 1)
    asked: list[str] = []

    def refuse(text: str, **options: bool) -> None:
        asked.append(text)
        raise typer.Abort

    monkeypatch.setattr("typer.confirm", refuse)
    args = ("run", source, "-q", "Q8_0", "hello", "--raw", "-n", "1", "-t", "1", "--quiet")
    assert run(*args)[0] == 0
    run("rm", "tiny-Q8_0")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(*args)[0] == 130
    assert (asked, store.models()) == (["Go on?"], [])
    assert run(*args, "--yes")[0] == 0


def test_show_and_rm(run: Run, store: ModelStore, source: Path) -> None:
    run("run", source, "-q", "Q8_0", "hello", "--raw", "-n", "1", "-t", "1")
    code, out, _ = run("show", "tiny-Q8_0")
    assert code == 0
    assert f"file        {store.directory / 'tiny-Q8_0.gguf'}" in out
    assert f"source      {source}" in out
    assert json.loads(run("show", "tiny-Q8_0", "--json")[1])["file_type"] == "Q8_0"
    code, _, err = run("rm", "tiny-Q4_0")
    assert (code, "did you mean tiny-Q8_0?" in err) == (1, True)
    code, out, err = run("rm", "tiny-Q8_0")
    assert (code, out) == (0, "")
    assert err.startswith("deleted tiny-Q8_0, ")
    assert "no models in " in run("list")[2]


def test_a_file_that_was_put_there_by_hand(run: Run, store: ModelStore) -> None:
    store.directory.mkdir(parents=True)
    (store.directory / "mine.gguf").write_bytes(b"GGUF")
    assert "put there by hand" in run("list")[1]
    assert "put there by hand" in run("show", "mine")[1]


def test_prune(run: Run, store: ModelStore) -> None:
    store.directory.mkdir(parents=True)
    old, begun = store.directory / "old.gguf", store.directory / "begun.gguf.partial"
    old.write_bytes(b"GGUF")
    begun.write_bytes(b"GG")
    long_ago = time.time() - 100 * 86400
    os.utime(old, (long_ago, long_ago))
    assert "unfinished" in run("list")[1]
    code, _, err = run("prune", "--unused", "90", "--dry-run")
    assert (code, err) == (0, "would delete begun, 2 B\nwould delete old, 4 B\n")
    code, _, err = run("prune")
    assert (code, err) == (0, "deleted begun, 2 B\n1 model deleted, 2 B free again\n")
    with store.making("old"):
        code, _, err = run("prune", "--unused", "90")
    assert (code, old.exists()) == (0, True)
    assert "kept: " in err
    run("prune", "--unused", "90")
    assert not old.exists()


@pytest.mark.parametrize("days", ["-5", "x", "nan"])
def test_prune_refuses_days_that_are_none(run: Run, days: str) -> None:
    code, _, err = run("prune", "--unused", days)
    assert (code, f"expected a number of days, not '{days}'" in err) == (2, True)


def test_names_complete_in_a_shell(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.directory.mkdir(parents=True)
    (store.directory / "mixtral.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "most.yaml").touch()
    (tmp_path / "much.txt").touch()
    assert stored_names("mi") == ["mixtral"]
    assert model_names("m") == ["mixtral", "mine/", "most.yaml"]
    assert model_names("mine/") == ["mine/m.gguf"]
    assert model_names("./mo") == ["./most.yaml"]
