"""Tokens of a merged model: which tokenizer it has, where its rows come from, and which chat template fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.chat_template import default_chat_template
from ggufmoe.errors import RecipeError
from ggufmoe.gguf.header import read_header
from ggufmoe.merge.merged import MergedModel, open_recipe
from ggufmoe.weights.dtypes import read_f32
from tests.export.vocab_files import added_token
from tests.merge.test_merged import write_recipe
from tests.tiny import make_checkpoint
from tests.tiny_tokenizers import N_PIECES

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def make_model(directory: Path, *added: str, first: int = N_PIECES, eos: str | None = None, **fields: Any) -> Path:
    """A dense model whose tokenizer has ``added`` from id ``first`` on; one of them may be its ``eos``."""
    fields = {"arch": "mistral", "n_layer": 1, "n_vocab": max(N_PIECES, first + len(added))} | fields
    if eos is not None:
        fields["config"] = {"eos_token_id": first + added.index(eos)}
    make_checkpoint(directory, **fields)
    settings = directory / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    tokens = [added_token(first + i, text, special=True) for i, text in enumerate(added)]
    content["added_tokens_decoder"] = {str(token["id"]): token for token in tokens}
    content["eos_token"] = eos or content["eos_token"]
    settings.write_text(json.dumps(content))
    if (directory / "tokenizer.json").exists():
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        tokenizer["added_tokens"] += tokens
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture
def merged(tmp_path: Path) -> Iterator[Callable[..., MergedModel]]:
    """``merged(*sources, **fields of the recipe)``: a merge of models in ``tmp_path``, closed after the test."""
    opened: list[MergedModel] = []

    def merge(*sources: str, **fields: Any) -> MergedModel:
        opened.append(open_recipe(write_recipe(tmp_path, *sources, **fields)))
        return opened[-1]

    yield merge
    for model in opened:
        model.close()


def rows(directory: Path, name: str = EMBEDDING) -> NDArray[np.float32]:
    with open_checkpoint(directory) as model:
        return read_f32(model.tensors[name])


def test_an_experts_tokens_are_told_whatever_its_editor_put_before_them(
    tmp_path: Path, merged: Callable[..., MergedModel]
) -> None:
    make_model(tmp_path / "base")
    settings = make_model(tmp_path / "chatty", "<|im_end|>", seed=2) / "tokenizer_config.json"
    settings.write_text(settings.read_text("utf-8"), encoding="utf-8-sig")
    told = merged("base", "chatty").warnings
    assert any("knows tokens that the base does not (<|im_end|>)" in warning for warning in told)


def test_ends_that_are_no_ids_end_nothing(tmp_path: Path, merged: Callable[..., MergedModel]) -> None:
    make_model(tmp_path / "base")
    expert = make_model(tmp_path / "chatty", "<|im_end|>", seed=2)
    (expert / "generation_config.json").write_text('{"eos_token_id": [[1], {"a": 2}, "3", 4]}')
    union = merged("base", "chatty", tokenizer_source="union")
    assert 4 in union.config.raw["eos_token_id"]


def test_the_base_keeps_its_own_tokens(tmp_path: Path, merged: Callable[..., MergedModel]) -> None:
    base = make_model(tmp_path / "base")
    make_model(tmp_path / "chatty", "<|im_end|>", seed=2)
    model = merged("base", "chatty")
    assert model.config.n_vocab == N_PIECES
    assert model.tokenizer_dir == base.resolve()
    np.testing.assert_array_equal(read_f32(model.tensors[EMBEDDING]), rows(base))
    assert any("knows tokens that the base does not (<|im_end|>)" in warning for warning in model.warnings)


@pytest.mark.parametrize("kind", ["spm", "json"])
@pytest.mark.parametrize("choice", ["expert:1", "union"])
def test_an_experts_tokens_come_with_their_rows(
    tmp_path: Path, merged: Callable[..., MergedModel], choice: str, kind: str
) -> None:
    base = make_model(tmp_path / "base", tokenizer=kind)
    expert = make_model(
        tmp_path / "chatty",
        "<|im_end|>",
        "<|im_start|>",
        eos="<|im_end|>",
        seed=2,
        tokenizer=kind,
        chat_template=CHATML,
    )
    model = merged("base", "chatty", tokenizer_source=choice)
    assert (model.config.n_vocab, model.config.raw["vocab_size"]) == (N_PIECES + 2, N_PIECES + 2)
    for name in (EMBEDDING, OUTPUT):
        found = read_f32(model.tensors[name])
        np.testing.assert_array_equal(found[:N_PIECES], rows(base, name))
        np.testing.assert_array_equal(found[N_PIECES:], rows(expert, name)[N_PIECES:])
    assert not any("tokenizer is kept" in warning or "vocabulary rows" in warning for warning in model.warnings)
    template = model.chat_template or default_chat_template(model.tokenizer_dir)
    assert template == CHATML


def test_a_union_takes_the_mean_of_what_several_experts_know(
    tmp_path: Path, merged: Callable[..., MergedModel]
) -> None:
    base = make_model(tmp_path / "base", "<|base|>", chat_template=PLAIN)
    one = make_model(tmp_path / "one", "<|base|>", "<|im_end|>", seed=2, eos="<|im_end|>")
    two = make_model(tmp_path / "two", "<|im_end|>", "<|tool|>", seed=3, eos="<|im_end|>")
    model = merged("base", "one", "two", tokenizer_source="union")
    found, ours = read_f32(model.tensors[EMBEDDING]), rows(base)
    np.testing.assert_array_equal(found[: N_PIECES + 1], ours)
    mean = (rows(one)[N_PIECES + 1] + rows(two)[N_PIECES]) / 2
    np.testing.assert_allclose(found[N_PIECES + 1], mean, rtol=2**-8)
    np.testing.assert_array_equal(found[N_PIECES + 2], rows(two)[N_PIECES + 1])
    assert len(found) == N_PIECES + 3
    assert model.config.raw["eos_token_id"] == [2, N_PIECES + 1]
    decoder = json.loads((model.tokenizer_dir / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token: entry["content"] for token, entry in decoder.items()} == {
        "400": "<|base|>",
        "401": "<|im_end|>",
        "402": "<|tool|>",
    }
    assert decoder["401"]["special"] is True


def test_a_union_uses_rows_that_the_base_has_spare(tmp_path: Path, merged: Callable[..., MergedModel]) -> None:
    base = make_model(tmp_path / "base", n_vocab=N_PIECES + 8, chat_template=PLAIN)
    expert = make_model(tmp_path / "chatty", "<|im_end|>", seed=2)
    model = merged("base", "chatty", tokenizer_source="union")
    found = read_f32(model.tensors[EMBEDDING])
    assert len(found) == model.config.n_vocab == N_PIECES + 8
    np.testing.assert_array_equal(found[N_PIECES], rows(expert)[N_PIECES])
    np.testing.assert_array_equal(found[N_PIECES + 1 :], rows(base)[N_PIECES + 1 :])


def test_an_experts_tokenizer_leaves_out_what_only_the_base_knows(
    tmp_path: Path, merged: Callable[..., MergedModel]
) -> None:
    make_model(tmp_path / "base", "<|base|>", "<|both|>", chat_template=PLAIN)
    expert = make_model(tmp_path / "chatty", "<|both|>", "<|new|>", seed=2)
    model = merged("base", "chatty", tokenizer_source="expert:1")
    found = read_f32(model.tensors[EMBEDDING])
    np.testing.assert_array_equal(found[N_PIECES], rows(tmp_path / "base")[N_PIECES + 1])
    np.testing.assert_array_equal(found[N_PIECES + 1], rows(expert)[N_PIECES + 1])


def test_tied_and_separate_outputs_may_meet(tmp_path: Path, merged: Callable[..., MergedModel]) -> None:
    make_model(tmp_path / "base", chat_template=PLAIN)
    tied = make_model(tmp_path / "tied", "<|im_end|>", seed=2, tie=True)
    model = merged("base", "tied", tokenizer_source="union")
    np.testing.assert_array_equal(read_f32(model.tensors[OUTPUT])[N_PIECES], rows(tied)[N_PIECES])


def test_rows_may_be_read_in_any_pieces(tmp_path: Path, merged: Callable[..., MergedModel]) -> None:
    make_model(tmp_path / "base", n_vocab=N_PIECES + 8, chat_template=PLAIN)
    for seed, name in ((2, "one"), (3, "two")):
        make_model(tmp_path / name, "<|im_end|>", "<|tool|>", seed=seed)
    tensor = merged("base", "one", "two", tokenizer_source="union").tensors[EMBEDDING]
    whole = read_f32(tensor)
    for start, stop in ((0, 1), (399, 403), (400, 401), (401, 408), (5, 5)):
        np.testing.assert_array_equal(read_f32(tensor, start, stop), whole[start:stop])


@pytest.mark.parametrize("choice", ["expert:1", "union"])
def test_both_roads_give_the_same_file_and_it_ends_its_turn(tmp_path: Path, choice: str) -> None:
    make_model(tmp_path / "base", tokenizer="json")
    make_model(
        tmp_path / "chatty", "<|im_end|>", "<|user_end|>", eos="<|user_end|>", seed=2, tokenizer="json",
        chat_template=CHATML.replace("<|im_start|>", "<|im_end|>"),
    )  # fmt: skip
    recipe = write_recipe(tmp_path, "base", "chatty", tokenizer_source=choice)
    ggufmoe.convert(recipe, tmp_path / "straight.gguf", "Q8_0")
    ggufmoe.merge(recipe, tmp_path / "merged")
    ggufmoe.convert(tmp_path / "merged", tmp_path / "around.gguf", "Q8_0")
    assert (tmp_path / "straight.gguf").read_bytes() == (tmp_path / "around.gguf").read_bytes()
    header = read_header(tmp_path / "straight.gguf")
    ends = {header.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")}
    assert N_PIECES + 1 in ends


def test_the_tokenizers_library_gives_the_ids_of_a_union(tmp_path: Path, merged: Callable[..., MergedModel]) -> None:
    from tokenizers import Tokenizer

    make_model(tmp_path / "base", "<|base|>", tokenizer="json", chat_template=PLAIN)
    make_model(tmp_path / "chatty", "<|im_end|>", "<|im_start|>", seed=2, tokenizer="json")
    model = merged("base", "chatty", tokenizer_source="union")
    tokenizer = Tokenizer.from_file(str(model.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.encode("<|base|><|im_end|><|im_start|>", add_special_tokens=False).ids == [400, 401, 402]


def test_the_files_of_a_union_are_gone_when_it_is_closed(tmp_path: Path) -> None:
    make_model(tmp_path / "base", chat_template=PLAIN)
    make_model(tmp_path / "chatty", "<|im_end|>", seed=2)
    model = open_recipe(write_recipe(tmp_path, "base", "chatty", tokenizer_source="union"))
    assert model.tokenizer_dir.is_dir()
    model.close()
    assert not model.tokenizer_dir.exists()


def test_a_template_whose_tokens_the_base_lacks_is_not_taken(
    tmp_path: Path, merged: Callable[..., MergedModel], caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path / "base")
    make_model(tmp_path / "chatty", "<|im_end|>", "<|im_start|>", seed=2, eos="<|im_end|>", chat_template=CHATML)
    make_model(tmp_path / "other", "<|stop|>", seed=3, eos="<|stop|>", chat_template=PLAIN)
    with pytest.raises(RecipeError) as caught:
        merged("base", "chatty", "other")
    assert "that of expert 1 writes <|im_end|>, <|im_start|>; that of expert 2 writes <|stop|>" in str(caught.value)
    assert "tokenizer_source: union (or expert:1)" in str(caught.value)
    assert merged("base", "chatty", chat_template="base").chat_template is None
    assert merged("base", "chatty", chat_template="expert:1").chat_template == CHATML
    make_model(tmp_path / "fits", seed=4, chat_template=PLAIN)
    assert merged("base", "chatty", "fits").chat_template == PLAIN
    assert "the base model has no chat template; using that of expert 2" in caplog.text


def test_a_template_may_write_what_its_own_tokenizer_reads_in_pieces(
    tmp_path: Path, merged: Callable[..., MergedModel]
) -> None:
    """As Zephyr's does with <|user|>: it was trained on the pieces."""
    zephyr = "{% for m in messages %}<|{{ m.role }}|><|assistant|>{{ m.content }}{{ eos_token }}{% endfor %}"
    make_model(tmp_path / "base")
    make_model(tmp_path / "zephyr", seed=2, chat_template=zephyr)
    assert merged("base", "zephyr").chat_template == zephyr
