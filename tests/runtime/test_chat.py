"""Conversations with a model that always answers " hi there"."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe import (
    Chat,
    ContextFullError,
    ContextOptions,
    Engine,
    EngineError,
    InputError,
    OutputError,
    OutputExistsError,
    SamplingOptions,
    TemplateError,
)
from ggufmoe.runtime.events import ChatEvent, Event, Finished
from ggufmoe.runtime.messages import Message
from ggufmoe.templates.jinja_template import ChatTemplate
from tests.scripted import BOS, Scripted
from tests.stories import GREEDY, ONE_THREAD, STORY

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ ' ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
GREETER = Scripted(
    {"[assistant]": " hi", " hi": " there", "[dice]": {" one": 9.0, " two": 9.0, " three": 9.0}},
    pieces=["[user]", "[system]", " hello", " again"],
    chat_template=TEMPLATE,
)


@pytest.fixture(scope="module")
def greeter_path(write_model: Callable[[Scripted], Path]) -> Path:
    return write_model(GREETER)


@pytest.fixture(scope="module")
def engine(greeter_path: Path) -> Iterator[Engine]:
    with Engine(greeter_path, ONE_THREAD) as engine:
        yield engine


@pytest.fixture
def chat(engine: Engine) -> Chat:
    engine.forget()
    return Chat(engine, sampling=GREEDY)


def said(events: Iterator[ChatEvent]) -> str:
    return "".join(event.text for event in events)


def last_of(events: Iterator[ChatEvent]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


class _SetLater:
    """A flag that is set when it has been looked at several times."""

    n_looks = 0

    def is_set(self) -> bool:
        self.n_looks += 1
        return self.n_looks > 5


@pytest.mark.parametrize("overflow", ["error", "shift"])
def test_a_message_is_cancelled_while_it_is_tokenized(greeter_path: Path, overflow: Any) -> None:
    with Engine(greeter_path, replace(ONE_THREAD, overflow=overflow)) as engine:
        chat = Chat(engine, sampling=GREEDY)
        flag = _SetLater()
        last = last_of(chat.send("<s>" * (100_000 if overflow == "shift" else 500), cancel=flag))
        assert (last.text, last.reason, chat.messages) == ("", "cancelled", ())
        assert said(chat.send("hello")) == "hi there"


def test_a_message_that_cannot_fit_is_refused_before_it_is_tokenized(chat: Chat) -> None:
    with pytest.raises(ContextFullError, match="the text has at least"):
        chat.send("hello" * 200_000)
    assert len(chat.prompt([Message("user", "hello" * 20_000)])) > 512  # counting is no reason to refuse
    assert said(chat.send("hello")) == "hi there"


def test_an_answer_and_the_history(chat: Chat) -> None:
    assert said(chat.send("hello")) == "hi there"
    assert chat.messages == (Message("user", "hello"), Message("assistant", "hi there"))


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("add_bos", [True, False])
def test_there_is_one_bos_or_none(write_model: Callable[[Scripted], Path], template: str, add_bos: bool) -> None:
    spec = replace(GREETER, chat_template=template, add_bos=add_bos)
    with Engine(write_model(spec), ONE_THREAD) as engine:
        tokens = Chat(engine).prompt([Message("user", "hello")])
    begins = add_bos or "bos_token" in template
    assert tokens == [BOS] * begins + spec.ids("[user]", " hello", "[assistant]")


def test_the_second_turn_computes_only_what_is_new(chat: Chat) -> None:
    list(chat.send("hello"))
    last = last_of(chat.send("again"))
    # <s>[user] hello[assistant] hi there, then [user] again[assistant]
    assert last.timing.cached_tokens == 6
    assert last.timing.prompt_tokens == 9
    assert len(chat.messages) == 4


@pytest.mark.parametrize("template", [TEMPLATE, NO_SYSTEM])
def test_the_system_message_reaches_the_model(engine: Engine, template: str) -> None:
    chat = Chat(engine, system="be kind", template=ChatTemplate(template, bos="<s>"), sampling=GREEDY)
    text = engine.detokenize(chat.prompt([Message("user", "hello")])).decode().replace("▁", " ")
    assert text == ("[system] be kind[user] hello[assistant]" if template == TEMPLATE else
                    "[user] be kind\n\nhello[assistant]")  # fmt: skip


def test_a_template_that_leaves_the_message_out_can_shift(write_model: Callable[[Scripted], Path]) -> None:
    spec = replace(STORY, chat_template="{{ bos_token }} once")
    with Engine(write_model(spec), replace(ONE_THREAD, overflow="shift")) as engine:
        chat = Chat(engine, sampling=GREEDY)
        assert [said(chat.send(text)) for text in ("a", "b")] == ["upon a time"] * 2


def test_a_file_with_templates_for_some_uses_names_them(write_model: Callable[[Scripted], Path]) -> None:
    spec = replace(STORY, metadata={f"tokenizer.chat_template.{name}": "x" for name in ("tool_use", "rag")})
    with Engine(write_model(spec), ONE_THREAD) as engine:
        with pytest.raises(TemplateError, match=r"for some uses only \(rag, tool_use\): name one with --chat-template"):
            Chat(engine)
        assert Chat(engine, template="rag").template.source == "x"


def test_the_end_of_a_turn_that_is_no_token_is_watched_for_as_text(
    write_model: Callable[[Scripted], Path], caplog: pytest.LogCaptureFixture
) -> None:
    spec = Scripted(
        {"[assistant]": " hi", " hi": "<|im_", "<|im_": "end|>", "end|>": " more", " more": " more"},
        pieces=["<", "|"],
        chat_template="[assistant]{# <|im_end|> #}",
    )
    with Engine(write_model(spec), ONE_THREAD) as engine:
        sampling = replace(GREEDY, n_predict=8)
        assert said(Chat(engine, sampling=sampling).send("")) == "hi<|im_end|> more more more more more"
        assert caplog.text == ""
        chat = Chat(engine, sampling=sampling, template="chatml")
        assert chat.template.stop == ("<|im_end|>",)
        assert "chatml writes <|im_start|>, <|im_end|>, which the model does not have as tokens" in caplog.text
    file = replace(spec, chat_template="{{ messages[0].content }}[assistant]{% if false %}<|im_end|>{% endif %}")
    with Engine(write_model(file), ONE_THREAD) as engine:
        assert said(Chat(engine, sampling=replace(GREEDY, n_predict=8)).send("")) == "hi"


def test_a_template_gets_the_models_special_tokens(write_model: Callable[[Scripted], Path]) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"
    for metadata, text in (
        ({}, "<s>|</s>|<unk>|"),
        ({"tokenizer.ggml.padding_token_id": np.uint32(2)}, "<s>|</s>|<unk>|</s>"),
    ):
        with Engine(write_model(replace(STORY, chat_template=source, metadata=metadata)), ONE_THREAD) as engine:
            assert Chat(engine).template.render([]) == text
    odd = {f"tokenizer.ggml.{role}_token_id": np.uint32(10**6) for role in ("unknown", "padding")}
    with Engine(write_model(replace(STORY, chat_template=source, metadata=odd)), ONE_THREAD) as engine:
        assert Chat(engine).template.render([]) == "<s>|</s>||"


def test_reset_keeps_the_system_message(engine: Engine) -> None:
    chat = Chat(engine, system="be kind", sampling=GREEDY)
    list(chat.send("hello"))
    chat.reset()
    assert (chat.messages, chat.system) == ((), "be kind")


def test_an_answer_cut_short_is_kept(chat: Chat) -> None:
    events = chat.send("hello")
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert chat.messages == (Message("user", "hello"), Message("assistant", "hi"))
    assert said(chat.send("again")) == "hi there"


def test_a_turn_that_failed_is_left_out(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    list(chat.send("hello"))
    before = chat.messages
    generate = Engine.generate

    def fail_after_one(*arguments: Any, **keywords: Any) -> Iterator[Event]:
        yield next(generate(*arguments, **keywords))
        raise EngineError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", fail_after_one)
        with pytest.raises(EngineError, match="lost"):
            list(chat.send("again"))
    assert chat.messages == before


def test_an_answer_that_ctrl_c_interrupts_is_kept(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Engine.generate

    def press_after_one(*arguments: Any, **keywords: Any) -> Iterator[Event]:
        yield next(generate(*arguments, **keywords))
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", press_after_one)
    with pytest.raises(KeyboardInterrupt):
        list(chat.send("hello"))
    assert chat.messages == (Message("user", "hello"), Message("assistant", "hi"))


@pytest.mark.parametrize("change", ["another turn", "reset"])
def test_a_turn_that_ends_late_changes_nothing(chat: Chat, change: str) -> None:
    late = chat.send("hello")
    next(late)
    list(chat.send("again")) if change == "another turn" else chat.reset()
    now = chat.messages
    late.close()  # type: ignore[attr-defined]
    assert chat.messages is now


def test_a_turn_without_an_answer_is_left_out(chat: Chat) -> None:
    flag = threading.Event()
    flag.set()
    assert last_of(chat.send("hello", cancel=flag)).reason == "cancelled"
    assert chat.messages == ()


def test_stop_strings_of_the_caller_and_of_the_template(engine: Engine) -> None:
    chat = Chat(engine, template=ChatTemplate(TEMPLATE, stop=["ere"]), sampling=GREEDY)
    assert said(chat.send("hello")) == "hi th"
    assert said(chat.send("hello", stop=["i"])) == "h"
    chat.reset()
    assert said(chat.send("hello", stop="i")) == "h"


def test_regenerate_answers_the_same_question_with_another_seed(engine: Engine) -> None:
    template = ChatTemplate(TEMPLATE.replace("%}[assistant]", "%}[dice]"), bos="<s>")
    chat = Chat(engine, template=template, sampling=SamplingOptions(seed=5, temperature=1.0))
    seeds = [last_of(chat.send("hello")).seed]
    answers = {chat.messages[-1].content}
    for _ in range(12):
        seeds.append(last_of(chat.regenerate()).seed)
        answers.add(chat.messages[-1].content)
    assert seeds == list(range(5, 18))
    assert len(answers) > 1
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    list(chat.send("again"))
    assert last_of(chat.regenerate()).seed == 6
    assert len(chat.messages) == 4


def test_regenerate_without_a_question(chat: Chat) -> None:
    with pytest.raises(InputError, match="no answer yet"):
        chat.regenerate()


def test_a_conversation_that_no_longer_fits(greeter_path: Path) -> None:
    with Engine(greeter_path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        chat = Chat(engine, sampling=GREEDY)
        list(chat.send("hello"))
        with pytest.raises(ContextFullError, match="--ctx-size"):
            chat.send(" hello" * 300)
        assert len(chat.messages) == 2
        assert said(chat.send("again")) == "hi there"


# ---- templates


def test_a_model_without_a_template(write_model: Callable[[Scripted], Path]) -> None:
    path = write_model(replace(GREETER, chat_template=None))
    with Engine(path, ONE_THREAD) as engine:
        with pytest.raises(TemplateError, match=r"has no chat template: .*--chat-template NAME\|FILE.*--raw"):
            Chat(engine)
        assert said(Chat(engine, template="chatml", sampling=replace(GREEDY, n_predict=1)).send("x")) == ""


def test_a_models_template_that_attacks(write_model: Callable[[Scripted], Path]) -> None:
    loop = "{% for a in range(99999) %}{{ 'a' * 100000000 }}{% endfor %}"
    with (
        Engine(write_model(replace(GREETER, chat_template=loop)), ONE_THREAD) as engine,
        pytest.raises(TemplateError, match="does more than a chat needs"),
    ):
        Chat(engine).send("hello")


# ---- saving and loading


def test_save_and_load(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    chat = Chat(engine, system="sei lieb", sampling=GREEDY)
    chat.save(path)
    list(chat.send("hello"))
    chat.save(path)
    other = Chat(engine)
    other.load(path)
    assert (other.system, other.messages) == (chat.system, chat.messages)
    assert json.loads(path.read_text(encoding="utf-8"))["model"] == "scripted.gguf"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_spares_what_is_no_conversation(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00 and weights \xff")
    with pytest.raises(OutputExistsError, match="holds something else than a conversation"):
        chat.save(path)
    assert path.read_bytes().startswith(b"GGUF")


def test_save_where_it_cannot_be(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "talk.json").mkdir()
    for path in (tmp_path / "no" / "talk.json", tmp_path / "talk.json"):
        with pytest.raises(OutputError, match="the conversation cannot be written"):
            chat.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_half_a_surrogate_pair_does_not_cost_the_conversation(chat: Chat, tmp_path: Path) -> None:
    list(chat.send("hello \ud83d"))
    chat.save(tmp_path / "talk.json")
    chat.load(tmp_path / "talk.json")
    assert chat.messages[0].content == "hello ?"


GOOD: dict[str, Any] = {"format": "ggufmoe-chat", "version": 1, "system": None, "messages": []}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a conversation"),
        (json.dumps(GOOD | {"version": 2}), "not a conversation that this version saved"),
        (json.dumps(GOOD | {"messages": None}), "messages are missing"),
        (json.dumps(GOOD | {"system": 3}), "messages are missing"),
        (json.dumps(GOOD | {"messages": [{"role": "user"}]}), "a role and a content"),
        (json.dumps(GOOD | {"messages": [{"role": "system", "content": "x"}]}), "a role and a content"),
        (json.dumps(GOOD | {"messages": ["x"]}), "a role and a content"),
    ],
)
def test_files_that_are_no_saved_conversation(chat: Chat, tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    list(chat.send("hello"))
    with pytest.raises(InputError, match=why):
        chat.load(path)
    assert len(chat.messages) == 2


def test_a_missing_file(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        chat.load(tmp_path / "no.json")


def test_a_file_that_is_far_too_large(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="too large"):
        chat.load(path)
