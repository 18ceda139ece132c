"""``ggufmoe chat``: a conversation in the terminal, or over pipes with one message a line."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggufmoe.cli.console import note, piped_lines, printable
from ggufmoe.cli.params import ModelName, ShowReasoning, default_shown, value_shown, with_options, with_typed
from ggufmoe.cli.terminal import load_engine, make_chat, speeds, stream_answer, why_ended
from ggufmoe.cli.wanted_model import model_file
from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, ContextFullError, GgufmoeError, InputError, OptionError
from ggufmoe.folders import state_directory
from ggufmoe.options import (
    ChatContextOptions,
    ModelOptions,
    OffloadOptions,
    PromptOptions,
    SamplingOptions,
    StopOptions,
    TemplateOptions,
)
from ggufmoe.options.fields import option_named
from ggufmoe.runtime.chat import Chat
from ggufmoe.runtime.events import ChatEvent, Timing
from ggufmoe.runtime.messages import Message
from ggufmoe.sizes import counted
from ggufmoe.work import CancelFlag

if TYPE_CHECKING:
    from prompt_toolkit.history import History

_QUOTES = '"""'


@with_options(
    ModelOptions, PromptOptions, TemplateOptions, StopOptions, SamplingOptions, ChatContextOptions, OffloadOptions
)
def chat_command(
    model: ModelName,
    wanted: ModelOptions,
    asking: PromptOptions,
    variables: TemplateOptions,
    stop: StopOptions,
    sampling: SamplingOptions,
    context: ChatContextOptions,
    offload: OffloadOptions,
    show_reasoning: ShowReasoning = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out the greeting and the speeds.")] = False,
) -> None:
    """Talk with a model in the terminal."""
    path = model_file(model, wanted, quiet=quiet, asking=asking)
    with load_engine(path, context, offload) as engine:
        chat = make_chat(engine, asking, variables, sampling)
        if not quiet:
            note(f"{path.name}: a context of {engine.n_ctx} tokens. /help lists the commands, Ctrl-D leaves.")
        try:
            converse(
                chat,
                lambda: load_engine(path, context, offload),
                quiet=quiet,
                stop=stop.texts,
                show_reasoning=show_reasoning,
            )
        finally:
            chat.engine.close()  # it may be another one by now


def converse(
    chat: Chat,
    make_engine: Callable[[], Engine] | None = None,
    *,
    quiet: bool,
    stop: tuple[str, ...] = (),
    show_reasoning: bool | None = None,
) -> None:
    """Hold a conversation until the user leaves; without a terminal each line of stdin is a message.

    A message that begins with three quotation marks goes on over several lines, until the next three. ``stop`` are
    texts that end an answer; ``show_reasoning`` is that of ``write_answer``.

    ``make_engine`` loads the model again where the engine was lost with its worker or its process; ``chat`` then has
    the new engine.
    """
    lines = _typed_lines() if _is_terminal() else _piped_lines()
    _Conversation(chat, make_engine, quiet, stop, show_reasoning).hold(lines)


class _Left(Exception):
    """Raised when the user leaves the conversation."""


@dataclass
class _Conversation:
    chat: Chat
    make_engine: Callable[[], Engine] | None
    quiet: bool
    stop: tuple[str, ...] = ()
    show_reasoning: bool | None = None
    last: Timing | None = None
    has_told_overflow: bool = False
    is_lost: bool = False
    """Whether the engine was lost, with a worker or the process that computes."""
    unanswered: str | None = None
    """The message that is being answered, or was being answered when the engine was lost."""

    def hold(self, lines: Iterator[str]) -> None:
        for line in lines:
            try:
                self._take(line.strip())
            except _Left:
                return
            except Cancelled:
                note("(stopped)")
                self._after_error()
            except GgufmoeError as error:
                note(f"error: {error}")
                self._after_error()
            except KeyboardInterrupt:  # pressed twice while an answer was on its way
                note("\n(stopped)")
                self._after_error()

    def _after_error(self) -> None:
        if self.is_lost:
            return
        if self.chat.engine.closed and self.make_engine is not None:
            self.is_lost = True
            again = ", and /regen asks this one again" if self.unanswered is not None else ""
            note(f"the next message loads the model again{again}")
        else:
            self.unanswered = None

    def _take(self, line: str) -> None:
        if line.startswith(_QUOTES):
            line = line.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\r\n")
            if line.strip():
                self._say(line)
        elif line.startswith("/"):
            self._do(line)
        elif line in ("exit", "quit") and _is_terminal():
            raise _Left
        elif line:
            self._say(line)

    def _do(self, line: str) -> None:
        """Follow a command, which begins with a slash."""
        word, argument = (*line[1:].split(maxsplit=1), "", "")[:2]
        command = _COMMANDS.get(_ALIASES.get(word, word))
        if command is None:
            near = difflib.get_close_matches(word, _COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            if _is_option(SamplingOptions, word) or _is_option(TemplateOptions, word):
                hint = f"did you mean /set {word}?"
            raise InputError(f"there is no /{word}; {hint}")
        command.act(self, argument.strip())

    def _say(self, text: str) -> None:
        def ask(cancel: CancelFlag) -> Iterator[ChatEvent]:
            self._check_length(text, cancel)
            return self.chat.send(text, cancel=cancel, stop=self.stop)

        self.unanswered = text
        self._show(ask)
        self.unanswered = None

    def _check_length(self, text: str, cancel: CancelFlag) -> None:
        """Raise ContextFullError for a message that does not fit the context even alone.

        Leaving old turns out makes room for a message; a part of the message itself must not be left out unsaid.
        """
        n_ctx = self.chat.engine.n_ctx
        if self.chat.engine.overflow == "shift" and len(text.encode("utf-8", "replace")) > n_ctx // 2:
            n_tokens = len(self.chat.prompt((Message("user", text),), must_fit=True, cancel=cancel))
            if n_tokens >= n_ctx:
                raise ContextFullError(
                    f"the message has {n_tokens} tokens and the context holds {n_ctx}: shorten it, or start again with "
                    "a larger --ctx-size"
                )

    def _show(self, start: Callable[[CancelFlag], Iterator[ChatEvent]]) -> None:
        if self.is_lost and self.make_engine is not None:
            self.chat.engine.close()
            self.chat.engine = self.make_engine()
            self.is_lost = False
            note("the model is loaded again")
        finished = stream_answer(start, show_reasoning=self.show_reasoning)
        self.last = finished.timing
        full = "/reset begins anew, --ctx-size gives more room"
        if why := why_ended(finished, full, "--n-predict, or /set n-predict N here"):
            note(why)
        self._tell_overflow(finished.timing)
        if not self.quiet:
            note(speeds(finished.timing))

    def _tell_overflow(self, timing: Timing) -> None:
        """Say, once, that the model no longer sees all of the conversation."""
        engine = self.chat.engine
        cut = self.chat.n_turns_left_out or timing.prompt_tokens + timing.generated_tokens > engine.n_ctx
        if not cut or self.has_told_overflow or engine.overflow == "error":
            return
        self.has_told_overflow = True
        gone = "the oldest turns are" if engine.overflow == "shift" else "turns after the first are"
        trained = f" (the model was trained with {engine.n_ctx_train})" if engine.n_ctx_train > engine.n_ctx else ""
        note(
            f"(the conversation is longer than the context of {engine.n_ctx} tokens: {gone} no longer seen by the "
            f"model; --ctx-size gives more room{trained}, /reset begins anew)"
        )

    def help(self, _: str) -> None:
        for word, command in _COMMANDS.items():
            note(f"/{word + ' ' + command.argument:<22} {command.help}", indent=24)
        note(f"{_QUOTES}TEXT{_QUOTES:<16} a message of several lines", indent=24)

    def set(self, text: str) -> None:
        """Change an option of sampling or of the template, or show one, or all."""
        name, typed = (*re.split(r"[\s=]+", text, maxsplit=1), "")[:2]
        if not name:
            self._list_options()
            return
        if _is_option(TemplateOptions, name):
            field = option_named(TemplateOptions, name)
            if typed:
                self.chat.variables = with_typed(self.chat.variables, field, typed)
            note(_setting(self.chat.variables, field))
        else:
            field = option_named(SamplingOptions, name)
            if typed:
                self.chat.sampling = with_typed(self.chat.sampling, field, typed)
            note(_setting(self.chat.sampling, field))

    def _list_options(self) -> None:
        rare = []
        for options in (self.chat.sampling, self.chat.variables):
            for field in fields(options):
                if not field.metadata["flags"]:
                    continue
                if field.metadata["panel"] is None or getattr(options, field.name) != field.default:
                    note(_setting(options, field))
                else:
                    rare.append(_name(field))
        note("also: " + ", ".join(rare))

    def think(self, typed: str) -> None:
        self.set(f"think {typed}")

    def reasoning(self, typed: str) -> None:
        """Show reasoning or hide it; without a word, the other of the two."""
        if typed not in ("", "show", "hide"):
            raise InputError(f"/reasoning takes show or hide, not {printable(typed)}")
        is_shown = sys.stdout.isatty() if self.show_reasoning is None else self.show_reasoning
        self.show_reasoning = typed == "show" if typed else not is_shown
        note(f"reasoning is {'shown' if self.show_reasoning else 'hidden'}")

    def undo(self, _: str) -> None:
        message = self.chat.undo()
        note(f"taken back: {printable(message.content, 60)}")

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.last = None
        note("the conversation begins anew")

    def system(self, text: str) -> None:
        if text:
            self.chat.system = text
        note(f"system message: {self.chat.system or '(none)'}")

    def regen(self, _: str) -> None:
        if self.is_lost and self.unanswered is not None:
            self._say(self.unanswered)
            return
        self._show(lambda cancel: self.chat.regenerate(cancel=cancel, stop=self.stop))

    def save(self, path: str) -> None:
        with _named_file(path) as file:
            self.chat.save(file)
        note(f"saved to {path}")

    def load(self, path: str) -> None:
        with _named_file(path) as file:
            self.chat.load(file)
        note(f"{counted(len(self.chat.messages), 'message')} from {path}")

    def stats(self, _: str) -> None:
        engine = self.chat.engine
        messages = counted(len(self.chat.messages), "message")
        n_tokens = len(engine.cached_tokens) if self.chat.messages else 0
        note(f"context: {n_tokens} of {engine.n_ctx} tokens; {messages}")
        note(speeds(self.last) if self.last else "no answer yet")

    def leave(self, _: str) -> None:
        raise _Left


@dataclass(frozen=True)
class _Command:
    act: Callable[[_Conversation, str], None]
    argument: str
    help: str


_COMMANDS = {
    "help": _Command(_Conversation.help, "", "this list"),
    "reset": _Command(_Conversation.reset, "", "forget what has been said"),
    "system": _Command(_Conversation.system, "[TEXT]", "show or set the system message"),
    "undo": _Command(_Conversation.undo, "", "take back the last message and its answer"),
    "regen": _Command(_Conversation.regen, "", "answer the last message again"),
    "set": _Command(
        _Conversation.set, "[NAME VALUE]", "show or change how answers are made, for example: /set temp 0.5"
    ),
    "think": _Command(_Conversation.think, "[on|off|auto]", "have the model reason before it answers, or not"),
    "reasoning": _Command(_Conversation.reasoning, "[show|hide]", "show or hide what it thinks"),
    "save": _Command(_Conversation.save, "FILE", "write the conversation as JSON"),
    "load": _Command(_Conversation.load, "FILE", "go on with a saved conversation"),
    "stats": _Command(_Conversation.stats, "", "speeds, and how full the context is"),
    "exit": _Command(_Conversation.leave, "", "leave (Ctrl-D does too)"),
}


_ALIASES = {"quit": "exit", "bye": "exit", "q": "exit", "?": "help", "h": "help", "clear": "reset"}


def _is_option(group: type, word: str) -> bool:
    try:
        option_named(group, word)
    except OptionError:
        return False
    return True


def _name(field: Field[Any]) -> str:
    """What an option is called in ``/set``."""
    flags: tuple[str, ...] = field.metadata["flags"]
    return max(flags, key=len).lstrip("-")


def _setting(options: SamplingOptions | TemplateOptions, field: Field[Any]) -> str:
    """``temperature = 0.5``; for a default that the model decides, what it is."""
    value = getattr(options, field.name)
    return f"{_name(field)} = {default_shown(field) if value is None else value_shown(value)}"


@contextlib.contextmanager
def _named_file(path: str) -> Iterator[Path]:
    """The file that was typed; whatever the system has against it is an InputError, which leaves the conversation."""
    if not path:
        raise InputError("name a file")
    try:
        yield Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such home directory") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{path}: {reason or error}") from error


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _is_open(text: str) -> bool:
    """Whether ``text`` begins with three quotation marks and the closing three are still to come."""
    text = text.strip()
    return text.startswith(_QUOTES) and (len(text) < 2 * len(_QUOTES) or not text.endswith(_QUOTES))


def _piped_lines() -> Iterator[str]:
    """Yield the lines of stdin, those between three quotation marks as one."""
    held = ""
    for line in piped_lines():
        held += line
        if not _is_open(held):
            yield held
            held = ""
    if held:
        yield held


def _typed_lines() -> Iterator[str]:
    """Yield what the user types, with editing and a stored history, until Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    keys = KeyBindings()
    # pasted colours of a terminal (ESC [ 3 1 m) look like the mouse's reports, and prompt_toolkit fails on them
    keys.add(Keys.Vt100MouseEvent)(lambda event: None)
    is_open = Condition(lambda: _is_open(get_app().current_buffer.text))
    session: PromptSession[str] = PromptSession(
        "> ", history=_history(), multiline=is_open, prompt_continuation=lambda *_: "  ", key_bindings=keys
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            note("(Ctrl-D or /exit leaves)")
        except EOFError:
            return


def _history() -> History:
    """The history of lines typed in earlier conversations; it is not stored where the folder cannot be used."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = state_directory()
    if folder is None:
        return InMemoryHistory()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "chat_history").touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(folder / "chat_history"))
