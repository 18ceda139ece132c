"""A conversation with a model: messages to prompt to events, and the history that grows from them.

It knows neither native code nor a terminal. The part of the conversation that the engine has in its cache is not
computed again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ggufmoe.errors import InputError, OutputError, TemplateError
from ggufmoe.options import MAX_SEED, SamplingOptions
from ggufmoe.runtime.engine import Engine
from ggufmoe.runtime.events import CancelFlag, Event
from ggufmoe.runtime.template import ChatTemplate, find_template

_FORMAT = "ggufmoe-chat"
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str


class Chat:
    """A conversation with the model in ``engine``.

    ``template`` is a ChatTemplate, a name or a file as ``find_template`` takes them; None stands for the model's own.
    Raises TemplateError when there is none, or none that works.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        template: ChatTemplate | str | None = None,
        sampling: SamplingOptions | None = None,
    ) -> None:
        self.engine = engine
        self.system = system or None
        self.template = template if isinstance(template, ChatTemplate) else _template(engine, template)
        self.sampling = sampling or SamplingOptions()
        self.messages: tuple[Message, ...] = ()
        """What has been said, without the system message."""
        self._n_again = 0

    def send(self, text: str, *, cancel: CancelFlag | None = None, stop: Sequence[str] = ()) -> Iterator[Event]:
        """Say ``text`` and stream the answer: Token events, then one Finished, as ``Engine.generate`` gives them.

        The turn becomes part of the history when the iterator ends or is closed, also with an answer cut short; a turn
        that failed or got no answer at all is left out. Raises ContextFullError when the conversation no longer fits.
        """
        self._n_again = 0
        return self._answer(Message("user", text), self.messages, self.sampling, cancel=cancel, stop=stop)

    def regenerate(self, *, cancel: CancelFlag | None = None, stop: Sequence[str] = ()) -> Iterator[Event]:
        """Answer the last message once more. A given seed is counted up, so that the answer can be another one.

        Raises InputError when there is nothing to answer.
        """
        asked = next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)
        if asked is None:
            raise InputError("there is no answer yet that could be given again")
        self._n_again += 1
        seed = self.sampling.seed
        fresh = (
            self.sampling
            if seed is None or seed < 0
            else replace(self.sampling, seed=(seed + self._n_again) % (MAX_SEED + 1))
        )
        return self._answer(self.messages[asked], self.messages[:asked], fresh, cancel=cancel, stop=stop)

    def reset(self) -> None:
        """Forget what has been said; the system message stays."""
        self.messages = ()
        self._n_again = 0

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that the model gets for ``messages``, with exactly one BOS where the model wants one."""
        turns = [asdict(message) for message in messages]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        text = self.template.render(turns)
        begins = bool(bos := self.engine.token_text(self.engine.bos_token)) and text.startswith(bos)
        return self.engine.tokenize(text, add_bos=not begins, parse_special=True)

    def _answer(
        self,
        question: Message,
        history: tuple[Message, ...],
        sampling: SamplingOptions,
        *,
        cancel: CancelFlag | None,
        stop: Sequence[str],
    ) -> Iterator[Event]:
        asked = (*history, question)
        events = self.engine.generate(self.prompt(asked), sampling, stop=(*self.template.stop, *stop), cancel=cancel)
        return self._record(asked, events)

    def _record(self, asked: tuple[Message, ...], events: Iterator[Event]) -> Iterator[Event]:
        parts: list[str] = []
        try:
            for event in events:
                # templates put a space before the answer, and models learn to begin with it
                shown = event if any(parts) else replace(event, text=event.text.lstrip())
                parts.append(shown.text)
                yield shown
        finally:
            answer = "".join(parts).rstrip()
            if answer:
                self.messages = (*asked, Message("assistant", answer))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON, over an earlier one. Raises OutputError."""
        path = Path(path)
        content = {
            "format": _FORMAT,
            "version": 1,
            "model": self.engine.path.name,
            "system": self.system,
            "messages": [asdict(message) for message in self.messages],
        }
        partial = path.with_name(path.name + ".partial")
        try:
            # what was typed may hold half of a surrogate pair, which UTF-8 cannot
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8", "replace")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: the conversation cannot be saved: {error.strerror}") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a conversation that ``save`` wrote, system message included. Raises InputError."""
        self.system, self.messages = _read_conversation(Path(path))
        self._n_again = 0


def _template(engine: Engine, choice: str | None) -> ChatTemplate:
    bos, eos = engine.token_text(engine.bos_token), engine.token_text(engine.eos_token)
    template = find_template(choice, engine.header, bos=bos, eos=eos)
    if template is None:
        raise TemplateError(
            f"{engine.path}: the file has no chat template: name one with --chat-template NAME|FILE, "
            "or continue plain text with 'run --raw'"
        )
    return template


def _read_conversation(path: Path) -> tuple[str | None, tuple[Message, ...]]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: too large for a saved conversation")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a saved conversation: it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != 1:
        raise InputError(f"{path}: not a conversation that this version saved")
    system, messages = content.get("system"), content.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise InputError(f"{path}: not a saved conversation: its messages are missing")
    return system, tuple(_message(path, entry) for entry in messages)


def _message(path: Path, entry: Any) -> Message:
    if isinstance(entry, dict) and entry.get("role") in ("user", "assistant") and isinstance(entry.get("content"), str):
        return Message(entry["role"], entry["content"])
    raise InputError(f"{path}: not a saved conversation: a message needs a role and a content")
