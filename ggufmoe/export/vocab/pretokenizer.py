"""Finds the pre-tokenizer of llama.cpp that splits text like the pre-tokenizer of a ``tokenizer.json``.

Owns the table of known ones. A pre-tokenizer is a list of patterns, each cutting the pieces that the one before left;
a name is given only where the lists are the same, character by character. Source: ``src/llama-vocab.cpp`` of the
pinned llama.cpp (``llm_tokenizer_bpe``, its comments "original regex from tokenizer.json", and the flags set beside
each name).

Measured on text made to trip them: an apostrophe before U+017F (long s) is a contraction for Hugging Face's regular
expressions and not for llama.cpp's; U+2028 and U+2029 are no spaces in its deepseek patterns. The others are equal, but
for those marked ``approximate``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.tokenizer_files import nodes
from ggufmoe.errors import TokenizerError

_LOG = logging.getLogger("ggufmoe")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_WITH_SLASH = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_TAIL_WITH_SLASH}"
_GPT4O = rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_TAIL_WITH_SLASH}"
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_DIGITS = r"\p{N}+"
_NEWLINE = r"[\r\n]"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer of llama.cpp: its name, the patterns it splits by, and the settings that the name implies."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    approximate: bool = False
    """Whether llama.cpp's pattern differs a little: it knows case of ASCII letters only, and no combining marks."""


KNOWN = (
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True, adds_bos=True),
    PreTokenizer("smaug-bpe", (_LLAMA3,)),
    PreTokenizer("glm4", (_LLAMA3,), ignore_merges=True),
    PreTokenizer("smollm", (_DIGIT, _GPT2)),
    PreTokenizer("refact", (_DIGIT, _GPT2)),
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("olmo", (_GPT2,)),
    PreTokenizer("qwen2", (_QWEN2,)),
    PreTokenizer("qwen35", (_QWEN35,)),
    PreTokenizer("tekken", (_TEKKEN,), ignore_merges=True, adds_bos=True, approximate=True),
    PreTokenizer("gpt-4o", (_GPT4O,), approximate=True),
    PreTokenizer("seed-coder", (_SEED_CODER,)),
    PreTokenizer(
        "deepseek-llm",
        (_NEWLINE, rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?{_DEEPSEEK_PUNCTUATION}", r"\s+$", _CJK, _DIGITS),
    ),
    PreTokenizer("deepseek-v3", _DEEPSEEK_V3),
    PreTokenizer("lfm2", (_LLAMA3,), ignore_merges=True, adds_bos=True),
    PreTokenizer("deepseek-coder", (_NEWLINE, r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
)


def recognise(pre_tokenizer: Any, ignore_merges: bool, path: Path, preferred: str | None = None) -> PreTokenizer:
    """The entry of ``KNOWN`` with the same patterns; where there are several, the ``preferred`` one by name, else the
    one with this ``ignore_merges``.

    Raises TokenizerError, with the patterns and what is supported, if there is none.
    """
    patterns = split_patterns(pre_tokenizer, path)
    matches = [known for known in KNOWN if known.patterns == patterns]
    if not matches:
        raise TokenizerError(
            f"{path}: llama.cpp has no pre-tokenizer known to equal {' then '.join(patterns)!r}; "
            f"supported are {', '.join(known.name for known in KNOWN)}"
        )
    named = [known for known in matches if known.name == preferred]
    best = next((known for known in named or matches if known.ignore_merges == ignore_merges), (named or matches)[0])
    if best.approximate:
        _LOG.warning(
            "%s: llama.cpp's %s knows case of ASCII only and splits before combining marks; some token ids will differ",
            path,
            best.name,
        )
    return best


def split_patterns(pre_tokenizer: Any, path: Path) -> tuple[str, ...]:
    """The patterns that a pre-tokenizer splits by, in order; TokenizerError for a step that does not split by one."""
    patterns: list[str] = []
    for step in nodes(pre_tokenizer, "pretokenizers"):
        pattern = _pattern(step)
        if pattern is None:
            raise TokenizerError(f"{path}: llama.cpp does not support the pre-tokenizer {str(dict(step))[:300]}")
        if pattern:
            patterns.append(pattern.replace("\r", r"\r").replace("\n", r"\n"))
    return tuple(patterns)


def _pattern(step: Mapping[str, Any]) -> str | None:
    """The pattern of one step: empty if it does not split, None if it splits in a way that is no pattern."""
    kind = step.get("type")
    if kind == "Digits":
        return _DIGIT if step.get("individual_digits") else _DIGITS
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return _GPT2 if step.get("use_regex", True) else ""
    if kind == "Split" and _keeps_everything(step):
        pattern = step.get("pattern")
        if isinstance(pattern, Mapping) and isinstance(pattern.get("Regex"), str):
            return str(pattern["Regex"])
        if isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str):
            return re.escape(str(pattern["String"]))
    return None


def _keeps_everything(step: Mapping[str, Any]) -> bool:
    """Whether each match of a ``Split`` step, and each text between matches, becomes a piece.

    ``Removed`` with ``invert`` means the same if the matches of the pattern leave nothing between them, as those of
    patterns do that end in a run of spaces.
    """
    behavior, invert = str(step.get("behavior")).lower(), bool(step.get("invert"))
    if behavior == "isolated":
        return not invert
    pattern = step.get("pattern")
    return (
        behavior == "removed"
        and invert
        and isinstance(pattern, Mapping)
        and str(pattern.get("Regex")).endswith(r"|\s+")
    )
