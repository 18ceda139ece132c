"""The door of the command line: help, usage, errors and exit codes."""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import ggufmoe
from ggufmoe.cli import app
from ggufmoe.errors import Cancelled, GGUFError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Adds a verb ``try`` that runs the given function."""

    def add(function: Callable[[], None]) -> None:
        monkeypatch.setitem(sys.modules, "verb_for_test", SimpleNamespace(command=function))
        monkeypatch.setattr(app, "VERBS", (*app.VERBS, app.Verb("try", "verb_for_test:command", "For the test.")))

    return add


@pytest.fixture(autouse=True)
def same_logging() -> object:
    """The handler that the command line adds does not stay."""
    logger = logging.getLogger("ggufmoe")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers, logger.level = before
    logger.setLevel(before[1])


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in app.VERBS:
        assert verb.name in out


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = ["numpy", "numba", "llvmlite", "llama_cpp", "gguf", "safetensors"]
    heavy += ["jinja2", "huggingface_hub", "prompt_toolkit"]
    code = (
        "import sys, ggufmoe; from ggufmoe.cli.app import exit_code; exit_code(['--help']);"
        f"print('LOADED', [name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("name", [verb.name for verb in app.VERBS])
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code([name, "--help"]) == 0
    assert f"ggufmoe {name}" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("name", [verb.name for verb in app.VERBS])
def test_help_has_every_flag_whole(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert app.exit_code([name, "--help"]) == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    command = app._load(name)
    for parameter in command.params:
        for flag in (*parameter.opts, *parameter.secondary_opts) if parameter.param_type_name == "option" else ():
            assert flag in words


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the stream")
def test_a_closed_stdout_is_no_defect() -> None:
    command = shlex.join([sys.executable, "-m", "ggufmoe", "--version"])
    done = subprocess.run(["sh", "-c", f"{command} >&- <&-"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_is_in_parts_and_names_arguments_in_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(["route", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Usage: ggufmoe route [OPTIONS] MODEL [PROMPT]"
    parts = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert parts == ["Arguments:", "Options:", "Route options:", "Context options:", "Offload options:"]
    app.exit_code(["bench", "--help"])
    assert capsys.readouterr().out.startswith("Usage: ggufmoe bench [OPTIONS] MODEL...\n")


def test_every_verb_says_in_the_list_what_it_says_itself() -> None:
    for verb in app.VERBS:
        module, function = verb.target.split(":")
        assert inspect.getdoc(getattr(importlib.import_module(module), function))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"ggufmoe {ggufmoe.__version__}\n"


@pytest.mark.parametrize("module", ["ggufmoe", "ggufmoe.cli.app"])
def test_it_runs_as_a_module(module: str) -> None:
    code = ["-m", "ggufmoe"] if module == "ggufmoe" else ["-c", "from ggufmoe.cli.app import main; main()"]
    result = subprocess.run([sys.executable, *code, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("ggufmoe ")


def test_ctrl_c_while_modules_are_imported_is_one_line() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "ggufmoe.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from ggufmoe.__main__ import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: stopped\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["conver"], "error: no such command: conver; did you mean convert? (see 'ggufmoe --help')\n"),
        (["zzz"], "error: no such command: zzz; there are convert, "),
        (["run", "m.gguf", "hi", "--tempp", "1"], "--temp"),
        (["run"], "error: Missing argument 'model'. (see 'ggufmoe run --help')\n"),
        (["run", "m.gguf", "-hello"], "No such option: -e; a PROMPT that begins with - stands after --"),
        (["run", "m.gguf", "hi", "--temp", "999"], "--temperature must be between 0 and 100, not 999"),
        (["run", "m.gguf", "hi", "--keep", "-2"], "--keep must be at least -1, not -2"),
        (["run", "m.gguf", "hi", "-lm", "fast"], "'-lm' / '--load-mode': 'fast' is not one of 'auto', "),
        (["--nonsense"], "error: No such option"),
        (["--debug"], "error: Missing command. (see 'ggufmoe --help')\n"),
    ],
)  # fmt: skip
def test_wrong_usage(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.lower() in err.lower()
    assert err.count("\n") == 1


def test_no_arguments_give_help_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code([]) == 2
    out, err = capsys.readouterr()
    assert "inspect" in out + err
    assert "error:" not in out + err


def test_a_known_error_is_one_line(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise GGUFError("model.gguf: cut\n  short")

    verb(command)
    assert app.exit_code(["try"]) == 1
    assert capsys.readouterr() == ("", "error: model.gguf: cut short\n")
    assert app.exit_code(["try", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: model.gguf: cut short\n")


@pytest.mark.parametrize(("error", "code"), [(Cancelled("stopped"), 130), (KeyboardInterrupt(), 130)])
def test_interrupted(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def command() -> None:
        raise error

    verb(command)
    assert app.exit_code(["try"]) == code
    assert capsys.readouterr().err == "error: stopped\n"


def test_a_defect_is_one_line_with_the_way_to_more(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise KeyError("oops")

    verb(command)
    assert app.exit_code(["try"]) == 1
    err = capsys.readouterr().err
    assert err == "error: KeyError: 'oops' (a defect of ggufmoe; 'ggufmoe --debug ...' shows where)\n"
    assert app.exit_code(["--debug", "try"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000), f"{'a' * 200}: File name too long"),
        (OSError("odd"), "odd"),
    ],
)
def test_what_the_system_refuses_is_no_defect(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], error: OSError, message: str
) -> None:
    def command() -> None:
        raise error

    verb(command)
    assert app.exit_code(["try"]) == 1
    assert capsys.readouterr().err == f"error: {message} (an answer of the operating system)\n"
    assert app.exit_code(["--debug", "try"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_main_leaves_with_the_exit_code() -> None:
    with pytest.raises(SystemExit) as left:
        app.main(["zzz"])
    assert left.value.code == 2


def test_warnings_of_the_library_are_shown(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        logging.getLogger("ggufmoe.sampling").warning("odd")
        logging.getLogger("ggufmoe.sampling").info("usual")
        logging.getLogger("ggufmoe.llama").error("native")

    verb(command)
    assert app.exit_code(["try"]) == 0
    assert capsys.readouterr().err == "warning: odd\n"
    assert app.exit_code(["--debug", "try"]) == 0
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "ggufmoe.sampling: odd",
        "ggufmoe.sampling: usual",
        "ggufmoe.llama: native",
    ]


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys, types; from ggufmoe.cli import app\n"
        "def command():\n"
        "    for i in range(100000): print('line', i, flush=True)\n"
        "sys.modules['v'] = types.SimpleNamespace(command=command)\n"
        "app.VERBS = (app.Verb('try', 'v:command', 'x'),)\n"
        "app.main(['try'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(20)
