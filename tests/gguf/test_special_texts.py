"""Texts of special tokens, told from a chat template's source."""

from __future__ import annotations

import pytest

from ggufmoe.gguf.special_texts import special_literals


@pytest.mark.parametrize(
    ("template", "literals"),
    [
        ("", ()),
        ("{{ bos_token }}[INST] {{ m.content }} [/INST]<think></tool_call>", ()),
        ("<|im_start|>{{ m.role }}\n{{ '<|im_end|>' }}<|im_start|>", ("<|im_start|>", "<|im_end|>")),
        ('{{ "<|eot_id|>" + "</s>" }}', ("<|eot_id|>", "</s>")),
        ("<｜User｜>{{ m.content }}<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜end▁of▁sentence｜>")),
        ("<start_of_turn>user\n{{ m.content }}<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
        ("<|a|>{# <|not_written|> #}<|a-b.c|>{# <|x|>{# #} #}<|y|>", ("<|a|>", "<|a-b.c|>", "<|y|>")),
        ("<|' + m.role + '|> <|{{ m.role }}|> <| x |> <||>", ()),
    ],
)
def test_special_literals(template: str, literals: tuple[str, ...]) -> None:
    assert special_literals(template) == literals


def test_a_hostile_template_takes_no_time() -> None:
    assert special_literals("<|" * 50_000 + "{#" * 50_000) == ()
