"""``ggufmoe chat``: a conversation in the terminal, or over pipes with one message a line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.params import with_options
from ggufmoe.cli.terminal import (
    load_engine,
    make_chat,
    note,
    speeds,
    state_directory,
    stream_answer,
    why_ended,
)
from ggufmoe.engine import Engine
from ggufmoe.errors import GgufmoeError, InputError
from ggufmoe.options import ContextOptions, OffloadOptions, PromptOptions, SamplingOptions
from ggufmoe.runtime.chat import Chat
from ggufmoe.runtime.events import Event, Timing
from ggufmoe.sizes import counted
from ggufmoe.work import CancelFlag

if TYPE_CHECKING:
    from prompt_toolkit.history import History


@with_options(PromptOptions, SamplingOptions, ContextOptions, OffloadOptions)
def chat_command(
    model: Annotated[Path, typer.Argument(help="GGUF file.")],
    asking: PromptOptions,
    sampling: SamplingOptions,
    context: ContextOptions,
    offload: OffloadOptions,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave out the greeting and the speeds.")] = False,
) -> None:
    """Talk with a model in the terminal."""
    with load_engine(model, context, offload) as engine:
        chat = make_chat(engine, asking, sampling)
        if not quiet:
            note(f"{model.name}: a context of {engine.n_ctx} tokens. /help lists the commands, Ctrl-D leaves.")
        try:
            converse(chat, lambda: load_engine(model, context, offload), quiet=quiet)
        finally:
            chat.engine.close()  # it may be another one by now


def converse(chat: Chat, make_engine: Callable[[], Engine] | None = None, *, quiet: bool) -> None:
    """Hold a conversation until the user leaves; without a terminal each line of stdin is a message.

    ``make_engine`` loads the model again where the engine was lost with its worker or its process; ``chat`` then has
    the new engine.
    """
    _Conversation(chat, make_engine, quiet).hold(_typed_lines() if _is_terminal() else sys.stdin)


class _Left(Exception):
    """Raised when the user leaves the conversation."""


@dataclass
class _Conversation:
    chat: Chat
    make_engine: Callable[[], Engine] | None
    quiet: bool
    last: Timing | None = None
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
        if not line:
            return
        if not line.startswith("/"):
            self._say(line)
            return
        word, _, argument = line[1:].partition(" ")
        command = _COMMANDS.get(word)
        if command is None:
            near = difflib.get_close_matches(word, _COMMANDS, n=1)
            raise InputError(f"there is no /{word}; " + (f"did you mean /{near[0]}?" if near else "/help lists them"))
        command.act(self, argument.strip())

    def _say(self, text: str) -> None:
        self.unanswered = text
        self._show(lambda cancel: self.chat.send(text, cancel=cancel))
        self.unanswered = None

    def _show(self, start: Callable[[CancelFlag], Iterator[Event]]) -> None:
        if self.is_lost and self.make_engine is not None:
            self.chat.engine.close()
            self.chat.engine = self.make_engine()
            self.is_lost = False
            note("the model is loaded again")
        finished = stream_answer(start)
        self.last = finished.timing
        if why := why_ended(finished, full="/reset begins anew, --ctx-size gives more room"):
            note(why)
        if not self.quiet:
            note(speeds(finished.timing))

    def help(self, _: str) -> None:
        for word, command in _COMMANDS.items():
            note(f"/{word + ' ' + command.argument:<14} {command.help}")

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
        self._show(lambda cancel: self.chat.regenerate(cancel=cancel))

    def save(self, path: str) -> None:
        self.chat.save(_given(path))
        note(f"saved to {path}")

    def load(self, path: str) -> None:
        self.chat.load(_given(path))
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
    "regen": _Command(_Conversation.regen, "", "answer the last message again"),
    "save": _Command(_Conversation.save, "FILE", "write the conversation as JSON"),
    "load": _Command(_Conversation.load, "FILE", "go on with a saved conversation"),
    "stats": _Command(_Conversation.stats, "", "speeds, and how full the context is"),
    "exit": _Command(_Conversation.leave, "", "leave (Ctrl-D does too)"),
}


def _given(path: str) -> Path:
    if not path:
        raise InputError("name a file")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such home directory") from error


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _typed_lines() -> Iterator[str]:
    """Yield the lines that the user types, with editing and a stored history, until Ctrl-D."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ", history=_history())
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
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "chat_history").touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(folder / "chat_history"))
