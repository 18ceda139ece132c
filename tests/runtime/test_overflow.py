"""Texts that outgrow the context: what stays, and that the answer goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import Chat, ContextFullError, ContextOptions, Engine, OptionError
from ggufmoe.runtime.messages import Message
from ggufmoe.runtime.overflow import Overflow
from tests.runtime.test_chat import GREETER
from tests.runtime.test_engine import last_of, text_of
from tests.scripted import BOS, Scripted
from tests.stories import GREEDY

SMALL = ContextOptions(n_ctx=256, n_threads=1)


@pytest.mark.parametrize(
    ("policy", "n_keep", "head", "left"),
    [("shift", 1, 1, 128), ("shift", 100, 100, 178), ("shift", 999, 128, 192), ("truncate-middle", 1, 96, 192)],
)
@pytest.mark.parametrize("n", [257, 1000])
def test_what_stays(policy: str, n_keep: int, head: int, left: int, n: int) -> None:
    overflow = Overflow(policy, n_keep)  # type: ignore[arg-type]
    assert overflow.cut(n, 256) == (head, n - left)
    assert overflow.fitted(range(n), 256) == [*range(head), *range(n - left + head, n)]
    assert overflow.fitted(range(255), 256) == list(range(255))


def test_an_error_names_the_ways_out() -> None:
    with pytest.raises(ContextFullError, match=r"--ctx-size, or have it cut with --overflow"):
        Overflow("error", 0).fitted(range(256), 256)


@pytest.mark.parametrize("policy", ["shift", "truncate-middle"])
def test_an_answer_longer_than_the_context(story_path: Path, policy: str) -> None:
    with Engine(story_path, replace(SMALL, overflow=policy)) as engine:  # type: ignore[arg-type]
        last = last_of(engine.generate(engine.tokenize(" on"), replace(GREEDY, n_predict=700)))
        assert (last.reason, last.timing.generated_tokens) == ("length", 700)
        assert len(engine.cached_tokens) <= 256
        assert engine.cached_tokens[0] == BOS
        prompt = engine.tokenize(" on" * 500 + " once")
        assert text_of(engine.generate(prompt, GREEDY)) == " upon a time"
        assert engine.cached_tokens[0] == BOS


def test_shifted_keys_serve_as_computed_ones_do(mixing_path: Path) -> None:
    with Engine(mixing_path, replace(SMALL, context_shift=True)) as engine:
        *tokens, _ = engine.generate(engine.tokenize(" w1"), replace(GREEDY, n_predict=400))
        assert len({event.token_id for event in tokens[260:]}) > 1  # type: ignore[union-attr]
        kept = list(engine.cached_tokens)
        assert np.isfinite(engine.logits(kept)).all()


def test_contradicting_options() -> None:
    assert ContextOptions(context_shift=True).overflow_policy == "shift"
    with pytest.raises(OptionError, match="contradict"):
        ContextOptions(context_shift=True, overflow="truncate-middle")


@pytest.mark.parametrize(("policy", "first_stays"), [("shift", False), ("truncate-middle", True)])
def test_a_chat_leaves_out_whole_turns(write_model: Callable[[Scripted], Path], policy: str, first_stays: bool) -> None:
    with Engine(write_model(GREETER), replace(SMALL, overflow=policy)) as engine:  # type: ignore[arg-type]
        chat = Chat(engine, system="be kind", sampling=replace(GREEDY, n_predict=20))
        turns = [part for i in range(20) for part in (Message("user", "hello" * (i + 1)), Message("assistant", "hi"))]
        chat.messages = tuple(turns)
        assert text_of(chat.send("again")) == "hi there"
        prompt = engine.detokenize(engine.cached_tokens).decode().replace("▁", " ")
        assert prompt.startswith("[system] be kind[user]")
        assert "[user] again[assistant]" in prompt
        assert ("[user] hello[assistant]" in prompt) == first_stays
        assert len(engine.cached_tokens) < 150
        assert len(chat.messages) == 42
        cached = last_of(chat.send("again")).timing.cached_tokens
        assert cached > 50


def test_a_session_of_a_chat(write_model: Callable[[Scripted], Path], tmp_path: Path) -> None:
    path = write_model(GREETER)
    with Engine(path, SMALL) as engine:
        chat = Chat(engine, system="be kind", sampling=GREEDY)
        list(chat.send("hello"))
        chat.save_session(tmp_path / "talk")
    with Engine(path, SMALL) as engine:
        other = Chat(engine, sampling=GREEDY)
        other.load_session(tmp_path / "talk")
        assert (other.system, other.messages) == (chat.system, chat.messages)
        last = last_of(other.send("again"))
        assert last.timing.prompt_tokens - last.timing.cached_tokens <= 4
