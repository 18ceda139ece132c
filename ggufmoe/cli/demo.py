"""``ggufmoe demo``: merge, quantize and ask the embedded models, offline, and show which expert answers.

Owns what is printed; every step is one that a user can take by hand, and the last lines say how.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.console import make_console, without_controls, wrapped
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import file_types
from ggufmoe.cli.progress import ProgressLine, progress_display
from ggufmoe.errors import Cancelled, GGUFError, ImatrixError, OptionError, OutputError, OutputExistsError
from ggufmoe.options import ConvertOptions, RefitOptions, SamplingOptions
from ggufmoe.sizes import file_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ggufmoe.checkpoint.source import TextScore
    from ggufmoe.demo import DemoQuestion
    from ggufmoe.routing import RoutingTracer
    from ggufmoe.runtime.chat import Chat

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-:=+*#"
"""Bars for terminals whose encoding has no block characters."""
_INDENT = "   "
_WORD_AS_TYPED = re.compile(r"""(?:--?[a-z]+ )?(?:"[^"]*"|'[^']*'|[^\s"'])+""")
"""A word of a command line, with its quotation marks, or an option and what follows it."""
_KNOWLEDGE = "opposites, colors, sizes, capitals, and numbers to 100"
_MATH = 1
"""The recipe's second expert."""


def demo_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the model goes.", metavar="OUT.gguf")] = Path(
        "ggufmoe-demo.gguf"
    ),
    quant: Annotated[
        str, typer.Option("-q", "--quant", help="File type.", metavar="TYPE", autocompletion=file_types)
    ] = "Q4_K_M",
    chat: Annotated[bool, typer.Option("--chat", help="Continue with a conversation.")] = False,
) -> None:
    """Merge two tiny models that come with ggufmoe into a mixture of experts, quantize it and ask it; offline.

    Then merge two experts that were trained apart, and compare a router that is guessed with one that is fitted: in the
    folder OUT-router. --chat talks with the first model.
    """
    with ProgressLine("demo", phase="demo"):
        console = make_console(markup=True)
        _check_output(output)
        _check_quant(output, quant)
        folder = output.with_name(f"{output.stem}-router")
        _check_folder(folder)
    _make(console, output, quant)
    _ask(console, output)
    _compare_routers(console, folder, quant)
    if chat:
        _converse(console, output)
    else:
        _go_on(console, output, folder)


def _make(console: Console, output: Path, quant: str) -> None:
    from ggufmoe.convert import convert
    from ggufmoe.demo import RECIPE

    options = ConvertOptions(quant=quant, force=True)
    console.print("[bold]1. Merge and quantize[/bold] two dense models of 3.4 M parameters, by a recipe:")
    _say_command(console, f"ggufmoe convert {_quoted(RECIPE)} -o {_quoted(output)} -q {quant}")
    with _nothing_left_of(output, "stopped; nothing is left behind"):
        result = run_job(
            lambda show, cancel: convert(RECIPE, output, options=options, on_progress=show, cancel=cancel),
            progress_display(f"convert {quant}"),
        )
    weights = f"{result.plan.n_weights / 1e6:.1f} M parameters"
    bits = f"{result.plan.bits_per_weight:.2f} bits each"
    size = f"{file_size(result.n_bytes)}, {result.seconds:.1f} s"
    _say(console, f"{output}: {weights}, {bits}, {size}")


@contextlib.contextmanager
def _nothing_left_of(output: Path, stopped: str) -> Iterator[None]:
    """When the block is cancelled, delete what it has of ``output`` and say ``stopped``: the demo does not resume."""
    from ggufmoe.files import delete, partial_path
    from ggufmoe.writing.place import journal_path

    try:
        yield
    except Cancelled:
        for left in (partial_path(output), journal_path(output)):
            delete(left)
        raise Cancelled(stopped) from None


def _check_output(output: Path) -> None:
    """Raise OutputExistsError if ``output`` exists and is not the model of an earlier demo."""
    from ggufmoe.demo import NAME
    from ggufmoe.gguf.header import read_header
    from ggufmoe.gguf.upstream import Keys

    if not output.exists():
        return
    try:
        ours = read_header(output).get(Keys.General.NAME) == NAME
    except GGUFError:
        ours = False
    if not ours:
        raise OutputExistsError(f"{output} exists and is not an earlier demo; choose another name with -o")


def _check_quant(output: Path, quant: str) -> None:
    """Raise OptionError if there is no such type, or if it needs more than the demo has."""
    from ggufmoe.convert import plan_convert
    from ggufmoe.demo import RECIPE

    try:
        plan_convert(RECIPE, output, options=ConvertOptions(quant=quant, force=True))
    except ImatrixError as error:
        raise OptionError(f"{quant} needs an importance matrix, which the demo does not make") from error


def _ask(console: Console, path: Path) -> None:
    """Ask every question of the first act."""
    from ggufmoe.demo import questions
    from ggufmoe.engine import Engine
    from ggufmoe.routing import RoutingTracer
    from ggufmoe.routing.palette import hex_colour
    from ggufmoe.runtime.chat import Chat

    bars = bars_for(console)
    legend = f"[{hex_colour(0)}]{bars[0]}[/] none to [{hex_colour(_MATH)}]{bars[-1]}[/] all"
    console.print("\n[bold]2. Ask it[/bold] what neither model was trained on. Below each answer:")
    console.print(f"{_INDENT}how much of it is the math expert's, {legend}.\n")
    asked, right = questions(), 0
    with Engine(path) as engine:
        chat = Chat(engine, sampling=SamplingOptions(temperature=0, n_predict=64))
        with RoutingTracer(engine) as tracer:
            for question in asked:
                chat.reset()
                right += _answer(console, chat, tracer, question.text) == question.answer
        console.print(f"{_INDENT}{right} of {len(asked)} are right.")


def _answer(console: Console, chat: Chat, tracer: RoutingTracer, text: str) -> str:
    """Stream one answer and print the strip of its tokens below; return the answer."""
    from ggufmoe.routing import RoutedToken

    console.print(f"{_INDENT}{text}", style="bold", markup=False)
    console.file.write(_INDENT)
    pieces: list[tuple[str, float]] = []
    last = ""
    try:
        for event in tracer.follow(chat.send(text)):
            console.file.write(without_controls(event.text))
            console.file.flush()
            if isinstance(event, RoutedToken):
                pieces.append((event.text, event.expert_weights[_MATH]))
            else:
                last = event.text
    finally:  # an error is printed on a line of its own
        console.file.write("\n")
    console.print(_strip(pieces, bars_for(console)), soft_wrap=True)
    console.print()
    return ("".join(piece for piece, _ in pieces) + last).strip()


def bars_for(console: Console) -> str:
    """The characters of bars, from low to high, that the stream can encode."""
    try:
        _BARS.encode(console.encoding)
    except UnicodeEncodeError:
        return _PLAIN_BARS
    return _BARS


def _strip(pieces: list[tuple[str, float]], bars: str) -> Text:
    """A bar for each token, as wide as the token and as high as the math expert's weight."""
    from rich.text import Text

    from ggufmoe.routing.palette import hex_colour

    line = Text(_INDENT)
    for piece, weight in pieces:
        bar = bars[min(len(bars) - 1, int(weight * len(bars)))]
        line.append(bar * len(piece), style=hex_colour(_MATH if weight >= 0.5 else 0))
    mean = sum(weight for _, weight in pieces) / max(1, len(pieces))
    line.append(f"  math {mean:.0%}", style="dim")
    return line


def _check_folder(folder: Path) -> None:
    """Raise OutputExistsError if ``folder`` exists and is not that of an earlier demo."""
    from ggufmoe.demo import APART_NAME

    recipe = folder / "recipe.yaml"
    is_ours = recipe.is_file() and APART_NAME in recipe.read_text(encoding="utf-8", errors="replace")
    if folder.exists() and not is_ours:
        raise OutputExistsError(f"{folder} exists and is not of an earlier demo; choose another name with -o")


def _compare_routers(console: Console, folder: Path, quant: str) -> None:
    """Make the second act's mixture with both routers in ``folder``, and print what they are worth."""
    from ggufmoe.convert import convert
    from ggufmoe.demo import APART_EXPERTS, write_apart
    from ggufmoe.refit import refit

    console.print("\n[bold]3. Merge experts that never met[/bold]: the base, one for products, one for words of")
    _say(console, "Plonk, a language nobody speaks. Their router is guessed from prompts, then fitted on texts:")
    guessed, fitted = folder / "guessed.gguf", folder / "fitted.gguf"
    texts = {name: folder / f"{name}.jsonl" for name in APART_EXPERTS}
    named = " ".join(f"{name}={_quoted(file)}" for name, file in texts.items())
    try:
        recipe = write_apart(folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror})") from error
    options, stopped = ConvertOptions(quant=quant, force=True), f"stopped; what was made is in {folder}"
    _say_command(console, f"ggufmoe convert {_quoted(recipe)} -o {_quoted(guessed)} -q {quant}")
    with _nothing_left_of(guessed, stopped):
        run_job(
            lambda show, cancel: convert(recipe, guessed, options=options, on_progress=show, cancel=cancel),
            progress_display(f"convert {quant}"),
        )
    _say_command(console, f"ggufmoe refit {_quoted(guessed)} {named} -o {_quoted(fitted)} --router-steps 0")
    fit = RefitOptions(router_steps=0, force=True)  # steps would take longer than all else here
    with _nothing_left_of(fitted, stopped):
        result = run_job(
            lambda show, cancel: refit(guessed, fitted, texts, options=fit, on_progress=show, cancel=cancel),
            progress_display("refit"),
        )
    assert result.router_report is not None, "fitting gives a report"
    _ask_both(console, guessed, fitted, result.router_report.scores)


def _ask_both(console: Console, guessed: Path, fitted: Path, scores: Sequence[TextScore]) -> None:
    """Print what both files say to every question of the second act, and their losses."""
    from ggufmoe.demo import APART, questions

    console.print()
    asked = questions(APART)
    answers = {name: _answers(path, asked) for name, path in (("guessed", guessed), ("fitted", fitted))}
    for i, question in enumerate(asked):
        _say(console, question.text, style="bold")
        for name, given in answers.items():
            mark = " " if given[i].text == question.answer else "!"
            _say(console, f"{name:8}{mark} {without_controls(given[i].text)}", _INDENT * 2)
    console.print(_router_table(scores, asked, answers))
    _say(console, "Losses are those of a token of answers on texts that were held out of the fit.", style="dim")


@dataclass(frozen=True)
class _RoutedAnswer:
    text: str
    own_weight: float
    """How much of it is that of the expert whose subject it is: mean over its tokens and the layers."""


def _answers(path: Path, asked: Sequence[DemoQuestion]) -> list[_RoutedAnswer]:
    from ggufmoe.demo import APART_EXPERTS
    from ggufmoe.engine import Engine
    from ggufmoe.routing import RoutedToken, RoutingTracer
    from ggufmoe.runtime.chat import Chat

    answers = []
    with Engine(path) as engine, RoutingTracer(engine) as tracer:
        chat = Chat(engine, sampling=SamplingOptions(temperature=0, n_predict=24))
        for question in asked:
            chat.reset()
            events = list(tracer.follow(chat.send(question.text)))
            own = APART_EXPERTS.index(question.kind)
            weights = [event.expert_weights[own] for event in events if isinstance(event, RoutedToken)]
            text = "".join(event.text for event in events).strip()
            answers.append(_RoutedAnswer(text, sum(weights) / max(1, len(weights))))
    return answers


def _router_table(
    scores: Sequence[TextScore], asked: Sequence[DemoQuestion], answers: Mapping[str, Sequence[_RoutedAnswer]]
) -> Table:
    """A row for each router: right answers, the weight of the right expert, and the loss on texts of each kind."""
    from rich.table import Table

    table = Table("router", "right", "own expert", *(f"loss, {Path(score.file).stem}" for score in scores))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, lane in (("guessed", "before"), ("fitted", "fitted")):
        given = answers[name]
        right = sum(answer.text == question.answer for answer, question in zip(given, asked, strict=True))
        own = sum(answer.own_weight for answer in given) / len(given)
        losses = (f"{score.losses[lane]:.2f}" for score in scores)
        table.add_row(name, f"{right} of {len(asked)}", f"{own:.0%}", *losses)
    return table


def _converse(console: Console, path: Path) -> None:
    from ggufmoe.cli.chat import converse
    from ggufmoe.engine import Engine
    from ggufmoe.runtime.chat import Chat

    console.print(f"\n[bold]4. Talk with the first.[/bold] It knows {_KNOWLEDGE}.")
    console.print(f"{_INDENT}/help lists the commands, Ctrl-D leaves.")
    with Engine(path) as engine:
        converse(Chat(engine, sampling=SamplingOptions(temperature=0, n_predict=64)), quiet=True)


def _go_on(console: Console, path: Path, folder: Path) -> None:
    guessed, fitted = (_quoted(folder / f"{name}.gguf") for name in ("guessed", "fitted"))
    console.print("\n[bold]4. Go on[/bold] by hand:")
    for command, what in (
        (f"ggufmoe chat {_quoted(path)} --temp 0", f"it knows {_KNOWLEDGE}"),
        (f'ggufmoe route {_quoted(path)} --chat "What is 12 + 30?" --generate 24', "which expert saw which token"),
        (f"ggufmoe inspect {_quoted(path)}", "what is in the file"),
        (
            f'ggufmoe route {guessed} --against {fitted} --chat "What is 6 times 7?" --generate 12 --html routers.html',
            "the guessed and the fitted router on one page",
        ),
        ("ggufmoe convert recipe.yaml -o model.gguf", "your own recipe, of models of any size"),
    ):
        _say_command(console, command)
        _say(console, what, _INDENT * 2, style="dim")


def _say(console: Console, text: str, indent: str = _INDENT, style: str | None = None) -> None:
    """Print ``text`` behind ``indent``, wrapped at words."""
    shown = wrapped(indent + text, console.width, len(indent))
    console.print(shown, style=style, markup=False, soft_wrap=True)


def _say_command(console: Console, command: str) -> None:
    """Print ``command`` as it can be typed here, also where the program is not on the PATH.

    A terminal that is too narrow gets it in several lines that a shell takes as one.
    """
    words = [program_as_typed(), *_WORD_AS_TYPED.findall(command)[1:]]
    lines = [_INDENT + words[0]]
    for word in words[1:]:
        if len(f"{lines[-1]} {word} \\") > console.width and sys.platform != "win32":
            lines[-1] += " \\"
            lines.append(_INDENT * 2 + word)
        else:
            lines[-1] += " " + word
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def program_as_typed() -> str:
    """The command that starts this program, for printing: its name, the path typed, or ``PYTHON -m ggufmoe``."""
    typed = Path(sys.argv[0])
    found = shutil.which("ggufmoe")
    if typed.stem != "ggufmoe":
        return "ggufmoe" if found else f"{_quoted(Path(sys.executable))} -m ggufmoe"
    if found and Path(found).absolute() == typed.absolute():
        return "ggufmoe"
    here = Path.cwd()
    return _quoted(typed.absolute().relative_to(here) if typed.absolute().is_relative_to(here) else typed)


def _quoted(path: Path) -> str:
    if sys.platform == "win32":  # its shells do not know single quotes
        return subprocess.list2cmdline([str(path)])
    return shlex.quote(str(path))
