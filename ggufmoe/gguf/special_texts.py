"""Texts of special tokens: those that llama.cpp takes as ends of a text, and those that a chat template writes.

Needs no vocabulary and runs no template; whether a text is one token of a model is asked elsewhere.
"""

from __future__ import annotations

import re

ENDS_BY_TEXT = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    )
)
"""Tokens that llama.cpp takes as ends of generation by their text (``special_eog_ids`` of ``src/llama-vocab.cpp``)."""

_NAMED = "|".join(map(re.escape, sorted({*ENDS_BY_TEXT, "<s>", "<bos>", "<start_of_turn>", "[gMASK]", "<sop>"})))
_LOOKS_SPECIAL = re.compile(rf"<\|[^\s<>|'\"{{}}]{{1,60}}\|>|<\uff5c[^\s<>\uff5c'\"{{}}]{{1,60}}\uff5c>|{_NAMED}")


def special_literals(template: str) -> tuple[str, ...]:
    """The texts in a chat template that are written like special tokens (``<|im_start|>``, ``</s>``), each once.

    Told from the template's source, comments left out: what it puts together from parts is not seen.
    """
    kept = "".join(part.partition("{#")[0] for part in template.split("#}"))
    return tuple(dict.fromkeys(_LOOKS_SPECIAL.findall(kept)))
