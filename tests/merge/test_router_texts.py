"""Files of texts: what is taken of them, which tokens count, what is held out, and each refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import RecipeError
from ggufmoe.merge import router_texts
from ggufmoe.merge.prompts import prompt_tokenizer
from ggufmoe.merge.router_texts import MAX_TEXT_TOKENS, RouterText, TextTokens, fitting_warnings, read_texts
from tests.tiny import make_checkpoint
from tests.tiny_tokenizers import CORPUS

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}[{{ message.role }}] {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("texts") / "model", arch="mistral", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[ModelSource]:
    with open_checkpoint(directory) as source:
        yield source


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def texts_of(model: ModelSource, *files: Path, n_tokens: int = 4000, seed: int = 0) -> tuple[RouterText, ...]:
    return read_texts([files], TextTokens.of(model), text_tokens=n_tokens, seed=seed)


def test_of_a_text_all_tokens_but_the_first_count(tmp_path: Path, directory: Path, model: ModelSource) -> None:
    file = write(tmp_path / "a.jsonl", *({"text": line} for line in CORPUS))
    texts = texts_of(model, file)
    tokenize = prompt_tokenizer(directory)
    assert {text.tokens for text in texts} == {tuple(tokenize(line)) for line in CORPUS}
    assert all(text.scored == tuple(range(1, len(text.tokens))) for text in texts)
    assert {(text.expert, text.file) for text in texts} == {(0, "a.jsonl")}


def test_of_a_conversation_the_answers_count(tmp_path: Path, directory: Path, model: ModelSource) -> None:
    messages = [
        {"role": "user", "content": "solve for x"},
        {"role": "assistant", "content": "subtract 42"},
        {"role": "user", "content": "and now"},
        {"role": "assistant", "content": "divide by 7"},
    ]
    other = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is wide"}]
    texts = texts_of(model, write(tmp_path / "a.jsonl", {"messages": messages}, {"messages": other}))
    text = max(texts, key=lambda one: len(one.tokens))
    whole = "[user] solve for x [assistant] subtract 42 [user] and now [assistant] divide by 7 "
    tokenize = prompt_tokenizer(directory)
    assert text.tokens == tuple(tokenize(whole))
    begin, end = len(tokenize("[user] solve for x [assistant]")), len(tokenize(whole.partition(" [user] and")[0]))
    assert begin in text.scored
    assert begin - 1 not in text.scored
    assert end - 1 in text.scored
    assert end + 2 not in text.scored
    assert text.scored[-1] == len(text.tokens) - 1


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, model: ModelSource) -> None:
    files = [tmp_path / folder / name for folder in ("x/old", "y/old", "y/new") for name in ("a.jsonl", "b.jsonl")]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, {"text": f"{i} {CORPUS[0]}"}, {"text": f"{i} {CORPUS[1]}"})
    assert {text.file for text in texts_of(model, files[0], files[1])} == {"a.jsonl", "b.jsonl"}
    assert {text.file for text in texts_of(model, files[0], files[4])} == {"old/a.jsonl", "new/a.jsonl"}
    assert {text.file for text in texts_of(model, files[0], files[2])} == {"x/old/a.jsonl", "y/old/a.jsonl"}


def test_a_long_line_is_cut_between_words() -> None:
    words = [f"{i}" for i in range(1000)]
    pieces = list(router_texts._pieces(f"a short one\n{' '.join(words)}\nthe end{'x' * 3000}\nlast"))
    written = [piece.text for piece in pieces]
    assert " ".join(written).split()[: 3 + 1000] == ["a", "short", "one", *words]
    assert sum(piece.count("x") for piece in written) == 3000
    assert len(written) > 10
    assert max(map(len, written)) < 1000
    assert [piece.line for piece in pieces] == [1, *[2] * 6, *[3] * 7, 4]


def test_plain_text_is_cut_into_pieces_of_whole_lines(tmp_path: Path, model: ModelSource) -> None:
    file = tmp_path / "plain.txt"
    file.write_text("\r\n".join(f"{i} {CORPUS[i % 5]}" for i in range(40)), encoding="utf-8")
    texts = texts_of(model, file, n_tokens=100_000)
    assert 5 <= len(texts) <= 10
    assert all(60 < len(text.tokens) <= MAX_TEXT_TOKENS for text in texts)


def test_an_experts_files_share_its_tokens(tmp_path: Path, model: ModelSource) -> None:
    files = [write(tmp_path / f"{n}.jsonl", *({"text": f"{i} {CORPUS[n]}"} for i in range(60))) for n in range(2)]
    texts = texts_of(model, *files, n_tokens=1000)
    for file in files:
        tokens = sum(len(text.tokens) for text in texts if text.file == file.name)
        assert 400 < tokens <= 500


def test_one_of_five_texts_is_held_out_and_of_two_the_second(tmp_path: Path, model: ModelSource) -> None:
    many = texts_of(model, write(tmp_path / "a.jsonl", *({"text": f"{CORPUS[0]} {i}"} for i in range(20))))
    assert [text.held_out for text in many] == ([False, True] + [False] * 3) * 4
    two = texts_of(model, write(tmp_path / "b.jsonl", {"text": CORPUS[0]}, {"text": CORPUS[1]}), n_tokens=8)
    assert sorted(text.held_out for text in two) == [False, True]


def test_a_text_that_is_there_twice_is_not_held_out_and_fitted(tmp_path: Path, model: ModelSource) -> None:
    texts = texts_of(model, write(tmp_path / "a.jsonl", *[{"text": CORPUS[0]}, {"text": CORPUS[1]}] * 4))
    assert len(texts) == 2


def test_the_seed_decides_which_texts_are_drawn(tmp_path: Path, model: ModelSource) -> None:
    file = write(tmp_path / "a.jsonl", *({"text": f"{CORPUS[i % 9]} {i}"} for i in range(50)))
    first, same, other = (texts_of(model, file, n_tokens=300, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert {text.tokens for text in first} != {text.tokens for text in other}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "the texts cannot be read (No such file"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8 text (byte 0)"),
        ("a.txt", b"GGUF....", "is a GGUF file, not a file of texts"),
        ("a.txt", b"one line", "one text, and at least two are needed: write more"),
        ("a.jsonl", b"", "no text, and at least two are needed"),
        ("a.json", b"{}", "one JSON object a line in a file named .jsonl"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"question": "x"}', "a.jsonl:1: expected an object with text or messages, found {"),
        ("a.jsonl", b"7", "a.jsonl:1: expected an object with text or messages, found 7"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1: messages must be a list of objects"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 7}]}', "a.jsonl:1: messages must be a list of objects"),
        ("a.jsonl", b'{"messages": [{"role": "tool", "content": "x"}]}', "a.jsonl:1: chat template: refuses"),
    ],
)
def test_what_is_no_file_of_texts_is_refused(
    tmp_path: Path, model: ModelSource, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        texts_of(model, tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "plain", arch="mistral", n_layer=1)
    talk = {"messages": [{"role": "user", "content": "x"}]}
    with open_checkpoint(directory) as model, pytest.raises(RecipeError, match="the model has no chat template"):
        texts_of(model, write(tmp_path / "a.jsonl", talk))


def test_experience_is_told_in_advance() -> None:
    assert list(fitting_warnings(True, (0.0, 0.004))) == []
    warnings = list(fitting_warnings(False, (0.0, 0.034)))
    assert warnings[0].startswith("the base is no expert")
    narrow, broad = ([RouterText(0, "a", (0, *(i % n for i in range(2000))), (), False)] for n in (12, 200))
    assert next(fitting_warnings(True, (), narrow)).startswith("the base's texts are narrow (spread over 12 tokens")
    assert list(fitting_warnings(True, (), broad)) == []
    assert warnings[1].startswith("expert 1: its attention differs from the base's by 3.4%")
