"""The engine on models that say what the test expects."""

from __future__ import annotations

import ctypes
import gc
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe import (
    Cancelled,
    Chat,
    ContextFullError,
    ContextOptions,
    DecodeError,
    Engine,
    EngineError,
    GGUFError,
    InputError,
    ModelLoadError,
    OffloadOptions,
    SamplingOptions,
    convert,
)
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import ValueType
from ggufmoe.native import backends
from ggufmoe.native import library as native
from ggufmoe.placement.footprint import DEFAULT_MAX_CTX
from ggufmoe.runtime import loading
from ggufmoe.runtime.events import ChatEvent, Finished, Token
from ggufmoe.work import Progress
from tests.scripted import BOS, EOS, Scripted
from tests.stories import GREEDY, ONE_THREAD, STORY


def text_of(events: Iterator[ChatEvent]) -> str:
    return "".join(event.text for event in events)


def last_of(events: Iterator[ChatEvent]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


class CountingFlag:
    """Set from the n-th question on."""

    def __init__(self, n: int) -> None:
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


# ---- text and tokens


def test_tokenize_puts_one_bos_first_where_the_model_wants_it(story: Engine) -> None:
    assert story.tokenize(" once upon") == [BOS, *STORY.ids(" once", " upon")]
    assert story.tokenize(" once", add_bos=False) == STORY.ids(" once")


def test_every_end_that_the_file_lists_ends_the_text(write_model: Callable[[Scripted], Path]) -> None:
    spec = replace(STORY, metadata={"ggufmoe.eos_token_ids": [STORY.id(" a"), EOS, -7, 10**9]})
    with Engine(write_model(spec), ONE_THREAD) as engine:
        assert [engine.ends_text(token) for token in (EOS, *spec.ids(" a", " upon"))] == [True, True, False]
        *events, last = engine.generate(engine.tokenize(" once"), GREEDY)
    assert (text_of(iter(events)), last.reason) == (" upon", "stop")  # type: ignore[union-attr]


def test_ends_that_are_no_token_ids_are_passed_over(write_model: Callable[[Scripted], Path]) -> None:
    for odd in (7, "</s>", ["</s>"], True):
        with Engine(write_model(replace(STORY, metadata={"ggufmoe.eos_token_ids": odd})), ONE_THREAD) as engine:
            assert text_of(engine.generate(engine.tokenize(" once"), GREEDY)) == " upon a time"


def test_tokenize_without_bos_where_the_model_wants_none(write_model: Callable[[Scripted], Path]) -> None:
    spec = replace(STORY, add_bos=False)
    with Engine(write_model(spec), ONE_THREAD) as engine:
        assert not engine.adds_bos
        assert engine.tokenize(" once") == spec.ids(" once")


def test_special_tokens_are_read_only_when_asked_for(story: Engine) -> None:
    assert story.tokenize("</s>", add_bos=False, parse_special=True) == [EOS]
    assert EOS not in story.tokenize("</s>", add_bos=False)


@pytest.mark.parametrize("text", ["", " once upon a time", "Straße 日本 🦊", "nul\0nul", "\n\t"])
def test_bytes_of_tokens_are_those_of_the_text(story: Engine, text: str) -> None:
    pieces = story.detokenize(story.tokenize(text, add_bos=False)).decode()
    assert pieces.replace("▁", " ") == text


def test_a_lone_surrogate_becomes_a_question_mark(story: Engine) -> None:
    assert story.detokenize(story.tokenize("a\udcffb", add_bos=False)) == b"a?b"


def test_a_piece_longer_than_the_first_buffer(write_model: Callable[[Scripted], Path]) -> None:
    long = " long" * 40
    spec = Scripted(pieces=[long])
    with Engine(write_model(spec), ONE_THREAD) as engine:
        assert engine.piece(spec.id(long)) == long.encode()


def test_control_tokens_have_no_bytes_unless_asked_for(story: Engine) -> None:
    assert story.piece(EOS) == b""
    assert story.piece(EOS, special=True) == b"</s>"
    assert story.token_text(EOS) == "</s>"
    assert story.token_text(None) == ""


@pytest.mark.parametrize("token", [-1, len(STORY.vocab)])
def test_an_id_outside_the_vocabulary_is_refused(story: Engine, token: int) -> None:
    with pytest.raises(InputError, match="not a token"):
        story.piece(token)
    with pytest.raises(InputError, match="not a token"):
        story.generate([BOS, token])


def test_a_file_without_a_tokenizer(write_model: Callable[[Scripted], Path]) -> None:
    with Engine(write_model(replace(STORY, vocabulary=False)), ONE_THREAD) as engine:
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.tokenize("text")
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.piece(5)
        assert engine.bos_token is None
        assert engine.logits([5, 6]).shape == (2, engine.n_vocab)


# ---- generation


def test_an_answer_ends_where_the_model_ends_it(story: Engine) -> None:
    story.forget()
    *tokens, last = story.generate(story.tokenize(" once"), GREEDY)
    assert tokens == [Token(piece, STORY.id(piece)) for piece in (" upon", " a", " time")]
    assert isinstance(last, Finished)
    assert (last.text, last.reason) == ("", "stop")
    timing = last.timing
    assert (timing.prompt_tokens, timing.cached_tokens, timing.generated_tokens) == (2, 0, 3)
    assert timing.evaluated_tokens == 3
    assert timing.prompt_s > 0
    assert timing.generated_tokens_per_s == pytest.approx(3 / timing.generation_s)
    assert timing.prompt_tokens_per_s == pytest.approx(2 / timing.prompt_s)


def test_a_character_in_four_tokens_comes_whole(story: Engine) -> None:
    texts = [event.text for event in story.generate(story.tokenize(" smile"), GREEDY)]
    assert texts == ["", "", "", "😀", ""]


def test_half_a_character_at_the_end_is_marked(story: Engine) -> None:
    assert text_of(story.generate(story.tokenize(" cut"), GREEDY)) == "\ufffd"


def test_a_stop_string_over_two_tokens_is_not_given_out(story: Engine) -> None:
    events = list(story.generate(story.tokenize(" once"), GREEDY, stop=["on a"]))
    assert "".join(event.text for event in events) == " up"
    assert events[-1].reason == "stop"  # type: ignore[union-attr]


def test_one_text_is_one_stop_string(story: Engine) -> None:
    assert text_of(story.generate(story.tokenize(" once"), GREEDY, stop="on a")) == " up"


@pytest.mark.parametrize("prompt", ["once", b"once", ["once"], [1.5]])
def test_a_prompt_of_something_else_than_tokens(story: Engine, prompt: Any) -> None:
    for ask in (story.generate, story.prefill, story.evaluate, story.logits):
        with pytest.raises(TypeError, match=r"engine\.tokenize\(text\)|interpreted as an integer"):
            ask(prompt)


def test_arguments_of_other_kinds(story: Engine) -> None:
    for text in (b"once", 5, None):
        with pytest.raises(TypeError, match=r"expected a text \(str\), not"):
            story.tokenize(text)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cancel must be a flag such as threading\.Event\(\), not True"):
        list(story.generate([1], cancel=True))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cancel must be a flag"):
        Engine(story.path, cancel=lambda: False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an Engine, not"):
        Chat(story.path)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"context": {"n_ctx": 512}}, {"offload": {"cpu_moe": True}}, {"offload": "cpu"}])
def test_options_that_are_none(story_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"expected (Context|Offload)Options\(\.\.\.\), not"):
        Engine(story_path, **given)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_length(story: Engine, n: int) -> None:
    events = list(story.generate(story.tokenize(" on"), replace(GREEDY, n_predict=n)))
    assert "".join(event.text for event in events) == " on" * n
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "length"
    assert last.timing.evaluated_tokens == max(0, n - 1)


def test_a_full_context_ends_the_answer(story_path: Path) -> None:
    with Engine(story_path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        last = last_of(engine.generate(engine.tokenize(" on"), replace(GREEDY, n_predict=-1)))
        assert last.reason == "context"
        assert len(engine.cached_tokens) == engine.n_ctx == 256
        # the last token is drawn but has no room of its own
        assert last.timing.generated_tokens == 256 - 2 + 1
        assert text_of(engine.generate(engine.tokenize(" once"), GREEDY)) == " upon a time"


def test_a_prompt_that_does_not_fit(story: Engine) -> None:
    with pytest.raises(ContextFullError, match=r"the prompt has 513 tokens and the context holds 512: .*--ctx-size"):
        story.generate(story.tokenize(" on" * 512))


def test_an_empty_prompt(story: Engine) -> None:
    with pytest.raises(InputError, match="empty"):
        story.generate([])


def test_small_batches_give_the_same_answer(mixing_path: Path) -> None:
    answers = set()
    for n_batch in (512, 7, 1):
        options = ContextOptions(n_batch=n_batch, n_ubatch=n_batch, n_threads=1)
        with Engine(mixing_path, options) as engine:
            prompt = engine.tokenize(" w1 w2 w3 w4 w5 w6 w7 w8 w9")
            answers.add(text_of(engine.generate(prompt, replace(GREEDY, n_predict=8))))
    assert len(answers) == 1
    assert len(answers.pop().split()) == 8


# ---- the cache


def test_a_shared_prefix_is_not_computed_again(mixing_path: Path) -> None:
    settings = replace(GREEDY, n_predict=6)
    with Engine(mixing_path, ONE_THREAD) as engine:
        first, second = engine.tokenize(" w1 w2 w3 w4"), engine.tokenize(" w1 w2 w9")
        list(engine.generate(first, settings))
        reused = list(engine.generate(second, settings))
        engine.forget()
        fresh = list(engine.generate(second, settings))
    assert isinstance(reused[-1], Finished)
    assert isinstance(fresh[-1], Finished)
    assert reused[-1].timing.cached_tokens == 3  # BOS w1 w2
    assert fresh[-1].timing.cached_tokens == 0
    assert reused[:-1] == fresh[:-1]


def test_the_answer_is_in_the_cache_too(story: Engine) -> None:
    story.forget()
    list(story.generate(story.tokenize(" once"), GREEDY))
    again = last_of(story.generate(story.tokenize(" once upon a time once"), GREEDY))
    assert again.timing.cached_tokens == 5
    assert again.timing.prompt_tokens == 6


def test_the_last_token_of_a_prompt_is_always_computed(story: Engine) -> None:
    prompt = story.tokenize(" once")
    list(story.generate(prompt, GREEDY))
    assert last_of(story.generate(prompt, GREEDY)).timing.cached_tokens == len(prompt) - 1


def test_what_was_said_before_matters_to_the_mixing_model(mixing_path: Path) -> None:
    with Engine(mixing_path, ONE_THREAD) as engine:
        one, other = engine.logits(engine.tokenize(" w1 w9"))[-1], engine.logits(engine.tokenize(" w2 w9"))[-1]
    assert np.abs(one - other).max() > 1


# ---- logits


def test_logits_follow_the_script(story: Engine) -> None:
    rows = story.logits(STORY.ids(" once", " upon", " a"))
    assert rows.shape == (3, len(STORY.vocab))
    assert rows.dtype == np.float32
    assert list(rows.argmax(axis=1)) == STORY.ids(" upon", " a", " time")
    np.testing.assert_allclose(rows.max(axis=1), 50.0, rtol=1e-2)


def test_logits_do_not_depend_on_the_batch(mixing_path: Path) -> None:
    tokens = list(range(259, 280))
    with Engine(mixing_path, ONE_THREAD) as engine:
        whole = engine.logits(tokens)
    with Engine(mixing_path, ContextOptions(n_batch=4, n_ubatch=4, n_threads=1)) as engine:
        np.testing.assert_allclose(engine.logits(tokens), whole, atol=2e-3)


def test_logits_that_are_cancelled_between_batches(mixing_path: Path) -> None:
    with Engine(mixing_path, ContextOptions(n_batch=4, n_ubatch=4, n_threads=1)) as engine:
        batches = engine.logits_by_batch(list(range(259, 280)))
        assert next(batches).shape == (4, engine.n_vocab)
        engine.cancel()
        with pytest.raises(DecodeError, match="cancelled"):
            next(batches)


@pytest.mark.parametrize("ask", ["logits", "logits_by_batch"])
def test_logits_are_cancelled_by_a_flag_too(mixing_path: Path, ask: str) -> None:
    flag = threading.Event()
    with Engine(mixing_path, ContextOptions(n_batch=4, n_ubatch=4, n_threads=1)) as engine:
        tokens = list(range(259, 280))
        assert len(list(getattr(engine, ask)(tokens, cancel=flag)))
        flag.set()
        with pytest.raises(Cancelled, match="computing logits was stopped"):
            list(getattr(engine, ask)(tokens, cancel=flag))


# ---- contexts beyond what a model was trained for


@pytest.mark.parametrize(
    ("window", "n_ctx", "said"),
    [
        (None, 1024, "a context of 1024 tokens is longer than the 512 that the model was trained for"),
        (300, 512, r"attends to the last 300 tokens only, .*: past position 300 .*; --ctx-size 300 ends there"),
        (300, None, "attends to the last 300 tokens only"),
        (300, 0, "attends to the last 300 tokens only"),
        (300, 300, None),
        (None, 512, None),
        (None, None, None),
    ],
)
def test_a_context_beyond_what_the_model_was_trained_for_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int | None, n_ctx: int | None, said: str | None
) -> None:
    metadata = {} if window is None else {"ggufmoe.sliding_window": np.uint32(window)}
    path = Scripted({"a": "b"}, metadata=metadata).write(tmp_path / "m.gguf")
    context = ContextOptions(n_ctx=n_ctx, n_threads=1)
    with caplog.at_level(logging.WARNING, "ggufmoe"), Engine(path, context) as engine:
        engine.set_context(ContextOptions(n_ctx=n_ctx, n_threads=1, n_batch=64))
    told = [record.getMessage() for record in caplog.records if record.name == "ggufmoe"]
    assert len(told) == (said is not None)
    assert not said or re.search(rf"m\.gguf: .*{said}", told[0])


def test_a_context_that_grows_later_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Scripted({"a": "b"}).write(tmp_path / "m.gguf")
    with caplog.at_level(logging.WARNING, "ggufmoe"), Engine(path, ONE_THREAD) as engine:
        assert not [record for record in caplog.records if record.name == "ggufmoe"]
        for _ in range(2):
            engine.set_context(ContextOptions(n_ctx=1024, n_threads=1))
    assert len([record for record in caplog.records if "a context of 1024 tokens" in record.getMessage()]) == 1


# ---- computing without drawing


def test_evaluating_goes_on_from_the_cache(mixing_path: Path) -> None:
    with Engine(mixing_path, ONE_THREAD) as engine:
        prompt = engine.tokenize(" w1 w9 w3 w4")
        whole = list(engine.generate(prompt, GREEDY))
        engine.forget()
        assert engine.evaluate(prompt[:2])
        assert engine.evaluate(prompt[2:3])
        assert engine.cached_tokens == tuple(prompt[:3])
        again = list(engine.generate(prompt, GREEDY))
        assert again[:-1] == whole[:-1]
        assert last_of(iter(again)).timing.cached_tokens == 3


def test_evaluating_what_cannot_be(story: Engine) -> None:
    with pytest.raises(InputError, match="is not a token"):
        story.evaluate([-1])
    story.forget()
    with pytest.raises(ContextFullError):
        story.evaluate([1] * (story.n_ctx + 1))


def test_evaluating_is_stopped_from_elsewhere(mixing_path: Path) -> None:
    with Engine(mixing_path, ContextOptions(n_ctx=512, n_threads=1)) as engine:
        done: list[float | None] = []
        thread = threading.Thread(target=lambda: done.append(engine.evaluate([1] * 480, one_by_one=True)))
        thread.start()
        while thread.is_alive():
            engine.cancel()
            thread.join(0.001)
        assert done == [None]
        engine.forget()
        assert engine.evaluate([1] * 8)


def test_another_context_for_the_same_weights(mixing_path: Path) -> None:
    with Engine(mixing_path, ONE_THREAD) as engine:
        prompt = engine.tokenize(" w1 w9 w3 w4")
        short = replace(GREEDY, n_predict=16)
        answer = list(engine.generate(prompt, short))
        engine.set_context(ContextOptions(n_ctx=256, n_threads=2, n_batch=3, flash_attn="off"))
        assert (engine.n_ctx, engine.cached_tokens) == (256, ())
        assert list(engine.generate(prompt, short))[:-1] == answer[:-1]
        engine.set_context(ContextOptions(n_threads=1, cache_ram=0))
        talks = [engine.tokenize(f" w{i}" * 40) for i in (1, 2)]
        cached = [last_of(engine.generate(talk, short)).timing.cached_tokens for talk in (*talks, talks[0])]
        assert cached == [0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ContextOptions(n_ctx=2**30, n_threads=1), "takes .* TiB"),
        (ContextOptions(cache_type_v="q8_0", flash_attn="off", n_threads=1), "no such context can be made"),
    ],
)
def test_a_context_that_cannot_be_made_leaves_an_engine_without_one(
    mixing_path: Path, options: ContextOptions, message: str
) -> None:
    with Engine(mixing_path, ONE_THREAD) as engine:
        prompt = engine.tokenize(" w1 w9 w3 w4")
        answer = text_of(engine.generate(prompt, GREEDY))
        with pytest.raises(ModelLoadError, match=message):
            engine.set_context(options)
        with pytest.raises(EngineError, match=r"there is no context since .*set_context"):
            list(engine.generate(prompt, GREEDY))
        engine.set_context(ONE_THREAD)
        assert text_of(engine.generate(prompt, GREEDY)) == answer
        with engine.observed(lambda *_: False):
            assert text_of(engine.generate(prompt, GREEDY)) == answer


def test_several_texts_share_the_context(mixing_path: Path) -> None:
    with Engine(mixing_path, ContextOptions(n_ctx=1024, n_seq_max=2, n_threads=1)) as engine:
        assert engine.n_ctx == 512
        with pytest.raises(ContextFullError, match="the context holds 512"):
            engine.generate([5] * 600)
        last = last_of(engine.generate([5] * 500, GREEDY))
        assert (last.reason, last.timing.generated_tokens) == ("context", 13)


def test_who_was_told_of_the_loading_may_go(mixing_path: Path) -> None:
    class Window:
        def show(self, _: Progress) -> None: ...

    window = Window()
    gone = weakref.ref(window)
    with Engine(mixing_path, ONE_THREAD, on_progress=window.show):
        del window
        gc.collect()
        assert gone() is None


# ---- cancelling


def test_a_flag_that_is_set_before_the_prompt(story: Engine) -> None:
    story.forget()
    flag = threading.Event()
    flag.set()
    last = last_of(story.generate(story.tokenize(" once" * 50), GREEDY, cancel=flag))
    assert last.reason == "cancelled"
    assert last.timing.generated_tokens == 0
    assert story.cached_tokens == ()
    assert text_of(story.generate(story.tokenize(" once"), GREEDY)) == " upon a time"


def test_a_flag_that_is_set_while_the_prompt_is_computed(story_path: Path) -> None:
    with Engine(story_path, ContextOptions(n_ctx=16384, n_batch=16384, n_threads=1)) as engine:
        flag = CountingFlag(1)  # the first question comes before the computing, the next ones during it
        last = last_of(engine.generate(engine.tokenize(" once" * 16000), GREEDY, cancel=flag))
        assert last.reason == "cancelled"
        assert last.timing.generated_tokens == 0
        assert len(engine.cached_tokens) < 16000
        assert last.timing.prompt_tokens == len(engine.cached_tokens)
        assert text_of(engine.generate(engine.tokenize(" once"), GREEDY)) == " upon a time"


def test_a_flag_that_is_set_between_tokens(story: Engine) -> None:
    flag = threading.Event()
    events = []
    for event in story.generate(story.tokenize(" on"), GREEDY, cancel=flag):
        events.append(event)
        if len(events) == 3:
            flag.set()
    assert [event.text for event in events] == [" on"] * 3 + [""]
    assert events[-1].reason == "cancelled"  # type: ignore[union-attr]


def test_cancel_from_elsewhere(story: Engine) -> None:
    events = story.generate(story.tokenize(" on"), GREEDY)
    next(events)
    threading.Thread(target=story.cancel).start()
    assert last_of(events).reason == "cancelled"


def test_closing_the_iterator_leaves_a_usable_engine(story: Engine) -> None:
    events = story.generate(story.tokenize(" on"), GREEDY)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert text_of(story.generate(story.tokenize(" once"), GREEDY)) == " upon a time"


def test_an_answer_may_be_read_between_two_tokens_of_another(story: Engine) -> None:
    first = story.generate(story.tokenize(" on"), GREEDY)
    next(first)
    assert text_of(story.generate(story.tokenize(" once"), GREEDY)) == " upon a time"
    assert sum(1 for _ in first) == 256


# ---- sampling


def test_one_seed_one_answer(story: Engine) -> None:
    def throws(seed: int | None) -> tuple[str, int]:
        events = list(story.generate(story.tokenize(" dice"), SamplingOptions(seed=seed, temperature=1.0)))
        assert isinstance(events[-1], Finished)
        return events[0].text, events[-1].seed

    assert {throws(seed)[0] for seed in range(12)} == {" one", " two", " three"}
    assert throws(3) == throws(3)
    face, drawn = throws(None)
    assert throws(drawn)[0] == face


def test_the_models_own_sampling_holds_where_nothing_else_is_said(write_model: Callable[[Scripted], Path]) -> None:
    spec = replace(STORY, metadata={"general.sampling.top_k": 1, "general.sampling.temp": 1.5})
    with Engine(write_model(spec), ONE_THREAD) as engine:
        own = {text_of(engine.generate(engine.tokenize(" dice"), SamplingOptions(seed=i))) for i in range(8)}
        asked = {text_of(engine.generate(engine.tokenize(" dice"), SamplingOptions(seed=i, top_k=3))) for i in range(8)}
    assert len(own) == 1
    assert len(asked) > 1


def test_a_repeat_penalty_counts_the_prompt(write_model: Callable[[Scripted], Path]) -> None:
    spec = Scripted({" on": {" on": 10.0, " off": 9.0}})
    with Engine(write_model(spec), ONE_THREAD) as engine:
        assert text_of(engine.generate(engine.tokenize(" on"), replace(GREEDY, repeat_penalty=2.0))) == " off"


# ---- loading and closing


def test_nothing_is_printed_and_the_log_goes_to_logging(
    story_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ggufmoe.llama"), Engine(story_path, ONE_THREAD) as engine:
        engine.tokenize("text")
    assert capfd.readouterr() == ("", "")
    assert any("n_ctx" in record.getMessage() for record in caplog.records)


def test_context_sizes(story_path: Path, write_model: Callable[[Scripted], Path]) -> None:
    with Engine(story_path, ContextOptions(n_ctx=100)) as engine:
        assert engine.n_ctx == 256
    with Engine(story_path, ContextOptions(n_ctx=0)) as engine:
        assert engine.n_ctx == engine.n_ctx_train == 512
    with Engine(write_model(replace(STORY, n_ctx_train=8192)), ONE_THREAD) as engine:
        assert engine.n_ctx == DEFAULT_MAX_CTX


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
@pytest.mark.parametrize("n_ctx", [2**30, 2**31 - 1])
def test_a_context_that_the_memory_cannot_hold_never_reaches_llama_cpp(
    write_model: Callable[[Scripted], Path], caplog: pytest.LogCaptureFixture, arch: str, n_ctx: int
) -> None:
    message = rf"a context of {n_ctx} tokens takes .* TiB for the KV cache and about .*this machine has .*--ctx-size"
    with caplog.at_level(logging.DEBUG, "ggufmoe"), pytest.raises(ModelLoadError, match=message):
        Engine(write_model(replace(STORY, arch=arch)), ContextOptions(n_ctx=n_ctx, n_threads=1))
    assert "ggufmoe.llama" not in {record.name for record in caplog.records}


def test_the_buffers_of_a_context_count_as_its_cache_does(story_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ContextOptions(n_ctx=4096, n_batch=4096, n_ubatch=4096, n_threads=1)
    with Engine(story_path, wide) as engine:
        host = engine.placement.plan.host
    monkeypatch.setattr(loading, "memory_bytes", lambda: host.kv_bytes + host.compute_bytes)
    Engine(story_path, wide).close()
    monkeypatch.setattr(loading, "memory_bytes", lambda: host.kv_bytes + host.compute_bytes - 1)
    with pytest.raises(ModelLoadError, match="a context of 4096 tokens takes"):
        Engine(story_path, wide)


def test_a_tilde_is_the_home_directory(story_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(story_path.parent))
    monkeypatch.setenv("USERPROFILE", str(story_path.parent))
    with Engine(f"~/{story_path.name}", ONE_THREAD) as engine:
        assert engine.path == story_path
        engine.prefill(engine.tokenize(" once"))
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        assert engine.save_session("~/session") == 2
        assert engine.load_session(tmp_path / "session") == engine.load_session("~/session")


@pytest.mark.parametrize("mode", ["none", "mmap", "dio"])
def test_load_modes_give_the_same_model(story_path: Path, mode: str) -> None:
    with Engine(story_path, ONE_THREAD, OffloadOptions(load_mode=mode, repack=False, n_gpu_layers=0)) as engine:  # type: ignore[arg-type]
        assert text_of(engine.generate(engine.tokenize(" once"), GREEDY)) == " upon a time"


def test_a_quantized_cache(story_path: Path) -> None:
    options = ContextOptions(cache_type_k="q8_0", cache_type_v="bf16", flash_attn="on", n_threads=1)
    with pytest.raises(ModelLoadError, match=r"no such context can be made: .*q8_0"):
        Engine(story_path, options)  # 80 values a head are no multiple of 32
    with Engine(story_path, replace(options, cache_type_k="f32")) as engine:
        assert text_of(engine.generate(engine.tokenize(" once"), GREEDY)) == " upon a time"


def test_a_model_that_llama_cpp_refuses(write_model: Callable[[Scripted], Path]) -> None:
    path = write_model(replace(STORY, arch="nonsense"))
    with pytest.raises(ModelLoadError, match="unknown model architecture: 'nonsense'") as caught:
        Engine(path)
    assert str(caught.value).startswith(f"{path}: llama.cpp cannot load it: ")
    assert "\n" not in str(caught.value)


def test_an_old_file_with_one_tensor_per_expert(write_model: Callable[[Scripted], Path]) -> None:
    old = {"blk.0.ffn_gate.0.weight": np.zeros((32, 32), np.float32)}
    with pytest.raises(GGUFError, match=r"one tensor per expert .*`ggufmoe quantize .* -q COPY`"):
        Engine(write_model(replace(STORY, tensors=old)))


def test_a_file_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(encode_header({"general.architecture": GGUFValue(ValueType.STRING, "llama")}, ()))
    with pytest.raises(GGUFError, match="holds no weights"):
        Engine(path)


@pytest.mark.parametrize(("kind", "what"), [("imatrix", "an importance matrix"), ("adapter", "LoRA")])
def test_a_file_of_another_kind(tmp_path: Path, kind: str, what: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(encode_header({"general.type": GGUFValue(ValueType.STRING, kind)}, ()))
    with pytest.raises(GGUFError, match=f"other.gguf: .*{what}.*, not a model"):
        Engine(path)


def test_any_shard_of_a_split_model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_checkpoint(), tmp_path / "split.gguf", "Q8_0", split_max_size="1M")
    first, *_, last = sorted(tmp_path.glob("split-*.gguf"))
    with Engine(last, ONE_THREAD) as engine:
        assert engine.path == first
        assert engine.metadata("general.architecture") == "llama"
    last.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(GGUFError, match=r"1 of .* shards are missing"):
        Engine(first)


def test_a_corrupt_file_never_reaches_llama_cpp(story_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(story_path.read_bytes()[:-1000])
    with pytest.raises(GGUFError, match="truncated"):
        Engine(cut)


def test_closing_twice_and_using_a_closed_engine(story_path: Path) -> None:
    engine = Engine(story_path, ONE_THREAD)
    events = engine.generate(engine.tokenize(" on"), GREEDY)
    next(events)
    engine.close()
    engine.close()
    uses: list[Callable[[], object]] = [
        lambda: engine.tokenize("x"),
        lambda: engine.generate([1]),
        lambda: next(events),
        lambda: engine.cached_tokens,
        lambda: next(engine.compute_chunks([[1]], 0)),
        engine.forget,
    ]
    for use in uses:
        with pytest.raises(EngineError, match="has been closed"):
            use()


def test_devices_of_this_machine() -> None:
    devices = backends.devices()
    assert backends.DeviceType.CPU in {device.type for device in devices}
    assert all(device.name and device.backend and device.handle for device in devices)


def test_a_c_function_serves_as_a_flag() -> None:
    strlen = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(native.function_address(native.c_library().strlen))
    flag = ctypes.create_string_buffer(2)
    assert strlen(ctypes.addressof(flag)) == 0
    flag[0] = b"\x01"
    assert strlen(ctypes.addressof(flag)) == 1
