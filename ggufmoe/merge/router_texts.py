"""Texts that a router is fitted on: read from the files that a recipe names, tokenized, and split.

Owns the two kinds of files (plain text, and one JSON object a line), which of their texts are taken, which of their
tokens count in a loss, and which texts are held out. Conversations are rendered by the model's own chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ggufmoe.checkpoint.chat_template import default_chat_template
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import RecipeError, TemplateError, one_line
from ggufmoe.files import what_instead
from ggufmoe.merge.prompts import prompt_tokenizer, special_text
from ggufmoe.templates.conversations import Conversation, answer_places, conversation_of
from ggufmoe.templates.jinja_template import ChatTemplate

MAX_TEXT_TOKENS = 512
"""Tokens of one text that are used: attention's memory and time grow with their square."""
_MAX_FILE_BYTES = 64 << 20
"""Bytes of a file that are read; the rest is not used."""
_PIECE_CHARS = 500
"""A piece of a plain text is as many whole lines as have this many characters together; longer lines are cut."""
_HELD_OUT = 5
"""One of so many texts is held out."""


@dataclass(frozen=True)
class RouterText:
    """One text: its tokens, BOS first where the model has one, and the expert that should answer it."""

    expert: int
    file: str
    """The file's name, with as many of its folders as tell it apart from the expert's other files."""
    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    """Places of the tokens that count in a loss: an assistant's answers in a conversation, else all but the first."""
    held_out: bool


@dataclass(frozen=True)
class TextTokens:
    """How the texts of files become tokens of a model."""

    tokenize: Callable[[str], Sequence[int]]
    """The ids of a text, special tokens in it included; BOS first where the model's texts begin with it, and not twice
    where the text does."""
    bos: str
    eos: str
    chat_template: str | None
    """The source of the template that renders conversations."""
    n_vocab: int
    n_ctx: int

    @classmethod
    def of(cls, model: ModelSource) -> TextTokens:
        """By the tokenizer's files of a checkpoint or of a merge. Raises TokenizerError where there are none."""
        directory = model.tokenizer_dir
        tokenize = prompt_tokenizer(directory)
        bos, eos = (special_text(directory, key) for key in ("bos_token", "eos_token"))
        template = model.chat_template or default_chat_template(directory)
        sizes = model.config.n_vocab, model.config.n_ctx
        return cls(lambda text: tokenize(text.removeprefix(bos)), bos, eos, template, *sizes)


def read_texts(
    files: Sequence[Sequence[Path]], tokens: TextTokens, *, text_tokens: int, seed: int
) -> tuple[RouterText, ...]:
    """The texts of each expert's files, at most ``text_tokens`` tokens of each expert, the same for the same ``seed``.

    A file whose name ends in ``.jsonl`` has an object with ``text`` or ``messages`` on each line; any other file is
    plain text, which is cut into pieces of whole lines. An expert's files get equal parts of its tokens; texts are
    drawn from the whole file. One of every five texts of a file is held out, and at least one.

    Raises RecipeError for a file that cannot be read, or is not what its name says, or has fewer than two texts.
    """
    encoder = _Encoder(tokens)
    texts: list[RouterText] = []
    for expert, paths in enumerate(files):
        for path, name in zip(paths, _names(paths), strict=True):
            taken = _drawn(path, encoder, text_tokens // len(paths), seed)
            # of two texts, the second; of more, every fifth
            out = {i for i in range(len(taken)) if i % _HELD_OUT == 1}
            texts += [RouterText(expert, name, *ids, held_out=i in out) for i, ids in enumerate(taken)]
    return tuple(texts)


def _names(paths: Sequence[Path]) -> list[str]:
    """What to call each file: its name, after as many folders as make all names differ."""
    for n in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-n:]) for path in paths]
        if len({*names}) == len({*paths}):
            return names
    return [str(path) for path in paths]


@dataclass(frozen=True)
class _Written:
    """A text of a file and the line that it begins on; ``messages`` is None where it is no conversation."""

    line: int
    text: str
    messages: Conversation | None = None


_Tokens = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a text, and the places of those that count in a loss."""


def _drawn(path: Path, encoder: _Encoder, n_tokens: int, seed: int) -> list[_Tokens]:
    """Texts of a file in a random order, as many as fit into ``n_tokens``, but two."""
    entries = list({(entry.text, str(entry.messages)): entry for entry in _entries(path)}.values())
    taken: list[_Tokens] = []
    room = n_tokens
    for i in np.random.Generator(np.random.Philox(key=seed)).permutation(len(entries)):
        tokens, scored = encoder.encode(path, entries[i])
        if len(tokens) < 2:
            continue
        room -= len(tokens)
        if room < 0 and len(taken) >= 2:
            break
        taken.append((tokens, scored))
    if len(taken) < 2:
        found = "one text" if taken else "no text"
        raise RecipeError(f"{path}: {found}, and at least two are needed: write more")
    return taken


def _entries(path: Path) -> Iterator[_Written]:
    text = _read(path)
    if path.suffix.lower() != ".jsonl":
        if path.suffix.lower() == ".json":
            raise RecipeError(f"{path}: texts are plain text, or one JSON object a line in a file named .jsonl")
        yield from _pieces(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _entry(path, number, line)


def _read(path: Path) -> str:
    if (instead := what_instead(path)) is not None:
        raise RecipeError(f"{path} is {instead}, not a file of texts")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES)
            if file.read(1):
                data = data[: data.rfind(b"\n") + 1]
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise RecipeError(f"{path}: the texts cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _pieces(text: str) -> Iterator[_Written]:
    first, piece = 1, ""
    for number, line in enumerate(text.split("\n"), start=1):
        while len(piece) + len(line) >= 2 * _PIECE_CHARS:
            cut = line.rfind(" ", 0, _PIECE_CHARS) + 1 or _PIECE_CHARS
            yield _Written(first, (piece + line[:cut]).strip())
            first, piece, line = number, "", line[cut:]
        piece += line + "\n"
        if len(piece) >= _PIECE_CHARS:
            yield _Written(first, piece.strip())
            first, piece = number + 1, ""
    if piece.strip():
        yield _Written(first, piece.strip())


def _entry(path: Path, number: int, line: str) -> _Written:
    where = f"{path}:{number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not JSON: {one_line(error)}") from error
    fields = value if isinstance(value, dict) else {}
    text, messages = fields.get("text"), fields.get("messages")
    if isinstance(text, str):
        return _Written(number, text)
    if messages is None:
        raise RecipeError(f"{where}: expected an object with text or messages, found {line.strip():.60}")
    if (said := conversation_of(messages)) is None:
        raise RecipeError(f"{where}: messages must be a list of objects, each with role and content as text")
    return _Written(number, "", said)


class _Encoder:
    """Tokenizes texts and conversations, and says which of their tokens count."""

    def __init__(self, by: TextTokens) -> None:
        self._by = by
        self._template: ChatTemplate | None = None
        self._max_tokens = min(MAX_TEXT_TOKENS, by.n_ctx)

    def encode(self, path: Path, entry: _Written) -> _Tokens:
        """The tokens of a text and those that count. Raises RecipeError with the file and the line."""
        where = f"{path}:{entry.line}"
        try:
            tokens, scored = self._text(entry.text) if entry.messages is None else self._talk(entry.messages, where)
        except TemplateError as error:
            raise RecipeError(f"{where}: {error}") from error
        if tokens and max(tokens) >= self._by.n_vocab:
            raise RecipeError(f"{where}: token {max(tokens)}; the model has only {self._by.n_vocab} embedding rows")
        tokens = tokens[: self._max_tokens]
        inside = tuple(i for i in scored if i < len(tokens))
        return tokens, inside or tuple(range(1, len(tokens)))

    def _text(self, text: str) -> _Tokens:
        tokens = tuple(self._by.tokenize(text))
        return tokens, tuple(range(1, len(tokens)))

    def _talk(self, messages: Conversation, where: str) -> _Tokens:
        by = self._by
        if by.chat_template is None:
            raise RecipeError(f"{where}: the model has no chat template, which messages need; give texts instead")
        self._template = self._template or ChatTemplate(by.chat_template, bos=by.bos, eos=by.eos)
        render = self._template.render
        return answer_places(messages, lambda said, ask: by.tokenize(render(said, add_generation_prompt=ask)))


def breadth(texts: Sequence[RouterText]) -> float:
    """In how many tokens texts are spread: the exponential of the entropy of their frequencies.

    2000 tokens of sums have about 17, of everyday questions 90, of an encyclopedia 290.
    """
    counts = np.unique(np.concatenate([text.tokens[1:] for text in texts]), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


_CHANGED = 0.005
"""Distance of attention weights above which more than rounding differs."""
_NARROW = 30
"""Breadth of texts below which they cannot be about much."""


def fitting_warnings(
    base_is_expert: bool, attention_distances: Sequence[float], base_texts: Sequence[RouterText] = ()
) -> Iterator[str]:
    """What experience says will go wrong with a fitted router, one sentence each.

    ``attention_distances`` says of each expert how far its attention is from the base's, relative to its length;
    ``base_texts`` are the base's texts, where it is known which expert that is.
    """
    if not base_is_expert:
        yield (
            "the base is no expert: what none of the texts is about goes to an expert all the same and may get worse; "
            "add the base as an expert with broad texts"
        )
    if base_texts and (found := breadth(base_texts)) < _NARROW:
        yield (
            f"the base's texts are narrow (spread over {found:.0f} tokens; broad ones have a hundred and more): what "
            "they are not about goes to other experts and may get worse; add texts of everything that the base is for"
        )
    for expert, distance in enumerate(attention_distances):
        if distance > _CHANGED:
            yield (
                f"expert {expert}: its attention differs from the base's by {distance:.1%}, but the merge has only the "
                "base's; no router repairs that"
            )
