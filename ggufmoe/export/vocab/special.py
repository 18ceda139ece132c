"""Finds the ids of bos, eos and other special tokens, and which of them are added to every text.

Follows the order of sources of ``gguf.SpecialVocab`` (gguf-py of the pinned llama.cpp), with two repairs: a bos or eos
that is written as an object is compared by its content, and where configurations are silent the vocabulary, the
special tokens map and the generation config are asked before llama.cpp's built-in default would apply.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.tokenizer_files import TokenizerFiles
from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab.token_rows import Vocabulary
from ggufmoe.families.family import TokenizerRules
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.special_texts import ENDS_BY_TEXT

_LOG = logging.getLogger("ggufmoe")

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CODELLAMA_ROWS = 32016
_CODELLAMA_EOT = 32010
_STARCODER_ROWS = 49152


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a model: id by role (``bos``), and whether that token is added to every text."""

    ids: dict[str, int]
    added: dict[str, bool]
    further_ends: tuple[int, ...] = ()
    """Every token that ends a text, where there are more than GGUF's eos, eot and eom keys can name; else empty."""


@dataclass
class _Roles:
    """The roles found so far: the text of the token, and whether it is added to every text."""

    contents: dict[str, str]
    added: dict[str, bool] = field(default_factory=dict)
    roles: tuple[str, ...] = _ROLES


def special_tokens(
    files: TokenizerFiles, config: ModelConfig, vocabulary: Vocabulary, rules: TokenizerRules
) -> SpecialTokens:
    """The special tokens that the files of the tokenizer and the model's config state, and those that a family fixes.

    Raises TokenizerError if there is no token that ends a text where llama.cpp's default would be a wrong one, or if a
    bos is to be added and there is none.
    """
    found = _Roles({role: text for role in _ROLES if (text := _content(files.config.get(f"{role}_token"))) is not None})
    _template_roles(found, files, rules)
    if rules.as_llama and len(vocabulary.tokens) == _STARCODER_ROWS:
        found.added.setdefault("bos", False)
    if files.config:
        for role in found.roles:
            stated = files.config.get(f"add_{role}_token")
            if isinstance(stated, bool):
                found.added.setdefault(role, stated)
    ids = _ids(found, files, config, vocabulary)
    _fill_in(ids, found, files, config, vocabulary)
    if (
        rules.as_llama
        and len(vocabulary.tokens) == _CODELLAMA_ROWS
        and vocabulary.tokens[_CODELLAMA_EOT].endswith("<EOT>")
    ):
        ids["eot"] = _CODELLAMA_EOT
    for role, text in rules.special_tokens.items():
        if (fixed := vocabulary.id_of(text)) is not None:
            ids[role] = fixed
    if vocabulary.adds_bos_by_default and vocabulary.model == "gpt2":
        found.added.setdefault("bos", False)
    _check(ids, found.added, vocabulary, files.directory)
    return SpecialTokens(ids, found.added, _name_ends(ids, _stated_ends(files, config), vocabulary))


def _content(entry: Any) -> str | None:
    """The text of a token that is written as a string or as an object; None if it is neither, or empty."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) and text else None


def _template_roles(found: _Roles, files: TokenizerFiles, rules: TokenizerRules) -> None:
    """Add what the post-processor of ``tokenizer.json`` says of bos, eos and sep to ``found``."""
    if files.json and "cls" in found.contents:
        found.contents.setdefault("bos", found.contents["cls"])
    if files.json and "sep" in found.contents:
        found.contents.setdefault("eos", found.contents["sep"])
    processor = files.json.get("post_processor")
    if not isinstance(processor, Mapping):
        return
    steps = processor.get("processors", [processor])
    for step in steps if isinstance(steps, list) else []:
        kind = step.get("type") if isinstance(step, Mapping) else None
        if kind == "ByteLevel":
            found.added.setdefault("bos", False)
            found.added.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            _single(found, step, files, rules)
        else:
            raise TokenizerError(f"{files.json_path}: llama.cpp does not support the post-processor {kind}")


def _single(found: _Roles, step: Mapping[str, Any], files: TokenizerFiles, rules: TokenizerRules) -> None:
    """Add what a template says of a single text: llama.cpp can add at most one token before and one after it."""
    single, pair = _names(step.get("single")), _names(step.get("pair"))
    before, after = single[: single.index(None)], single[single.index(None) + 1 :] if None in single else []
    if len(before) > 1 and before[0] == rules.special_tokens.get("bos"):
        _LOG.warning(
            "%s: the post-processor adds %s before a text, and llama.cpp the first alone; chat templates write all",
            *(files.json_path, " and ".join(map(str, before))),
        )
        before = before[:1]
    if len(before) > 1 or len(after) > 1 or None in after:
        raise TokenizerError(
            f"{files.json_path}: the post-processor adds {single}; llama.cpp adds one token at each end"
        )
    if before:
        _first(found, str(before[0]))
    if after:
        _last(found, str(after[0]))
    _separator(found, pair, bool(before), bool(after))


def _names(template: Any) -> list[str | None]:
    """The items of a template: the text of each special token, None for the input; ``[None]`` if it is malformed."""
    if not isinstance(template, list) or not template:
        return [None]
    names: list[str | None] = []
    for item in template:
        special = item.get("SpecialToken") if isinstance(item, Mapping) else None
        names.append(str(special.get("id")) if isinstance(special, Mapping) else None)
    return names if None in names else [None]


def _first(found: _Roles, token: str) -> None:
    contents = found.contents
    if token not in (contents.get("bos"), contents.get("cls")):
        contents.setdefault("bos", token)
        contents.setdefault("cls", token)
    found.added["bos"] = token in (contents.get("bos"), contents.get("cls"))
    if not found.added["bos"]:
        _LOG.warning("the post-processor adds %r before a text, which is not bos; llama.cpp will not add it", token)


def _last(found: _Roles, token: str) -> None:
    """Make the token at the end of every text the eos; another eos that was stated becomes the end of a turn (eot)."""
    former = found.contents.get("eos")
    if former is not None and token != former:
        found.roles += ("eot",)
        found.contents["eot"] = former
    found.contents["eos"] = token
    found.added["eos"] = True


def _separator(found: _Roles, pair: list[str | None], begins: bool, ends: bool) -> None:
    """Add whether a separator stands between a pair of texts, which llama.cpp needs for reranking only."""
    inner = pair[1:] if begins and pair[0] is not None else pair
    inner = inner[:-1] if ends and inner[-1] is not None else inner
    between = inner[1:-1]
    if len(inner) < 3 or inner[0] is not None or inner[-1] is not None:
        return
    separators = (found.contents.get("sep"), found.contents.get("eos"))
    adds = between[0] in separators and between[0] is not None and not ends
    if len(between) == 2 and between[1] is not None and between[1] in separators:
        adds = True
    found.added["sep"] = adds
    if adds and "sep" not in found.contents and "eos" in found.contents:
        found.contents["sep"] = found.contents["eos"]


def _ids(found: _Roles, files: TokenizerFiles, config: ModelConfig, vocabulary: Vocabulary) -> dict[str, int]:
    """Ids by role, from the added tokens of ``tokenizer.json`` and, for what these lack, from the model's config."""
    rows = {text: row for row, text in enumerate(vocabulary.tokens)}
    by_content: dict[str, int] = {}
    for token in files.added_in_json():
        by_content.setdefault(token.content, rows.get(token.content, token.id))
    ids: dict[str, int] = {}
    if files.config:
        ids = {role: by_content[text] for role in found.roles if (text := found.contents.get(role)) in by_content}
    for role in found.roles:
        stated = config.raw.get(f"{role}_token_id")
        if role not in ids and isinstance(stated, int) and not isinstance(stated, bool):
            ids[role] = stated
    for role, token_id in list(ids.items()):
        if not 0 <= token_id < len(rows):
            _LOG.warning("%s_token_id is %d, but there are only %d tokens; it is left out", role, token_id, len(rows))
            del ids[role]
    return ids


def _fill_in(
    ids: dict[str, int], found: _Roles, files: TokenizerFiles, config: ModelConfig, vocabulary: Vocabulary
) -> None:
    """Add bos and eos to ``ids`` from other files, where the tokenizer and the model's config do not state them."""
    parsed = {"bos": config.bos_token_id, "eos": config.eos_token_id}
    for role in ("bos", "eos"):
        texts = (found.contents.get(role), _content(files.special_map.get(f"{role}_token")))
        named = [vocabulary.id_of(text) for text in texts if text is not None]
        numbers = [parsed[role], _first_id(config.raw, role), _first_id(files.generation, role)]
        candidates = [*named, *numbers, vocabulary.fallback_ids.get(role)]
        known = [found_id for found_id in candidates if found_id is not None and 0 <= found_id < len(vocabulary.tokens)]
        if role not in ids and known:
            ids[role] = known[0]


def _first_id(source: Mapping[str, Any], role: str) -> int | None:
    value = source.get(f"{role}_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) else None


def _stated_ends(files: TokenizerFiles, config: ModelConfig) -> list[int]:
    """Every id at which transformers ends a text: those of generation_config.json, else those of config.json.

    A list in config.json is added to those, because only generation uses lists.
    """
    generation, model = files.generation.get("eos_token_id"), config.raw.get("eos_token_id")
    stated = [generation] if generation is not None else [model]
    stated += [model] if isinstance(model, list) else []
    flat = [item for value in stated for item in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(item for item in flat if type(item) is int))


def _name_ends(ids: dict[str, int], stated: Sequence[int], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Give ``stated`` ends that llama.cpp does not know the roles eot and eom, where these are free.

    Returns all ends if that is not enough for them, else nothing.
    """
    ends = [token for token in stated if 0 <= token < len(vocabulary.tokens)]
    known = {ids.get(role) for role in ("eos", "eot", "eom")}
    unknown = [token for token in ends if token not in known and vocabulary.tokens[token] not in ENDS_BY_TEXT]
    free = [role for role in ("eot", "eom") if role not in ids]
    ids.update(zip(free, unknown, strict=False))
    return tuple(ends) if len(unknown) > len(free) else ()


def _check(ids: Mapping[str, int], added: Mapping[str, bool], vocabulary: Vocabulary, directory: Path) -> None:
    for role in ("bos", "eos"):
        if added.get(role) and role not in ids:
            raise TokenizerError(
                f"{directory}: {role} is to be added to every text, but no file says which token that is; "
                f"set {role}_token in tokenizer_config.json or {role}_token_id in config.json"
            )
    if vocabulary.model == "gpt2" and "eos" not in ids:
        raise TokenizerError(
            f"{directory}: no file says which token ends a text, and llama.cpp would take token 11; "
            "set eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
