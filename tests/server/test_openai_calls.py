"""Calls of OpenAI's client that other servers are judged by too: those of scripts/peers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.options import ContextOptions
from tests.scripted import Scripted
from tests.server.running import loading, serving

PEERS = Path(__file__).resolve().parents[2] / "scripts" / "peers"
SERVED = ContextOptions(n_threads=1, n_parallel=4, n_ctx=4096, flash_attn="off", cache_type_k="f32", cache_type_v="f32")


@pytest.fixture(scope="module")
def asked_with(write_model: Callable[[Scripted], Path]) -> Iterator[tuple[Any, Any]]:
    """The module of the calls, and what they ask with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PEERS)
        script = importlib.import_module("openai_calls")
        asking = sys.modules["openai_asking"]
        with serving(loading(write_model(script.talkative()), SERVED)) as (client, _):
            asked = asking.Asking(str(client.base_url.join("/v1")), "talker")
            yield asking, asked
            asked.close()


def test_all_calls_get_what_openai_documents(asked_with: tuple[Any, Any]) -> None:
    module, asked = asked_with
    outcomes = {f"{one.group}: {one.name}": module.judge(one, asked) for one in module.CALLS}
    assert len(outcomes) == len(module.CALLS) > 58
    assert {name: outcome.what for name, outcome in outcomes.items() if not outcome.is_good} == {}
