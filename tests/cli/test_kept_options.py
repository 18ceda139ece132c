"""Options that are kept: which of flag, variable, preset and file counts, and what is said of a file that is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.cli import chat, run
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.kept_options import KEPT_GROUPS, kept_fields, kept_name, variable
from ggufmoe.errors import InputError
from ggufmoe.folders import config_file
from ggufmoe.options import ChatContextOptions, ContextOptions, OffloadOptions, PromptOptions, SamplingOptions

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: str) -> tuple[int, str, str]:
        return exit_code(args), *capsys.readouterr()

    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``run`` and ``chat`` load and ask; nothing is loaded."""
    found: dict[str, Any] = {}

    def file(model: str, wanted: object, *, quiet: bool = False, asking: object = None) -> Path:
        found["model"], found["wanted"] = model, wanted
        return Path(model)

    class Engine:
        overflow = "shift"

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing was loaded."""

    def load(path: Path, context: ContextOptions, offload: OffloadOptions) -> Engine:
        found["context"], found["offload"] = context, offload
        return Engine()

    def make(engine: Engine, asking: PromptOptions, variables: object, sampling: SamplingOptions) -> None:
        found["asking"], found["sampling"] = asking, sampling
        raise InputError("enough")

    for module in (run, chat):
        monkeypatch.setattr(module, "model_file", file)
        monkeypatch.setattr(module, "load_engine", load)
        monkeypatch.setattr(module, "make_chat", make)
    return found


def write(home: Path, text: str) -> None:
    (home / "config.toml").write_text(text, encoding="utf-8")


def test_the_file_gives_defaults(home: Path, call: Run, seen: dict[str, Any]) -> None:
    write(home, 'temp = 0.25\nctx_size = 512\nkv-offload = false\nstop = ["###", "END"]\nquant = "Q8_0"\n')
    call("chat", "m.gguf")
    assert seen["sampling"].temperature == 0.25
    assert seen["context"] == ChatContextOptions(n_ctx=512)
    assert seen["offload"] == OffloadOptions(kv_offload=False)
    assert seen["wanted"].quant == "Q8_0"


def test_flags_count_before_variables_before_presets_before_the_file(
    home: Path, call: Run, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        home,
        "temp = 0.1\ntop-k = 1\ntop-p = 0.1\nmin-p = 0.1\n"
        "[preset.writer]\nmodel = 'org/name'\nsystem-prompt = 'Write.'\ntemp = 0.2\ntop-k = 2\ntop-p = 0.2\n",
    )
    monkeypatch.setenv("GGUFMOE_TEMPERATURE", "0.3")
    monkeypatch.setenv("GGUFMOE_TOP_K", "3")
    call("chat", "@writer", "--temp", "0.4")
    assert seen["model"] == "org/name"
    assert seen["asking"].system_prompt == "Write."
    sampling = seen["sampling"]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.4, 3, 0.2, 0.1)
    call("chat", "@writer")
    assert seen["sampling"].temperature == 0.3


def test_a_prompt_for_conversations_does_not_reach_raw_text(
    home: Path, call: Run, monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any]
) -> None:
    write(home, "system-prompt = 'Be brief.'\n")
    monkeypatch.setenv("GGUFMOE_CHAT_TEMPLATE", "chatml")
    _, _, err = call("run", "m.gguf", "hello", "--raw")
    assert "--raw takes the text" not in err
    call("run", "m.gguf", "hello")
    assert (seen["asking"].system_prompt, seen["asking"].chat_template) == ("Be brief.", "chatml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature = 1\n", "there is no option temprature; did you mean temperature?"),
        ("yes = true\n", "there is no option yes"),
        ("temp = [[1]]\n", "temp must be a text, a number"),
        ("top-k = 0.5\n", "'0.5'"),
        ("temp = \n", "is not TOML"),
        ("preset = 7\n", "as in [preset.writer]"),
        ("[preset.writer]\ntmp = 1\nmodel = 'x'\n", "[preset.writer]: there is no option tmp"),
        ("[preset.writer]\ntemp = 1\n", "[preset.writer] has no model"),
        ("[preset.other]\nmodel = 'x'\n", "there is no [preset.writer]"),
    ],
)
def test_a_wrong_file_is_one_clear_line(home: Path, call: Run, seen: dict[str, Any], text: str, said: str) -> None:
    write(home, text)
    code, out, err = call("chat", "@writer" if "preset" in text else "m.gguf")
    assert (code, out) == (1, "")
    assert said in err
    assert str(home / "config.toml") in err
    assert len(err.splitlines()) == 1


def test_a_wrong_variable_is_one_clear_line(call: Run, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFMOE_TOP_K", "many")
    code, _, err = call("chat", "m.gguf")
    assert (code, "many" in err, "GGUFMOE_TOP_K" in err, len(err.splitlines())) == (2, True, True, 1)


def test_the_names_of_what_is_kept_are_unique() -> None:
    kept = list(kept_fields())
    assert len({kept_name(one) for one in kept}) == len({variable(one) for one in kept}) == len(kept)
    assert {one.name for one in kept} == {
        one.name for group in KEPT_GROUPS for one in fields(group) if one.metadata["flags"]
    } - {"yes"}
    assert {"GGUFMOE_HOME", "GGUFMOE_CACHE", "GGUFMOE_LIBLLAMA"}.isdisjoint(map(variable, kept))


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGUFMOE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/settings")
    assert config_file() == Path("/settings/ggufmoe/config.toml")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/me"))
    assert config_file() == Path("/Users/me/Library/Application Support/ggufmoe/config.toml")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("APPDATA", "/Roaming")
    assert config_file() == Path("/Roaming/ggufmoe/config.toml")
