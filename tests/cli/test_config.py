"""``ggufmoe config``: what it shows, and that its commands change one thing in a file that people write by hand."""

from __future__ import annotations

import json
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.cli.kept_changes import keep
from ggufmoe.cli.kept_options import read_config
from ggufmoe.cli.toml_edit import LayoutError, with_value, without_value

Call = Callable[..., tuple[int, str, str]]

BY_HAND = """\
# what I like
temp = 0.7   # warm, not # hot
stop = [
  "###",  # of a template
  "END",
]
"ctx-size"=8192

# for stories
[preset.writer]
model = "org/name"
system-prompt = \"\"\"
You write
= short stories.\"\"\"

[preset.coder]
model = "org/other"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "config.toml"


@pytest.fixture
def call(file: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def config(*args: str) -> tuple[int, str, str]:
        return exit_code(["config", *args]), *capsys.readouterr()

    return config


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text.encode())


@pytest.mark.parametrize(
    ("path", "value", "old", "new"),
    [
        (("temp",), 0.5, "temp = 0.7   #", "temp = 0.5   #"),
        (("stop",), ["x"], BY_HAND[BY_HAND.index("stop") : BY_HAND.index('"ctx')], 'stop = ["x"]\n'),
        (("ctx-size",), 1, '"ctx-size"=8192', '"ctx-size"= 1'),
        (("top-k",), 1, "8192\n", "8192\ntop-k = 1\n"),
        (("preset", "writer", "model"), 'a"\\\n', '"org/name"', '"a\\"\\\\\\n"'),
        (("preset", "writer", "temp"), 1.0, '."""\n', '."""\ntemp = 1.0\n'),
        (("preset", "new one", "temp"), 1, 'other"\n', 'other"\n\n[preset."new one"]\ntemp = 1\n'),
        (("repack",), False, "8192\n", "8192\nrepack = false\n"),
    ],
)
def test_only_the_key_changes(path: tuple[str, ...], value: object, old: str, new: str) -> None:
    assert BY_HAND.count(old) == 1
    assert with_value(BY_HAND, path, value) == BY_HAND.replace(old, new)  # type: ignore[arg-type]
    crlf = BY_HAND.replace("\n", "\r\n")
    assert with_value(crlf, path, value) == crlf.replace(old.replace("\n", "\r\n"), new.replace("\n", "\r\n"))  # type: ignore[arg-type]


def test_what_is_taken_out_leaves_comments() -> None:
    assert "stop" not in without_value(BY_HAND, ("stop",))
    without_writer = without_value(BY_HAND, ("preset", "writer"))
    begin, end = BY_HAND.index("[preset.writer]"), BY_HAND.index("\n[preset.coder]")
    assert without_writer == BY_HAND[:begin] + BY_HAND[end:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a = true\n"),
        ("# mine", "# mine\na = true\n"),
        ("[t]\nb = 1\n", "a = true\n\n[t]\nb = 1\n"),
        ("b = 1", "b = 1\na = true\n"),
    ],
)
def test_where_a_new_key_goes(text: str, expected: str) -> None:
    assert with_value(text, ("a",), True) == expected


@pytest.mark.parametrize(
    "text", ["preset = {w = {temp = 1}}\n", "preset.w.model = 'x'\n", "[preset]\nw = {temp = 1}\n"]
)
def test_other_layouts_are_left_alone(text: str) -> None:
    with pytest.raises(LayoutError):
        with_value(text, ("preset", "w", "top-k"), 1)


def test_set_and_unset(file: Path, call: Call) -> None:
    assert call("set", "temp", "0.25") == (0, "", f"{file}: temp = 0.25\n")
    assert call("set", "t", "8")[0] == call("set", "stop", "###", "END")[0] == call("set", "ngl", "all")[0] == 0
    assert call("set", "n-predict", "-1")[0] == 0
    assert (
        file.read_text()
        == 'temperature = 0.25\nthreads = 8\nstop = ["###", "END"]\nn-gpu-layers = "all"\nn-predict = -1\n'
    )
    write(file, BY_HAND)
    call("set", "temperature", "0.1")
    assert "temp = 0.1   # warm, not # hot\n" in file.read_text()
    assert call("unset", "temperature", "@writer.system-prompt", "@coder")[0] == 0
    assert set(read_config().values) == {"stop", "n_ctx"}
    assert read_config().presets == {"writer": {"model": "org/name"}}
    code, _, err = call("unset", "temp")
    assert (code, err) == (1, f"error: temp is not in {file}; `ggufmoe config` shows what is\n")


def test_changes_at_the_same_time_are_all_kept(file: Path) -> None:
    keys = ["temp", "top-k", "seed", "n-predict", "threads", "ctx-size", "@a.temp", "@b.temp"]
    with ThreadPoolExecutor(len(keys)) as pool:
        assert {path for path, _ in pool.map(lambda key: keep(key, ["7"]), keys)} == {file}
    config = read_config()
    assert len(config.values) == 6
    assert set(config.presets) == {"a", "b"}
    assert list(file.parent.glob("*.lock")) == []


def test_one_option_under_two_names_becomes_one(file: Path, call: Call) -> None:
    write(file, "temp = 0.1\ntemperature = 0.2\n")
    call("set", "temp", "0.3")
    assert file.read_text() == "temp = 0.3\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("set", "temprature", "1"), "there is no option temprature; did you mean temperature?"),
        (("set", "yes", "true"), "there is no option yes"),
        (("set", "temp", "warm"), "temperature: expected a number, not 'warm'"),
        (("set", "temp", "-1"), "--temperature must be between 0 and"),
        (("set", "temp", "1", "2"), "temperature takes one value"),
        (("set", "repack", "perhaps"), "repack must be true or false, not perhaps"),
        (("set", "think", "perhaps"), "--think must be one of auto, on, off, not perhaps"),
        (("set", "@writer", "x"), "@writer is a preset; name an option of it, for example @writer.temp"),
        (("set", "@wri ter.temp", "1"), "a preset's name has letters"),
        (("set", "temp"), "VALUE is missing; for example: ggufmoe config set temp 0.7"),
        (("preset", "writer", "--temp", "1"), "@writer is new: name its model"),
        (("preset", "writer", "org/name", "--top-k", "x"), "'x'"),
        (("preset", "writer", "org/name", "-y"), "--yes is not kept"),
        (("sett", "temp", "1"), "no such command: sett; did you mean set or"),
    ],
)
def test_what_is_refused_is_one_line_and_changes_nothing(file: Path, call: Call, args: list[str], said: str) -> None:
    code, out, err = call(*args)
    assert (code, out, file.exists()) == (2, "", False)
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_preset_is_made_and_changed_by_flags(file: Path, call: Call, tmp_path: Path) -> None:
    assert (
        call("preset", "writer", "org/name", "-sys", "You write.", "--temp", "1", "--stop", "#", "--no-repack")[0] == 0
    )
    values = {"model": "org/name", "system_prompt": "You write.", "temperature": "1.0", "stop": ["#"], "repack": False}
    assert read_config().presets == {"writer": values}
    assert call("preset", "writer", "--temp", "0.5")[0] == 0
    assert call("set", "@writer.top-k", "7")[0] == 0
    assert read_config().presets["writer"]["temperature"] == "0.5"
    assert read_config().presets["writer"]["top_k"] == "7"


def test_paths_are_kept_from_the_root(file: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    call("set", "prompt-cache", "cache")
    call("preset", "mine", "m.gguf")
    assert read_config().values["prompt_cache"] == str(tmp_path / "cache")
    assert read_config().presets["mine"]["model"] == str(tmp_path / "m.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_a_link_and_who_may_read_the_file_stay(file: Path, call: Call, tmp_path: Path) -> None:
    call("set", "temp", "1")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.rename(tmp_path / "mine.toml")
    file.symlink_to(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").chmod(0o640)
    call("set", "temp", "2")
    assert file.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_a_key_that_a_later_version_dropped_can_be_taken_out(file: Path, call: Call) -> None:
    write(file, "gone = 1\ntemp = 1\n")
    assert call()[0] == 1
    assert call("unset", "gone")[0] == 0
    assert file.read_text() == "temp = 1\n"


def test_it_shows_where_each_value_comes_from(file: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call() == (0, "", f"{file} does not exist; `ggufmoe config set temp 0.7` makes it\n")
    file.parent.mkdir()
    write(file, call("--example")[1])
    monkeypatch.setenv("GGUFMOE_CTX_SIZE", "1024")
    code, out, err = call()
    assert (code, err) == (0, f"{file}\n")
    rows = [line.split(maxsplit=1) for line in out.splitlines()]
    assert [" ".join(row[1].split()) for row in rows if row[0] in ("temperature", "ctx-size", "@writer.model")] == [
        "0.7 file",
        "1024 GGUFMOE_CTX_SIZE",
        "org/name file",
    ]
    found = json.loads(call("--all", "--json")[1])
    origins = {one["name"]: (one["value"], one["origin"]) for one in found["options"]}
    assert origins["ctx-size"] == ("1024", "environment")
    assert origins["temperature"] == ("0.7", "file")
    assert origins["top-k"] == ("default (the model's, else 50)", "default")
    assert found["presets"]["writer"]["temperature"] == "1.0"
    assert call("path") == (0, f"{file}\n", "")
    assert "temperature  " in call("--keys")[2]


def test_a_value_that_its_option_refuses_is_named(file: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "[preset.writer]\nmodel = 'x'\ntop-k = 'many'\n")
    code, _, err = call()
    assert (code, err) == (1, f"error: {file}, [preset.writer]: top-k: expected a whole number, not 'many'\n")
    monkeypatch.setenv("GGUFMOE_TEMPERATURE", "hot")
    assert call()[2].startswith("error: GGUFMOE_TEMPERATURE: temperature: ")


def test_edit_opens_the_file_and_checks_it(
    file: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor.py"
    editor.write_text("import sys\nopen(sys.argv[1], 'a').write('tmp = 1\\n')\n")
    monkeypatch.setenv("VISUAL", " ")
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    monkeypatch.setenv("EDITOR", join([sys.executable, str(editor)]))
    code, _, err = call("edit")
    assert (code, "there is no option tmp" in err) == (1, True)
    assert file.read_text().startswith("# temp = 0.7\n")


def test_an_editor_whose_path_has_spaces_is_started() -> None:
    from ggufmoe.cli.config import _editor_command

    path = Path("config.toml")
    windows = _editor_command('"C:\\Program Files\\e.exe" -w', path, is_windows=True)
    assert windows == '"C:\\Program Files\\e.exe" -w "config.toml"'
    assert _editor_command("'/opt/my editor' -w", path, is_windows=False) == ["/opt/my editor", "-w", "config.toml"]


def test_keys_complete_in_a_shell(file: Path, call: Call) -> None:
    from ggufmoe.cli.config import _kept_keys, _keys

    write(file, BY_HAND)
    assert _keys("tempe") == ["temperature"]
    assert _kept_keys("@w") == ["@writer", "@writer.model", "@writer.system-prompt"]
