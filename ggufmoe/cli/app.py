"""The entry of the command line: the table of verbs, ``main``, and how errors become exit codes.

A verb's module is imported only when the verb is called, so that help appears at once. Every error of a command ends
in ``main`` as an exit code and one line on stderr.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from ggufmoe.cli.console import StatusLine, note, terminal_columns, without_controls
from ggufmoe.cli.helptext import CONTEXT_SETTINGS, PlainCommand, PlainContext, near_command, write_examples
from ggufmoe.cli.params import SHOWN_ERROR, USAGE_ERROR
from ggufmoe.errors import GgufmoeError, one_line

INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """A command: its name, ``module:function``, its line in the list of commands, and examples as people type them.

    A verb with commands of its own has a ``typer.Typer`` in the place of the function.
    """

    name: str
    target: str
    summary: str
    examples: tuple[str, ...] = ()


VERBS = (
    Verb(
        "convert",
        "ggufmoe.cli.convert:convert_command",
        "Turn a checkpoint or recipe into a quantized GGUF file.",
        (
            "ggufmoe convert ./my-mixtral -q Q4_K_M",
            "ggufmoe convert recipe.yaml -o merged.gguf",
            "ggufmoe convert mistralai/Mixtral-8x7B-v0.1 --dry-run",
        ),
    ),
    Verb(
        "quantize",
        "ggufmoe.cli.quantize:quantize_command",
        "Turn a GGUF file into one of another type.",
        (
            "ggufmoe quantize my-mixtral-BF16.gguf -q Q5_K_M",
            "ggufmoe quantize old.gguf -o mended.gguf -q COPY",
        ),
    ),
    Verb(
        "merge",
        "ggufmoe.cli.merge:merge_command",
        "Merge dense models into a mixture of experts.",
        ("ggufmoe merge recipe.yaml merged", "ggufmoe merge recipe.yaml merged --resume"),
    ),
    Verb(
        "refit",
        "ggufmoe.cli.refit:refit_command",
        "Fit the router of a GGUF file on texts.",
        (
            "ggufmoe refit m.gguf chat.jsonl math.txt -o new.gguf",
            "ggufmoe refit m.gguf math=a.txt base=b.txt -o new.gguf",
            "ggufmoe refit m.gguf --router other.gguf -o new.gguf",
        ),
    ),
    Verb(
        "run",
        "ggufmoe.cli.run:run_command",
        "Print one answer of a model.",
        (
            'ggufmoe run model.gguf "Why is the sky blue?"',
            "ggufmoe run model.gguf --json < question.txt",
            'ggufmoe run model.gguf "Once upon a time" --raw -n 60',
        ),
    ),
    Verb(
        "chat",
        "ggufmoe.cli.chat:chat_command",
        "Talk with a model in the terminal.",
        (
            "ggufmoe chat model.gguf",
            'ggufmoe chat model.gguf -sys "Be brief." --temp 0.3',
            "ggufmoe chat model.gguf -c 16384 -ngl 20",
        ),
    ),
    Verb(
        "serve",
        "ggufmoe.cli.serve:serve_command",
        "Answer programs that speak OpenAI's HTTP interface.",
        (
            "ggufmoe serve model.gguf",
            "ggufmoe serve model.gguf --port 9000 --alias mixtral",
            "ggufmoe serve model.gguf -c 16384 --api-key-file keys",
        ),
    ),
    Verb(
        "route",
        "ggufmoe.cli.route:route_command",
        "Show which experts every token went to.",
        (
            'ggufmoe route model.gguf "Two trains leave."',
            'ggufmoe route model.gguf --chat "Hi" --html page.html',
            'ggufmoe route model.gguf --compare "Hello" "2 + 2 ="',
        ),
    ),
    Verb(
        "inspect",
        "ggufmoe.cli.inspect:inspect_command",
        "Show what is in a GGUF file.",
        ("ggufmoe inspect model.gguf", "ggufmoe inspect model.gguf -c 8192 --experts"),
    ),
    Verb(
        "diff",
        "ggufmoe.cli.diff:diff_command",
        "Show how two GGUF files differ.",
        ("ggufmoe diff model-F16.gguf model-Q4_K_M.gguf",),
    ),
    Verb(
        "plan",
        "ggufmoe.cli.plan:plan_command",
        "Show which device would hold which part of a model.",
        ("ggufmoe plan model.gguf", "ggufmoe plan model.gguf --vram 6G -c 8192"),
    ),
    Verb(
        "perplexity",
        "ggufmoe.cli.perplexity:perplexity_command",
        "Measure how well a model predicts a text.",
        (
            "ggufmoe perplexity model.gguf -f text.txt",
            "ggufmoe perplexity q4.gguf -f text.txt --against f16.gguf",
            "ggufmoe perplexity model.gguf -f talks.jsonl --answers",
        ),
    ),
    Verb(
        "imatrix",
        "ggufmoe.cli.imatrix:imatrix_command",
        "Make an importance matrix from a text.",
        (
            "ggufmoe imatrix model.gguf -f text.txt -o imatrix.gguf",
            "ggufmoe convert ./my-mixtral --imatrix imatrix.gguf",
        ),
    ),
    Verb(
        "sensitivity",
        "ggufmoe.cli.sensitivity:sensitivity_command",
        "Measure on a text how much each weight matters.",
        (
            "ggufmoe sensitivity ./my-mixtral -f text.txt -o s.gguf",
            "ggufmoe sensitivity recipe.yaml -f chats.jsonl -o s.gguf",
        ),
    ),
    Verb(
        "bench",
        "ggufmoe.cli.bench:bench_command",
        "Measure the speed of prompts and of generation.",
        ("ggufmoe bench model.gguf", "ggufmoe bench model.gguf -t 1,2,4 -p 512 -n 64"),
    ),
    Verb(
        "demo",
        "ggufmoe.cli.demo:demo_command",
        "Make, quantize and ask a tiny mixture of experts; offline.",
        ("ggufmoe demo", "ggufmoe demo --chat"),
    ),
    Verb("list", "ggufmoe.cli.list:list_command", "Show the stored models.", ("ggufmoe list",)),
    Verb(
        "show",
        "ggufmoe.cli.show:show_command",
        "Show where a stored model came from.",
        ("ggufmoe show my-mixtral-Q4_K_M",),
    ),
    Verb("rm", "ggufmoe.cli.rm:rm_command", "Delete stored models.", ("ggufmoe rm my-mixtral-Q4_K_M",)),
    Verb(
        "prune",
        "ggufmoe.cli.prune:prune_command",
        "Delete unfinished and unused models of the store.",
        ("ggufmoe prune", "ggufmoe prune --unused 90 --dry-run"),
    ),
    Verb(
        "config",
        "ggufmoe.cli.config:config_app",
        "Show and change the options that are kept.",
        (
            "ggufmoe config",
            "ggufmoe config set temp 0.7",
            'ggufmoe config preset writer org/name -sys "Be brief."',
        ),
    ),
    Verb(
        "worker",
        "ggufmoe.cli.worker:worker_command",
        "Serve this machine's memory and processors to others.",
        (
            "ggufmoe worker --host 192.168.1.20",
            'ggufmoe run model.gguf "Hello" --rpc 192.168.1.20:50052',
        ),
    ),
    Verb(
        "doctor",
        "ggufmoe.cli.doctor:doctor_command",
        "Check the engine, devices and kernels of this machine.",
        ("ggufmoe doctor",),
    ),
)


_FIRST_STEPS = (
    "ggufmoe demo",
    "ggufmoe chat ./my-mixtral -q Q4_K_M",
    "ggufmoe convert ./my-mixtral -o my-mixtral.gguf",
)
_DRAWING_AT_ONCE = ("convert", "quantize", "merge")
"""Verbs that import little before they show their progress."""
_WITHOUT_STATUS = frozenset({"-h", "--help", "--quiet"})
_READING_AS_THEY_RUN = ("run", "chat", "serve", "route", "perplexity", "imatrix", "bench")
"""Verbs that map a model's file, and end without a word from the system when it becomes shorter."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line with ``args`` (default: those of the process) and exit with its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    _open_streams()
    if any(argument in _READING_AS_THEY_RUN for argument in arguments[:2]):
        from ggufmoe.native.aborts import explain_bus_errors

        explain_bus_errors()
    sys.exit(exit_code(arguments))


def exit_code(arguments: Sequence[str]) -> int:
    """Run one command, print its error on stderr and return the exit code.

    0: done, 1: a known error or a defect of ours, 2: wrong usage, 130: interrupted.
    """
    arguments = _debug_first(arguments)
    debug = arguments[:1] == ["--debug"]
    _accept_all_characters(sys.stdin, sys.stdout, sys.stderr)
    _show_warnings(debug)
    code = _outcome(arguments, debug)
    failure = _failure_of_stdout()
    if failure is None or code:
        return code
    return 1 if isinstance(failure, BrokenPipeError) else _refused_by_the_system(failure, debug)


def _outcome(arguments: Sequence[str], debug: bool) -> int:
    try:
        result = root_command().main(args=arguments or ["--help"], prog_name="ggufmoe", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _say("error: stopped", INTERRUPTED)
    except USAGE_ERROR as error:
        return _wrong_usage(error, arguments)
    except GgufmoeError as error:
        return _known_error(error, debug)
    except SHOWN_ERROR as error:
        return _say(f"error: {one_line(error.format_message(), None)}", 1)
    except OSError as error:
        return _refused_by_the_system(error, debug)
    except Exception as error:
        return _defect(error, debug)
    if result == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
        return _say("error: stopped", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _open_streams() -> None:
    """Give a stream to each that the parent process has closed, before a file of ours takes its number.

    Writing to a closed or full stdout stays an error of the system, which says where; what a closed or full stderr
    does not take is lost, because notes are not what was asked for.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (for as long as the process)
    if sys.stdout is None:
        sys.stdout = _stream(_Stdout, os.open(os.devnull, os.O_RDONLY), "utf-8")
    elif not sys.stdout.isatty():
        with contextlib.suppress(OSError):  # a stream of a host program without a file
            sys.stdout = _stream(_Stdout, sys.stdout.fileno(), sys.stdout.encoding)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif not sys.stderr.isatty():
        with contextlib.suppress(OSError):
            sys.stderr = _stream(_Stderr, sys.stderr.fileno(), sys.stderr.encoding, line_buffering=True)


class _Stdout(io.FileIO):
    """A file number whose errors name stdout."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from error  # a BrokenPipeError stays one


class _Stderr(io.FileIO):
    """A file number that loses what cannot be written to it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _stream(kind: type[io.FileIO], number: int, encoding: str, *, line_buffering: bool = False) -> io.TextIOWrapper:
    raw = kind(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, line_buffering=line_buffering)


def _failure_of_stdout() -> OSError | None:
    """Why what was printed cannot be written, if that is so; what is left of it is then dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # the interpreter writes it once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.stdout.flush()
        return error
    return None


def root_command() -> Any:
    """The group of all verbs, none of which is imported yet."""
    app = typer.Typer(
        cls=_LazyGroup,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=CONTEXT_SETTINGS,
        help="Merge, quantize and run Mixture-of-Experts models.",
    )
    app.callback()(_root)
    for verb in VERBS:
        app.command(verb.name, help=verb.summary)(_placeholder)
    return typer.main.get_command(app)


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the versions of ggufmoe and its engine.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything; show where an error came from.")] = False,
) -> None:
    del debug  # read by exit_code, which has to know it even when parsing fails
    if version:
        from ggufmoe.native.library import installed_version
        from ggufmoe.version import __version__

        print(f"ggufmoe {__version__}\n{installed_version()}")
        raise typer.Exit


def _placeholder() -> None:
    """The function of a verb whose module is not imported yet."""


class _LazyGroup(typer.core.TyperGroup):
    """A group that shows its verbs without importing them."""

    context_class = PlainContext

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each verb with its whole summary."""
        del ctx
        with formatter.section(typer.style("Commands", bold=True)):
            formatter.write_dl([(verb.name, verb.summary) for verb in VERBS])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write how to begin, and where the options of a command are listed."""
        del ctx
        write_examples(formatter, _FIRST_STEPS)
        formatter.write("\nOptions and examples of a command: ggufmoe COMMAND --help\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # `--version` must do without a verb
        self.invoke_without_command = "--version" in args[:2]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            hint = near_command(name, self.commands)
            if name in ("help", "version"):
                hint = f"did you mean --{name}?"
            elif name.endswith(".gguf"):
                hint = f"did you mean 'ggufmoe chat {name}'?"
            ctx.fail(f"no such command: {name}; {hint}")
        found, _, rest = super().resolve_command(ctx, args)
        line = StatusLine(sys.stderr)
        is_shown = name not in _DRAWING_AT_ONCE and not _WITHOUT_STATUS.intersection(rest)
        if is_shown and not ctx.resilient_parsing:  # with which a shell asks for completions
            line.show(f"{name}: preparing")
        try:
            return found, _load(name), rest
        finally:
            line.clear()


def _load(name: str) -> Any:
    verb = next(verb for verb in VERBS if verb.name == name)
    module, function = verb.target.split(":")
    found, epilog = getattr(importlib.import_module(module), function), "\n".join(verb.examples)
    if isinstance(found, typer.Typer):  # a verb with commands of its own
        group = typer.main.get_command(found)
        group.name, group.epilog = verb.name, epilog
        return group
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=CONTEXT_SETTINGS)
    app.command(verb.name, cls=PlainCommand, epilog=epilog)(found)
    return typer.main.get_command(app)


def _debug_first(arguments: Sequence[str]) -> list[str]:
    """Move ``--debug`` to the front, from anywhere before ``--``: people append it to a command that has failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [argument for i, argument in enumerate(arguments) if i >= end or argument != "--debug"]
    return rest if len(rest) == len(arguments) else ["--debug", *rest]


def _wrong_usage(error: Any, arguments: Sequence[str]) -> int:
    message = one_line(error.format_message(), None).replace("Value error, ", "").removeprefix("Invalid value: ")
    context: Any = getattr(error, "ctx", None)
    typed = [verb.name for verb in VERBS if verb.name in arguments[:2]]
    path = " ".join(["ggufmoe", *typed]) if context is None else context.command_path
    parameter: Any = getattr(error, "param", None)
    parameters = [] if context is None else context.command.params
    takes_prompt = any(given.name == "prompt" for given in parameters)
    if hasattr(error, "possibilities"):  # an unknown option
        name = error.option_name
        longer = [flag for given in parameters for flag in given.opts if len(name) > 3 and flag.startswith(name)]
        near = longer or difflib.get_close_matches(name, error.possibilities or (), n=1)
        message = f"No such option: {name}" + (f"; did you mean {near[0]}?" if near else "")
        if takes_prompt and not near:
            message += "; a PROMPT that begins with - stands after --"
    elif hasattr(error, "param_type") and parameter is not None:  # a missing argument or option
        is_argument = parameter.param_type_name == "argument"
        name = (parameter.metavar or parameter.name.upper()).removesuffix("...") if is_argument else parameter.opts[-1]
        example = context.command.epilog.splitlines()[0]
        message = f"{name} is missing; for example: {example}"
    elif (kept := getattr(parameter, "envvar", None)) and kept in os.environ and not {*parameter.opts} & {*arguments}:
        message += f" (environment variable {kept})"
    elif "unexpected extra argument" in message and takes_prompt:
        message += "; a PROMPT of several words stands in quotation marks"
    elif "unexpected extra argument" in message and typed == ["chat"]:
        message += "; 'ggufmoe run MODEL PROMPT' gives a single answer"
    return _say(f"error: {message} (see '{path} --help')", 2)


def _known_error(error: GgufmoeError, debug: bool) -> int:
    _trace(error, debug)
    return _say(f"error: {one_line(error, None)}", error.exit_code)


def _refused_by_the_system(error: OSError, debug: bool) -> int:
    _trace(error, debug)
    where = "" if error.filename is None else f"{str(error.filename)[:200]}: "
    return _say(f"error: {where}{one_line(error.strerror or error, None)} (reported by the operating system)", 1)


def _defect(error: Exception, debug: bool) -> int:
    _trace(error, debug)
    if isinstance(error, MemoryError):
        return _say("error: there is not enough memory for this (reported by the operating system)", 1)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _say("error: no further thread can be started; see 'ulimit -u' (reported by the operating system)", 1)
    if debug:
        return 1
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _say(f"error: {one_line(what, None)} (a defect of ggufmoe; 'ggufmoe --debug ...' shows where)", 1)


def _trace(error: BaseException, debug: bool) -> None:
    if debug:
        print(without_controls("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _say(line: str, code: int) -> int:
    if code == INTERRUPTED and sys.stderr.isatty():  # in place of the ^C that the terminal shows
        sys.stderr.write("\r" + " " * (terminal_columns(sys.stderr) - 1) + "\r")
    note(line)
    return code


def _accept_all_characters(*streams: Any) -> None:
    """A character that an encoding lacks, or a byte that it does not know, is replaced and not a traceback.

    Files and pipes are UTF-8 on Windows too, where Python would take a code page of 256 characters. A byte order mark
    at the beginning of stdin is no part of the text.
    """
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            encoding = "utf-8" if sys.platform == "win32" else stream.encoding
            reads_utf8 = stream is sys.stdin and codecs.lookup(encoding).name == "utf-8"
            stream.reconfigure(encoding="utf-8-sig" if reads_utf8 else encoding, errors="replace")


class _LogHandler(logging.Handler):
    """Prints the library's warnings on stderr; with ``debug`` all log records, including llama.cpp's lines."""

    def __init__(self, debug: bool) -> None:
        super().__init__()
        self.setLevel(logging.DEBUG if debug else logging.WARNING)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s" if debug else "warning: %(message)s"))
        if not debug:
            self.addFilter(lambda record: not record.name.startswith("ggufmoe.llama"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            note(self.format(record))
        except Exception:  # as every handler of the standard library does
            self.handleError(record)


def _show_warnings(debug: bool) -> None:
    logger = logging.getLogger("ggufmoe")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _LogHandler)]
    logger.addHandler(_LogHandler(debug))
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
