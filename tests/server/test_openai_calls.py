"""Calls of OpenAI's client that other servers are judged by too: those of scripts/peers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe.options import ContextOptions
from tests.scripted import Scripted
from tests.server.running import loading, serving

PEERS = Path(__file__).resolve().parents[2] / "scripts" / "peers"
WORDS = [f" w{n}" for n in range(30)]
PIECES = ["[user]", "[system]", "[tool]", "[assistant]", "A", "is", " "]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    '{% for call in m.tool_calls or [] %}<call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</call>{% endfor %}{% endfor %}'
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talkative() -> Scripted:
    """A model that says words without an end; which of them depends on all of the text before."""
    random = np.random.default_rng(5)
    controls = ["<call>", "</call>"]
    everything = Scripted(pieces=[*WORDS, *PIECES], controls=controls).vocab
    follows = {piece: dict(zip(WORDS, random.normal(0, 9, len(WORDS)).tolist(), strict=True)) for piece in everything}
    return Scripted(follows, controls=controls, chat_template=TEMPLATE, n_ctx_train=4096, random_layers=True)


SERVED = ContextOptions(n_threads=1, n_parallel=4, n_ctx=4096, flash_attn="off", cache_type_k="f32", cache_type_v="f32")


@pytest.fixture(scope="module")
def asked_with(write_model: Callable[[Scripted], Path]) -> Iterator[tuple[Any, Any]]:
    """The module of the calls, and what they ask with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PEERS)
        importlib.import_module("openai_calls")
        asking = sys.modules["openai_asking"]
        with serving(loading(write_model(talkative()), SERVED)) as (client, _):
            asked = asking.Asking(str(client.base_url.join("/v1")), "talker")
            yield asking, asked
            asked.close()


def test_all_calls_get_what_openai_documents(asked_with: tuple[Any, Any]) -> None:
    module, asked = asked_with
    outcomes = {f"{one.group}: {one.name}": module.judge(one, asked) for one in module.CALLS}
    assert len(outcomes) == len(module.CALLS) > 58
    assert {name: outcome.what for name, outcome in outcomes.items() if not outcome.is_good} == {}
