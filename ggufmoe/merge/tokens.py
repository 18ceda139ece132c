"""The tokens of a merged model: whose tokenizer it has, and where each row of its embedding and output comes from.

By default both are the base's. A recipe can take the added tokens of its experts instead or besides, as mergekit's
dense merges do: a token that the base knows keeps the base's row, another one gets the row of the expert that knows it,
or the mean of several.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.chat_template import chat_templates, default_chat_template
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.checkpoint.tokenizer_files import TokenizerFiles
from ggufmoe.errors import RecipeError, TokenizerError
from ggufmoe.gguf.floats import convert_floats
from ggufmoe.gguf.special_texts import special_literals
from ggufmoe.merge.prompts import read_vocabulary
from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.weights.source_tensor import Dtype, SourceTensor

BASE = -1
"""The base among the sources of rows; an expert is known by its index."""


@dataclass(frozen=True)
class RowRun:
    """``count`` consecutive rows of the result, each the mean of one row of every source: (source, its first row)."""

    count: int
    sources: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenPlan:
    """The tokenizer of a merged model and its rows. ``runs`` is empty where embedding and output are the base's."""

    directory: Path
    """Where the tokenizer's files are."""
    n_vocab: int
    ids: Mapping[str, int]
    """Token text to id, for every token that has a row; empty if the base's tokens are kept."""
    runs: tuple[RowRun, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are not the base's."""
    scratch: TemporaryDirectory[str] | None = None
    """What ``directory`` lies in, if it was made for this merge."""


class KnownTokens:
    """The tokens of one model that have a row in its embedding."""

    def __init__(self, source: ModelSource, *, warn: bool = False) -> None:
        self.n_vocab = source.config.n_vocab
        self._source = source
        try:
            self.files: TokenizerFiles | None = TokenizerFiles.read(source.tokenizer_dir, warn=warn)
        except TokenizerError:  # raised again where a tokenizer is needed
            self.files = None
        self.added = dict(self._added())
        """Added tokens by text: id and flags, in the words of tokenizer.json."""
        texts = read_vocabulary(source.tokenizer_dir) if self.files else {}
        texts |= {entry["id"]: text for text, entry in self.added.items()}
        self.texts = {token: text for token, text in texts.items() if 0 <= token < self.n_vocab}
        self.ids = {text: token for token, text in self.texts.items()}

    def _added(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.files is None:
            return
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokens = (*self.files.added_in_file(), *self.files.added_in_config(), *self.files.added_in_json())
        decoder = self.files.config.get("added_tokens_decoder") or {}
        listed = {
            entry["content"]: entry for entry in (*decoder.values(), *(self.files.json.get("added_tokens") or ()))
        }
        for token in sorted(tokens, key=lambda token: token.id):
            if 0 <= token.id < self.n_vocab:
                stated = {name: listed[token.content].get(name, False) for name in flags if token.content in listed}
                yield token.content, {"id": token.id, "content": token.content, **flags, **stated}

    def end_texts(self) -> list[str]:
        """Texts of the tokens that end this model's texts, as its configurations state them."""
        files = self.files
        eos = files.config.get("eos_token") if files else None
        named = eos.get("content") if isinstance(eos, Mapping) else eos
        stated = [self._source.config.raw.get("eos_token_id"), files.generation.get("eos_token_id") if files else None]
        flat = [item for value in stated for item in (value if isinstance(value, list) else [value])]
        known = [self.texts[item] for item in flat if type(item) is int and item in self.texts]
        return [*([named] if isinstance(named, str) else []), *known]

    def lacking_in(self, ids: Mapping[str, int]) -> list[str]:
        """Tokens that this model's chat template writes and that ``ids`` (token text to id) lacks, sorted."""
        template = default_chat_template(self._source.tokenizer_dir) or ""
        written = {text for text in self.added if len(text) > 1 and text in template}
        written |= {text for text in special_literals(template) if text in self.ids}
        if "eos_token" in template:
            written |= set(self.end_texts()[:1])
        return sorted(written - ids.keys())


def plan_tokens(choice: str | None, base: ModelSource, experts: Sequence[ModelSource]) -> TokenPlan:
    """Follow the recipe's ``tokenizer_source``: None or ``base``, ``expert:N``, or ``union``.

    Raises RecipeError where the files of a union cannot be written, TokenizerError where there is no tokenizer.
    """
    if choice in (None, "base"):
        config = base.config
        return TokenPlan(base.tokenizer_dir, config.n_vocab, {}, (), config.bos_token_id, config.eos_token_id)
    if choice == "union":
        return _union(base, experts)
    return _of_expert(base, experts, int(str(choice).removeprefix("expert:")))


def _of_expert(base: ModelSource, experts: Sequence[ModelSource], index: int) -> TokenPlan:
    expert, config = experts[index], experts[index].config
    ours, theirs = KnownTokens(base), KnownTokens(expert)
    rows: list[tuple[tuple[int, int], ...]] = []
    for token in range(theirs.n_vocab):
        text = theirs.texts.get(token)
        same = token if text is None and token not in ours.texts and token < ours.n_vocab else ours.ids.get(text or "")
        rows.append(((index, token),) if same is None else ((BASE, same),))
    roles = [
        key for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in {**base.config.raw, **config.raw}
    ]
    changed = {key: config.raw.get(key) for key in roles} | {"vocab_size": config.n_vocab}
    ends = config.bos_token_id, config.eos_token_id
    return TokenPlan(expert.tokenizer_dir, config.n_vocab, theirs.ids, _runs(rows), *ends, changed)


def _union(base: ModelSource, experts: Sequence[ModelSource]) -> TokenPlan:
    ours = KnownTokens(base, warn=True)
    if ours.files is None:
        raise TokenizerError(
            f"{base.tokenizer_dir}: tokenizer_source: union needs the base's tokenizer, which is missing"
        )
    known = {index: KnownTokens(expert) for index, expert in enumerate(experts) if expert is not base}
    new: dict[str, dict[str, Any]] = {}
    sources: dict[str, list[tuple[int, int]]] = {}
    for index, tokens in known.items():
        for text, entry in tokens.added.items():
            if text not in ours.ids:
                new.setdefault(text, entry)
                sources.setdefault(text, []).append((index, entry["id"]))
    first = max(ours.ids.values(), default=-1) + 1
    ids = {text: first + place for place, text in enumerate(new)}
    n_vocab = max(ours.n_vocab, first + len(new))
    rows: list[tuple[tuple[int, int], ...]] = [((BASE, row),) for row in range(n_vocab)]
    for text, token in ids.items():
        rows[token] = tuple(sources[text])
    everything = ours.ids | ids
    ends = [everything[text] for tokens in known.values() for text in tokens.end_texts() if text in everything]
    stated = base.config.raw.get("eos_token_id", base.config.eos_token_id)
    first_ends = [end for end in (stated if isinstance(stated, list) else [stated]) if type(end) is int]
    all_ends = list(dict.fromkeys([*first_ends, *ends]))
    entries = [{**new[text], "id": token} for text, token in ids.items()]
    scratch = _write_union(base.tokenizer_dir, ours.files, entries, all_ends)
    bos, eos = base.config.bos_token_id, base.config.eos_token_id
    config = {"vocab_size": n_vocab, "eos_token_id": all_ends if len(all_ends) != 1 else all_ends[0]}
    return TokenPlan(Path(scratch.name), n_vocab, everything, _runs(rows), bos, eos, config, scratch)


def _write_union(
    directory: Path, files: TokenizerFiles, entries: Sequence[Mapping[str, Any]], eos: Sequence[int]
) -> TemporaryDirectory[str]:
    """The base's tokenizer files in a folder of their own, with ``entries`` as further added tokens."""
    changed: dict[str, Mapping[str, Any]] = {}
    if files.json:
        changed["tokenizer.json"] = {**files.json, "added_tokens": [*(files.json.get("added_tokens") or ()), *entries]}
    decoder = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries}
    stated = files.config.get("added_tokens_decoder") or {}
    settings = {**files.config, "added_tokens_decoder": {**stated, **decoder}}
    settings.pop("chat_template", None)
    if templates := chat_templates(directory):
        named = [{"name": name, "template": template} for name, template in templates.items()]
        settings["chat_template"] = templates["default"] if list(templates) == ["default"] else named
    changed["tokenizer_config.json"] = settings
    for name, content in (("added_tokens.json", files.added), ("special_tokens_map.json", files.special_map)):
        if content:
            changed[name] = content
    if files.generation:
        changed["generation_config.json"] = {**files.generation, "eos_token_id": list(eos)}
    try:
        scratch: TemporaryDirectory[str] = TemporaryDirectory(prefix="ggufmoe-tokenizer-")
        for name in ("tokenizer.model", "vocab.json", "merges.txt"):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, Path(scratch.name) / name)
        for name, content in changed.items():
            (Path(scratch.name) / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8", "surrogatepass")
    except OSError as error:
        raise RecipeError(f"tokenizer_source: union: the tokenizer cannot be put together ({error})") from error
    return scratch


def _runs(rows: Sequence[tuple[tuple[int, int], ...]]) -> tuple[RowRun, ...]:
    """``rows`` as runs: rows that follow each other in all their sources are joined."""
    runs: list[RowRun] = []
    for row in rows:
        last = runs[-1] if runs else None
        if last is not None and row == tuple((source, first + last.count) for source, first in last.sources):
            runs[-1] = RowRun(last.count + 1, last.sources)
        else:
            runs.append(RowRun(1, row))
    return tuple(runs)


class GatheredRows:
    """Rows of several tensors as one (n_vocab, n_embd): the embedding or output of a model with tokens of others.

    ``tensors`` are the sources of ``runs``, all of ``dtype``.
    """

    def __init__(
        self, name: str, dtype: Dtype, runs: Sequence[RowRun], tensors: Mapping[int, SourceTensor], n_cols: int
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = (sum(run.count for run in runs), n_cols)
        self._runs = tuple(runs)
        self._tensors = tensors

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        done = 0
        for run, first, last in self._parts(start, stop):
            self._read_run(run, first, last, out[done : done + last - first])
            done += last - first

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        for run, first, last in self._parts(start, stop):
            for source, row in run.sources:
                yield from byte_ranges(self._tensors[source], row + first, row + last)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[RowRun, int, int]]:
        """The runs that have rows in [start, stop), each with its own rows [first, last) among these."""
        begin = 0
        for run in self._runs:
            first, last = max(start, begin), min(stop, begin + run.count)
            if first < last:
                yield run, first - begin, last - begin
            begin += run.count

    def _read_run(self, run: RowRun, start: int, stop: int, out: NDArray[Any]) -> None:
        if len(run.sources) == 1:
            source, first = run.sources[0]
            self._tensors[source].read_rows(first + start, first + stop, out)
            return
        total = np.zeros(out.shape, np.float32)
        rows, wide = np.empty(out.shape, self.dtype.numpy), np.empty(out.shape, np.float32)
        for source, first in run.sources:
            self._tensors[source].read_rows(first + start, first + stop, rows)
            convert_floats(rows, wide)
            total += wide
        convert_floats(total / np.float32(len(run.sources)), out)
