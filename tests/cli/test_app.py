"""The door of the command line: help, usage, errors and exit codes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ggufmoe
from ggufmoe.cli import app
from ggufmoe.errors import Cancelled, EngineMissingError, GGUFError
from ggufmoe.native import library as native
from ggufmoe.native import lookup as engine_lookup
from ggufmoe.native.library import PINNED_ENGINE


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


def words_of_options(command: Any) -> set[str]:
    """Words of the help texts in which a line could be broken though it must not: those with hyphens."""
    texts = [parameter.help or "" for parameter in command.params if hasattr(parameter, "help")]
    return {word for text in [command.help or "", *texts] for word in text.split() if "-" in word}


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", [verb.name for verb in app.VERBS])
def test_help_fits_the_terminal_and_splits_no_word(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert app.exit_code([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert words_of_options(app._load(name)) <= set(out.split())
    assert not re.search(r"\.0\]|<=x|[a-z.] {2}\[|\u2011|\u00a0", out)
    assert not re.search(r"\[default:\n", out) or columns == 60


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_first_help_says_how_to_begin(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert app.exit_code([]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "\nExamples:\n  ggufmoe demo\n  ggufmoe chat " in out
    assert out.endswith("\n\nOptions and examples of a command: ggufmoe COMMAND --help\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--help"], ["plan", "--quiet"]])
def test_a_terminal_shows_at_once_that_a_verb_starts(arguments: list[str]) -> None:
    """The line is there before the verb's modules are imported, and gone when they are."""
    code = """
import sys
from ggufmoe.cli import app
load = app._load
def slow(name):
    print("loading")
    return load(name)
app._load = slow
app.main(sys.argv[1:])
"""
    screen = on_a_terminal([sys.executable, "-c", code, *arguments])
    if arguments == ["plan"]:
        assert screen.startswith(
            "\rplan: preparingloading\r\n\r" + " " * (len("plan: preparing") + 8) + "\rerror: MODEL is missing"
        )
    else:
        assert screen.startswith("loading\r\n")


def on_a_terminal(command: list[str]) -> str:
    """What a command writes to the terminal that is its stdout and stderr."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdout=child, stderr=child, stdin=child)
    os.close(child)
    written = b""
    with contextlib.suppress(OSError):  # Linux's answer when the last process has closed the terminal
        while piece := os.read(parent, 1 << 16):
            written += piece
    os.close(parent)
    process.wait()
    return written.decode()


def in_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which ``ggufmoe`` is the program."""
    command = shlex.join([sys.executable, "-m", "ggufmoe"])
    return subprocess.run(["sh", "-c", f'ggufmoe() {{ {command} "$@"; }}; {line}'], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the stream")
@pytest.mark.parametrize("arguments", ["--version", "--help", "run --help"])
def test_a_closed_stdout_is_an_error_that_says_where(arguments: str) -> None:
    done = in_a_shell(f"ggufmoe {arguments} >&- <&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: stdout: Bad file descriptor (reported by the operating system)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_stdout_is_an_error_that_says_where() -> None:
    done = in_a_shell("ggufmoe --version > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: stdout: No space left on device (reported by the operating system)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-"])
def test_what_stderr_does_not_take_is_lost_and_changes_no_exit_code(where: str) -> None:
    assert in_a_shell(f"ggufmoe --version {where}").returncode == 0
    assert in_a_shell(f"ggufmoe --nonsense {where}").returncode == 2
    assert in_a_shell(f"ggufmoe inspect nothing.gguf {where}").returncode == 1
    warn = "from ggufmoe.cli import app; app._open_streams(); app._say('note', 0)"
    done = in_a_shell(f"exec {shlex.quote(sys.executable)} -c {shlex.quote(warn)} {where}")
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the stream")
def test_errors_keep_their_exit_code_with_closed_streams() -> None:
    assert in_a_shell("ggufmoe --nonsense >&-").returncode == 2
    assert in_a_shell("ggufmoe --nonsense >&- 2>&- <&-").returncode == 2
    assert in_a_shell("ggufmoe inspect nothing.gguf >&- 2>&-").returncode == 1


@pytest.mark.parametrize("verb", app.VERBS, ids=lambda verb: verb.name)
def test_examples_end_the_help_and_parse(
    verb: app.Verb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert app.exit_code([verb.name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-len(verb.examples) - 1 :] == ["Examples:", *(f"  {example}" for example in verb.examples)]
    monkeypatch.chdir(tmp_path)
    assert any(example.startswith(f"ggufmoe {verb.name}") for example in verb.examples)
    for example in verb.examples:
        assert len(example) <= 58
        words = shlex.split(example)
        name, *arguments = words[1 : words.index("<")] if "<" in words else words[1:]
        for word in arguments:
            if word.endswith((".gguf", ".yaml", ".txt")):
                Path(word).touch()
        app._load(name).make_context(name, arguments)  # raises what a wrong command line raises


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """What bash is offered for the last word of a line."""

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_GGUFMOE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        with pytest.raises(SystemExit) as left:
            app.exit_code([])
        assert left.value.code == 0
        return capsys.readouterr().out.split()

    return ask


def test_a_shell_completes_verbs_flags_types_and_devices(
    completed: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggufmoe.placement import devices

    assert completed("ggufmoe con") == ["convert", "config"]
    assert completed("ggufmoe convert --quant") == ["--quant", "--quantizer"]
    assert completed("ggufmoe convert m -q q5_k") == ["q5_k_s", "q5_k_m"]
    assert completed("ggufmoe demo -q Q8") == ["Q8_0"]
    assert completed("ggufmoe quantize m --output-tensor-type Q6") == ["Q6_K"]
    assert completed("ggufmoe convert m --quantizer ") == ["auto", "fast", "ggml"]
    places = [SimpleNamespace(name=name) for name in ("CUDA0", "CUDA1")]
    monkeypatch.setattr(devices, "find_devices", lambda: SimpleNamespace(places=places))
    assert completed("ggufmoe run m -dev ") == ["CUDA0", "CUDA1", "none"]
    assert completed("ggufmoe run m -dev CUDA1,CU") == ["CUDA1,CUDA0"]


def test_completion_without_an_engine(completed: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from ggufmoe.placement import devices

    def missing() -> object:
        raise EngineMissingError("no engine")

    monkeypatch.setattr(devices, "find_devices", missing)
    assert completed("ggufmoe run m -dev ") == ["none"]


def test_help_is_in_parts_and_names_arguments_in_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(["route", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Usage: ggufmoe route [OPTIONS] MODEL [PROMPT]"
    parts = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert parts == [
        "Arguments:",
        "Options:",
        "Route options:",
        "Model options:",
        "Context options:",
        "Offload options:",
        "Examples:",
    ]
    app.exit_code(["bench", "--help"])
    assert capsys.readouterr().out.startswith("Usage: ggufmoe bench [OPTIONS] MODEL...\n")


def test_every_verb_says_in_the_list_what_it_says_itself() -> None:
    for verb in app.VERBS:
        module, function = verb.target.split(":")
        assert inspect.getdoc(getattr(importlib.import_module(module), function))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(["--version"]) == 0
    own, engine = capsys.readouterr().out.splitlines()
    assert own == f"ggufmoe {ggufmoe.__version__}"
    assert engine == f"llama-cpp-python {PINNED_ENGINE.package}, llama.cpp {PINNED_ENGINE.llama_cpp_commit[:9]}"


def test_version_of_another_engine_or_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made_for = f"(made for llama-cpp-python {PINNED_ENGINE.package}, llama.cpp {PINNED_ENGINE.llama_cpp_commit[:9]})"
    monkeypatch.setattr(engine_lookup, "version", lambda _: "0.2.1")
    assert app.exit_code(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"llama-cpp-python 0.2.1 {made_for}"

    monkeypatch.setattr(engine_lookup, "find_spec", lambda _: None)
    assert app.exit_code(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"llama-cpp-python is not installed {made_for}"


def test_version_of_a_library_by_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = [run_version(tmp_path / "libllama.so"), run_version(native.found_library().path)]
    assert told[0].startswith("no engine (made for llama-cpp-python")
    assert f"{engine_lookup.SETTING}={tmp_path / 'libllama.so'} is not used: there is no libllama.so at" in told[0]
    path = native.found_library().path
    assert told[1].startswith(f"{engine_lookup.SETTING}={path} at {path} (made for llama-cpp-python")


def run_version(library: Path) -> str:
    """The line about the engine of ``ggufmoe --version`` where the setting names ``library``."""
    environment = os.environ | {engine_lookup.SETTING: str(library)}
    command = [sys.executable, "-m", "ggufmoe", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()[1]


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
        (["run"], "error: MODEL is missing; for example: ggufmoe run model.gguf"),
        (["chat", "m.gguf", "--ctx", "512"], "error: no such option: --ctx; did you mean --ctx-size? (see"),
        (["run", "m.gguf", "What", "is", "it"], "(is it); a PROMPT of several words stands in quotation marks (see"),
        (["chat", "m.gguf", "Hi"], "(Hi); 'ggufmoe run MODEL PROMPT' gives a single answer (see 'ggufmoe "),
        (["perplexity", "m.gguf"], "error: --file is missing; for example: ggufmoe perplexity model.gguf -f text.txt"),
        (["convert", "m", "-q"], "error: Option '-q' requires an argument. (see 'ggufmoe convert --help')\n"),
        (["route", "m.gguf", "--compare", "a"], "'--compare' requires 2 arguments. (see 'ggufmoe route --help')\n"),
        (["route", "m.gguf"], "error: give one of: a PROMPT, --compare with two prompts, --prompts with a file (see"),
        (["quantize"], "error: IN.gguf is missing; for example: ggufmoe quantize "),
        (["convert"], "error: SOURCE is missing; for example: ggufmoe convert ./my-mixtral -q Q4_K_M (see 'ggufmoe "),
        (["run", "m.gguf", "--temprature", "1"], "no such option: --temprature; did you mean --temperature? (see"),
        (["run", "m.gguf", "-hello"], "No such option: -e; a PROMPT that begins with - stands after --"),
        (["run", "m.gguf", "hi", "--temp", "999"], "--temperature must be between 0 and 100, not 999"),
        (["run", "m.gguf", "hi", "--keep", "-2"], "--keep must be at least -1, not -2"),
        (["run", "m.gguf", "hi", "-lm", "fast"], "'-lm' / '--load-mode': 'fast' is not one of 'auto', "),
        (["--nonsense"], "error: No such option"),
        (["help"], "error: no such command: help; did you mean --help?"),
        (["m.gguf"], "error: no such command: m.gguf; did you mean 'ggufmoe chat m.gguf'?"),
        (["--debug"], "error: Missing command. (see 'ggufmoe --help')\n"),
    ],
)  # fmt: skip
def test_wrong_usage(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.lower() in err.lower()
    assert err.count("\n") == 1


def test_no_arguments_give_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.exit_code([]) == 0
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
    assert capsys.readouterr().err == f"error: {message} (reported by the operating system)\n"
    assert app.exit_code(["--debug", "try"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_is_said_is_harmless(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]52;c;cm0=\x07b\x9b2J\rc"

    def command() -> None:
        logging.getLogger("ggufmoe.template").warning(hostile)
        raise GGUFError(hostile)

    verb(command)
    for arguments in (["try"], ["--debug", "try"], [hostile], ["run", hostile, "hi"]):
        assert app.exit_code(arguments) > 0
        err = capsys.readouterr().err
        assert "a" in err
        assert not set("\x1b\x07\x9b\r") & set(err)


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
