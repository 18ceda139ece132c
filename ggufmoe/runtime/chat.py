"""``Chat``: a conversation with a model. Messages become a prompt, its answer becomes events and a message.

Knows nothing of native code and of terminals. The part of the conversation that is in the engine's KV cache is not
computed again.
"""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ggufmoe.errors import Cancelled, InputError, OutputError, OutputExistsError
from ggufmoe.files import StrPath, decode_text, replacing, user_path
from ggufmoe.options import MAX_SEED, SamplingOptions, TemplateOptions
from ggufmoe.runtime.asyncstream import read_async
from ggufmoe.runtime.chatformat import ChatFormat, ChatPrompt, message_of
from ggufmoe.runtime.enginelike import EngineLike
from ggufmoe.runtime.events import NO_TIMING, ChatEvent, Finished
from ggufmoe.runtime.kvcache import common_prefix
from ggufmoe.runtime.messages import Message
from ggufmoe.templates.jinja_template import ChatTemplate
from ggufmoe.work import CancelFlag

_FORMAT = "ggufmoe-chat"
_MAX_FILE_BYTES = 64 << 20


class Chat:
    """A conversation with the model in ``engine``; several chats may use one engine in turn.

    A conversation that is longer than the context (``ContextOptions.overflow``) is shortened by whole turns, a message
    and its answer: ``shift`` leaves the oldest turns out of the prompt until it fills half of the context,
    ``truncate-middle`` those after the first turn. The system message always stays, and ``messages`` keeps everything.
    A single message that is too long, and an answer that fills the context, are cut by the engine token by token.

    ``template`` is a ChatTemplate, or a name or file as for ``find_template``; None is the model's own template.
    ``variables`` go to the template. What a model thinks before it answers is kept in ``Message.reasoning``; the
    template decides whether the model sees it again. Raises TemplateError when there is no template, or it cannot be
    used, and OptionError for a variable that it never reads.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        system: str | None = None,
        template: ChatTemplate | str | None = None,
        sampling: SamplingOptions | None = None,
        variables: TemplateOptions | None = None,
    ) -> None:
        if not callable(getattr(engine, "generate", None)):
            raise TypeError(f"expected an Engine, not {engine!r}")
        self.format = ChatFormat(engine, template)
        """How messages become a prompt, and how answers are read."""
        self.system = system or None
        self.sampling = sampling or SamplingOptions()
        self.variables = variables or TemplateOptions()
        self.messages: tuple[Message, ...] = ()
        """All messages so far, without the system message."""
        self._n_regenerated = 0
        """How often the last message was answered again; added to a given seed."""
        self._n_left_out = 0
        """Turns that the prompt leaves out."""
        self._n_replaced = 0
        """How often the whole history was replaced, by ``reset`` or ``load``."""

    @property
    def engine(self) -> EngineLike:
        """The engine that answers; another one of the same model may take its place."""
        return self.format.engine

    @engine.setter
    def engine(self, engine: EngineLike) -> None:
        self.format.engine = engine

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self.format.template

    @property
    def variables(self) -> TemplateOptions:
        """The variables that the template gets. Setting one that it never reads raises OptionError."""
        return self._variables

    @variables.setter
    def variables(self, options: TemplateOptions) -> None:
        self._given = self.format.variables_of(options)
        self._variables = options

    def send(
        self, text: str, *, cancel: CancelFlag | None = None, stop: str | Sequence[str] = ()
    ) -> Iterator[ChatEvent]:
        """Send ``text`` and stream the answer: Token events, then one Finished, as ``Engine.generate`` gives them.

        What a reasoning model thinks comes as Reasoning events between them, and is no part of their text.
        Message and answer are added to ``messages`` when the iterator ends or is closed, also if the answer was cut
        short. They are not added after an exception, if there is no answer at all, or if ``messages`` was changed
        meanwhile. Raises ContextFullError when the conversation no longer fits.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a text (str), not {text!r}")
        self._n_regenerated = 0
        return self._answer(Message("user", text), self.messages, self.sampling, cancel=cancel, stop=stop)

    def send_async(
        self, text: str, *, cancel: CancelFlag | None = None, stop: str | Sequence[str] = ()
    ) -> AsyncIterator[ChatEvent]:
        """``send`` for ``async for``."""
        return read_async(lambda flag: self.send(text, cancel=flag, stop=stop), cancel)

    def regenerate(self, *, cancel: CancelFlag | None = None, stop: str | Sequence[str] = ()) -> Iterator[ChatEvent]:
        """Answer the last message again. A given seed is increased each time, so that the answer can differ.

        Raises InputError before the first message.
        """
        asked = self._last_asked()
        if asked is None:
            raise InputError("there is no answer yet that could be given again")
        self._n_regenerated += 1
        seed = self.sampling.seed
        fresh = (
            self.sampling
            if seed is None or seed < 0
            else replace(self.sampling, seed=(seed + self._n_regenerated) % (MAX_SEED + 1))
        )
        return self._answer(self.messages[asked], self.messages[:asked], fresh, cancel=cancel, stop=stop)

    def regenerate_async(
        self, *, cancel: CancelFlag | None = None, stop: str | Sequence[str] = ()
    ) -> AsyncIterator[ChatEvent]:
        """``regenerate`` for ``async for``."""
        return read_async(lambda flag: self.regenerate(cancel=flag, stop=stop), cancel)

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self._replace(self.system, ())

    @property
    def n_turns_left_out(self) -> int:
        """How many turns the latest prompt left out because the context could not hold them."""
        return self._n_left_out

    def _last_asked(self) -> int | None:
        """The place of the user's last message."""
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)

    def undo(self) -> Message:
        """Forget the last message and its answer; return the message. Raises InputError where there is none."""
        asked = self._last_asked()
        if asked is None:
            raise InputError("there is no message yet that could be taken back")
        message = self.messages[asked]
        self._replace(self.system, self.messages[:asked])
        return message

    def prompt(
        self, messages: Sequence[Message], *, must_fit: bool = False, cancel: CancelFlag | None = None
    ) -> list[int]:
        """The tokens of the prompt for ``messages``, with exactly one BOS where the model wants one.

        ``must_fit`` and ``cancel`` are those of ``Engine.tokenize``.
        """
        return list(self._prompt(messages, must_fit=must_fit, cancel=cancel).tokens)

    def _prompt(
        self, messages: Sequence[Message], *, must_fit: bool = False, cancel: CancelFlag | None = None
    ) -> ChatPrompt:
        system = () if self.system is None else (Message("system", self.system),)
        return self.format.render((*system, *messages), (), self._given, must_fit=must_fit, cancel=cancel)

    def _answer(
        self,
        question: Message,
        history: tuple[Message, ...],
        sampling: SamplingOptions,
        *,
        cancel: CancelFlag | None,
        stop: str | Sequence[str],
    ) -> Iterator[ChatEvent]:
        asked, n_keep = (*history, question), None
        try:
            prompt = self._prompt(asked, must_fit=self.engine.overflow == "error", cancel=cancel)
            if self.engine.overflow != "error":
                # BOS and the system message always stay
                prompt = self._shortened(asked, prompt, sampling, cancel)
                n_keep = len(self._prompt_before_next(()))
        except Cancelled:
            return iter((Finished("", "cancelled", NO_TIMING, sampling.seed or 0),))
        events = self.format.generate(prompt, sampling, stop=stop, cancel=cancel, n_keep=n_keep)
        return self._record(asked, events, (self.messages, self._n_replaced))

    def _shortened(
        self, asked: tuple[Message, ...], prompt: ChatPrompt, sampling: SamplingOptions, cancel: CancelFlag | None
    ) -> ChatPrompt:
        """``prompt`` without as many old turns as necessary. Turns stay left out, so that the KV cache is reused."""
        n_ctx = self.engine.n_ctx
        room = n_ctx // 4 if sampling.n_predict < 0 else min(sampling.n_predict, n_ctx // 4)
        first = 2 if self.engine.overflow == "truncate-middle" else 0
        n_turns = max(0, (len(asked) - 1 - first) // 2)

        def without(n: int) -> ChatPrompt:
            return self._prompt((*asked[:first], *asked[first + 2 * n :]), cancel=cancel)

        n = min(self._n_left_out, n_turns)
        prompt = without(n) if n else prompt
        if len(prompt.tokens) + room > n_ctx:
            while n < n_turns and len(prompt.tokens) > n_ctx // 2:
                n += 1
                prompt = without(n)
        self._n_left_out = n
        return prompt

    def _prompt_before_next(self, messages: Sequence[Message]) -> list[int]:
        """The tokens at the beginning of every prompt that continues ``messages`` with one more."""
        one, other = (self.prompt((*messages, Message("user", text))) for text in ("a", "b"))
        return one[: common_prefix(one, other)]

    def _record(
        self, asked: tuple[Message, ...], events: Iterator[ChatEvent], before: tuple[tuple[Message, ...], int]
    ) -> Iterator[ChatEvent]:
        read: list[ChatEvent] = []
        try:
            for event in events:
                read.append(event)
                yield event
        except Exception:
            raise
        except BaseException:  # the reader closed the iterator
            self._keep(asked, read, before)
            raise
        self._keep(asked, read, before)

    def _keep(
        self, asked: tuple[Message, ...], read: Sequence[ChatEvent], before: tuple[tuple[Message, ...], int]
    ) -> None:
        messages, n_replaced = before
        answer = message_of(read)
        if (answer.content or answer.reasoning) and self.messages is messages and self._n_replaced == n_replaced:
            self.messages = (*asked, answer)

    def save(self, path: StrPath) -> None:
        """Write the conversation as JSON, over an earlier one but over nothing else. Raises OutputError."""
        path = user_path(path)
        _check_replaceable(path)
        content = json.dumps(self._content(), ensure_ascii=False, indent=1) + "\n"
        with replacing(path, "the conversation") as file:
            # what was typed may hold half of a surrogate pair, which UTF-8 cannot
            file.write(content.encode("utf-8", "replace"))

    def _content(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": 1,
            "model": self.engine.path.name,
            "system": self.system,
            "messages": [_stored(message) for message in self.messages],
        }

    def load(self, path: StrPath) -> None:
        """Replace the conversation, system message included, by one from a file of ``save``. Raises InputError."""
        self._replace(*_read_conversation(user_path(path)))

    def _replace(self, system: str | None, messages: tuple[Message, ...]) -> None:
        self.system, self.messages = system, messages
        self._n_regenerated = self._n_left_out = 0
        self._n_replaced += 1

    def save_session(self, path: StrPath) -> None:
        """Write the conversation and its KV cache to a file, so that continuing it later computes nothing again.

        Raises InputError before the first answer, OutputError, and ContextFullError if all messages together do not fit
        the context.
        """
        if not self.messages:
            raise InputError("nothing has been said yet that could be kept")
        self.engine.save_session(path, self._prompt_before_next(self.messages), json.dumps(self._content()))

    def load_session(self, path: StrPath) -> None:
        """Replace the conversation and the KV cache by those of a file of ``save_session``. Raises InputError."""
        _, note = self.engine.load_session(path)
        self._replace(*_conversation(user_path(path), note))


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: the conversation cannot be written: it is {_kind(path.stat().st_mode)}")
    if path.is_file():
        try:
            _read_conversation(path)
        except InputError as error:
            raise OutputExistsError(f"{path}: holds something else than a conversation; give another name") from error


def _kind(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a device or a pipe"


def _read_conversation(path: Path) -> tuple[str | None, tuple[Message, ...]]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: it is {_kind(status.st_mode)}, not a saved conversation")
        if status.st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: too large for a saved conversation")
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a saved conversation: it is not JSON") from error
    return _conversation(path, text)


def _conversation(path: Path, text: str) -> tuple[str | None, tuple[Message, ...]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a saved conversation: it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != 1:
        raise InputError(f"{path}: not a conversation that this version saved")
    system, messages = content.get("system"), content.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise InputError(f"{path}: not a saved conversation: its messages are missing")
    return system, tuple(_message(path, entry) for entry in messages)


def _stored(message: Message) -> dict[str, str]:
    stored = {"role": message.role, "content": message.content}
    return stored | {"reasoning": message.reasoning} if message.reasoning else stored


def _message(path: Path, entry: Any) -> Message:
    if isinstance(entry, dict) and entry.get("role") in ("user", "assistant") and isinstance(entry.get("content"), str):
        reasoning = entry.get("reasoning", "")
        if isinstance(reasoning, str):
            return Message(entry["role"], entry["content"], reasoning)
    raise InputError(f"{path}: not a saved conversation: a message needs a role and a content")
