"""The keys, types and values of ``tokenizer.*``, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.export.vocab import tokenizer_metadata
from ggufmoe.export.vocab.bytelevel import byte_alphabet
from ggufmoe.export.vocab.spm_model import parse
from ggufmoe.export.vocab.token_rows import TokenType
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import ValueType
from tests.export.vocab_files import added_token, config, edit_json, write_tokenizer
from tests.tiny_tokenizers import N_BYTE_LEVEL, N_PIECES, sentencepiece_model

PREFIX = "tokenizer.ggml."


def plain(metadata: dict[str, GGUFValue]) -> dict[str, Any]:
    """Values without their types, and without the long arrays."""
    return {key.removeprefix(PREFIX): value.value for key, value in metadata.items() if value.item_type is None}


def test_sentencepiece_keys_in_the_converters_order(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(write_tokenizer(tmp_path, "spm"), config(N_PIECES, bos_token_id=1, eos_token_id=2))
    assert {key.removeprefix(PREFIX): value.type for key, value in metadata.items()} == {
        "model": ValueType.STRING,
        "pre": ValueType.STRING,
        "tokens": ValueType.ARRAY,
        "scores": ValueType.ARRAY,
        "token_type": ValueType.ARRAY,
        "bos_token_id": ValueType.UINT32,
        "eos_token_id": ValueType.UINT32,
        "add_bos_token": ValueType.BOOL,
        "add_eos_token": ValueType.BOOL,
    }
    assert list(metadata)[:5] == [PREFIX + key for key in ("model", "pre", "tokens", "scores", "token_type")]
    items = [metadata[PREFIX + key].item_type for key in ("tokens", "scores", "token_type")]
    assert items == [ValueType.STRING, ValueType.FLOAT32, ValueType.INT32]
    assert plain(metadata)["model"] == "llama"


def test_our_reader_agrees_with_sentencepiece() -> None:
    import sentencepiece

    model = parse(sentencepiece_model(), Path("tokenizer.model"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert [piece.text for piece in model.pieces] == [processor.id_to_piece(i) for i in range(N_PIECES)]
    assert [piece.score for piece in model.pieces] == [processor.get_score(i) for i in range(N_PIECES)]
    kinds = {TokenType.CONTROL: processor.is_control, TokenType.UNKNOWN: processor.is_unknown}
    kinds[TokenType.BYTE] = processor.is_byte
    for i, piece in enumerate(model.pieces):
        assert all(has(i) == (piece.type is kind) for kind, has in kinds.items())


def test_scores_are_the_ranks_of_the_merges(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "json")
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    scores = tokenizer_metadata(directory, config(N_PIECES))[PREFIX + "scores"].value
    first = {left + right: rank for rank, (left, right) in reversed(list(enumerate(model["merges"])))}
    assert {token: scores[model["vocab"][token]] for token in first} == {t: -rank - 1 for t, rank in first.items()}
    unmerged = [scores[i] for token, i in model["vocab"].items() if token not in first and i > 2]
    assert max(unmerged) < -len(model["merges"])


def test_merges_as_strings_or_pairs_are_the_same(tmp_path: Path) -> None:
    pairs = write_tokenizer(tmp_path / "pairs", "bpe")
    strings = write_tokenizer(tmp_path / "strings", "bpe")

    def as_strings(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]

    edit_json(strings, as_strings)
    assert tokenizer_metadata(pairs, config(N_BYTE_LEVEL)) == tokenizer_metadata(strings, config(N_BYTE_LEVEL))


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    for kind, n_tokens in (("spm", N_PIECES), ("json", N_PIECES), ("bpe", N_BYTE_LEVEL)):
        metadata = tokenizer_metadata(write_tokenizer(tmp_path / kind, kind), config(n_tokens + 3))
        assert metadata[PREFIX + "tokens"].value[n_tokens:] == [f"[PAD{n_tokens + i}]" for i in range(3)]
        assert metadata[PREFIX + "token_type"].value[n_tokens:] == [TokenType.UNUSED] * 3
        if kind != "bpe":
            assert metadata[PREFIX + "scores"].value[n_tokens:] == [-10000.0] * 3


def test_tokens_added_to_a_sentencepiece_model(tmp_path: Path) -> None:
    """From all three files that may name them; the newest format names them in tokenizer.json alone."""
    named = {
        "400": added_token(400, "<|im_start|>", special=False),
        "401": added_token(401, "tool▁call", special=False),
    }
    directory = write_tokenizer(
        tmp_path,
        "spm",
        added_tokens_json={"[FILE]": 402},
        tokenizer_config_json={"added_tokens_decoder": named},
        tokenizer_json={
            "added_tokens": [added_token(403, "</think>", special=False), added_token(1, "<s>", special=True)]
        },
    )
    metadata = tokenizer_metadata(directory, config(405, eos_token_id=400))
    assert metadata[PREFIX + "tokens"].value[400:] == ["<|im_start|>", "tool call", "[FILE]", "</think>", "[PAD404]"]
    user_defined = [TokenType.USER_DEFINED] * 3
    assert metadata[PREFIX + "token_type"].value[400:] == [TokenType.CONTROL, *user_defined, TokenType.UNUSED]
    assert metadata[PREFIX + "scores"].value[400:] == [-1000.0] * 4 + [-10000.0]
    assert plain(metadata)["eos_token_id"] == 400


@pytest.mark.parametrize("kind", ["spm", "json", "bpe", "smollm"])
def test_an_added_token_past_the_embedding_is_left_out_aloud(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    n_vocab = N_PIECES if kind in ("spm", "json") else N_BYTE_LEVEL
    plain = tokenizer_metadata(write_tokenizer(tmp_path / "plain", kind), config(n_vocab))
    pad = added_token(n_vocab, "[PAD]", special=True)

    def adding(settings: dict[str, Any]) -> None:
        settings |= {"pad_token": "[PAD]", "added_tokens_decoder": {str(n_vocab): pad}}

    directory = edit_json(write_tokenizer(tmp_path / "padded", kind), adding, "tokenizer_config.json")
    if kind != "spm":
        edit_json(directory, lambda tokenizer: tokenizer["added_tokens"].append(pad))
    else:
        (directory / "added_tokens.json").write_text(json.dumps({"[PAD]": n_vocab, "<|im_end|>": n_vocab + 7}))
    assert tokenizer_metadata(directory, config(n_vocab)) == plain
    assert caplog.text.count("token '[PAD]' has id") == 1
    assert f"has id {n_vocab}, past the {n_vocab} rows of the embedding; it is left out" in caplog.text
    padded = tokenizer_metadata(directory, config(n_vocab + 1))
    assert padded[PREFIX + "tokens"].value[-1] == "[PAD]"


@pytest.mark.parametrize("stated", [(0, 3), (3, 9), (1,), (0, 1, 5)])
def test_gaps_between_added_tokens_are_closed_as_hugging_face_closes_them(
    tmp_path: Path, stated: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    from tokenizers import Tokenizer

    for kind, first in (("json", N_PIECES), ("bpe", N_BYTE_LEVEL), ("smollm", N_BYTE_LEVEL)):
        tokens = [added_token(first + number, f"<|{number}|>", special=True) for number in stated]
        directory = write_tokenizer(tmp_path / kind, kind, tokenizer_config_json={"eos_token": f"<|{stated[-1]}|>"})
        edit_json(directory, lambda tokenizer, tokens=tokens: tokenizer["added_tokens"].extend(tokens))  # type: ignore[misc]
        caplog.clear()
        metadata = tokenizer_metadata(directory, config(first + 20))
        theirs = Tokenizer.from_file(str(directory / "tokenizer.json"))
        found = [metadata[PREFIX + "tokens"].value.index(token["content"]) for token in tokens]
        assert found == [theirs.token_to_id(token["content"]) for token in tokens]
        assert found == list(range(first, first + len(stated)))
        assert plain(metadata)["eos_token_id"] == found[-1]
        assert f"'<|{stated[-1]}|>' is {found[-1]}, not {first + stated[-1]}" in caplog.text


@pytest.mark.parametrize("kind", ["json", "bpe", "smollm"])
def test_an_added_token_of_the_vocabulary_keeps_its_first_id(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    from tokenizers import Tokenizer

    first = N_PIECES if kind == "json" else N_BYTE_LEVEL
    directory = write_tokenizer(tmp_path, kind)
    vocabulary = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    known = max(vocabulary, key=vocabulary.__getitem__)
    tokens = [added_token(first, known, special=True), added_token(first + 1, "<|new|>", special=True)]
    edit_json(directory, lambda tokenizer: tokenizer["added_tokens"].extend(tokens))
    texts = tokenizer_metadata(directory, config(first + 20))[PREFIX + "tokens"].value
    theirs = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (known, "<|new|>"):
        assert texts.index(text) == theirs.token_to_id(text)
    assert f"are second ones; the first count, as Hugging Face's tokenizers library does: {known!r} is" in caplog.text


def test_gaps_are_closed_beside_a_sentencepiece_model_too(tmp_path: Path) -> None:
    named = {str(400 + number): added_token(400 + number, f"<|{number}|>", special=True) for number in (0, 4)}
    directory = write_tokenizer(tmp_path, "spm", tokenizer_config_json={"added_tokens_decoder": named})
    metadata = tokenizer_metadata(directory, config(410))
    assert metadata[PREFIX + "tokens"].value[400:403] == ["<|0|>", "<|4|>", "[PAD402]"]


def test_what_the_configuration_says_of_the_space_prefix_is_kept(tmp_path: Path) -> None:
    for stated in (True, False):
        directory = write_tokenizer(tmp_path / str(stated), "spm", tokenizer_config_json={"add_prefix_space": stated})
        metadata = tokenizer_metadata(directory, config(N_PIECES))
        assert next(iter(metadata)) == PREFIX + "add_space_prefix"
        assert metadata[PREFIX + "add_space_prefix"] == GGUFValue(ValueType.BOOL, stated)


def special(metadata: dict[str, GGUFValue]) -> dict[str, Any]:
    """Only the ids and switches of special tokens."""
    return {key: value for key, value in plain(metadata).items() if key not in ("model", "pre", "add_space_prefix")}


def test_special_tokens_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "bpe")
    metadata = tokenizer_metadata(directory, config(N_BYTE_LEVEL, pad_token_id=7, eos_token_id=[1, 2]))
    end = {"eos_token_id": 382, "eot_token_id": 1, "eom_token_id": 2, "padding_token_id": 7, "add_bos_token": True}
    assert special(metadata) == {"bos_token_id": 381} | end


def begin_and_end(begin: str, end: str) -> dict[str, Any]:
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (begin, end))
    return {"type": "TemplateProcessing", "single": [first, a, last], "pair": [first, a, last, b, last]}


def test_a_template_with_another_end_makes_the_eos_an_end_of_turn(tmp_path: Path) -> None:
    steps = [{"type": "ByteLevel"}, begin_and_end("<|begin_of_text|>", "<|eot_id|>")]
    post = {"type": "Sequence", "processors": steps}
    directory = edit_json(write_tokenizer(tmp_path, "bpe"), lambda t: t.update(post_processor=post))
    found = special(tokenizer_metadata(directory, config(N_BYTE_LEVEL)))
    assert (found["eos_token_id"], found["eot_token_id"]) == (383, 382)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, True)


def test_a_separator_between_two_texts_is_told(tmp_path: Path) -> None:
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}}
    post = {"type": "TemplateProcessing", "single": [a], "pair": [a, end, end, b]}
    directory = edit_json(write_tokenizer(tmp_path, "bpe"), lambda t: t.update(post_processor=post))
    found = special(tokenizer_metadata(directory, config(N_BYTE_LEVEL)))
    assert found["add_sep_token"] is True
    assert found["seperator_token_id"] == 382
    assert found["add_bos_token"] is False


def test_a_bos_written_as_an_object_is_known_by_its_content(tmp_path: Path) -> None:
    roles = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": {"content": "<|eot_id|>"}, "unk_token": None}
    directory = write_tokenizer(tmp_path, "bpe", tokenizer_config_json=roles)
    found = special(tokenizer_metadata(directory, config(N_BYTE_LEVEL)))
    assert (found["bos_token_id"], found["eos_token_id"], found["add_bos_token"]) == (381, 383, True)


def test_bos_and_eos_are_found_elsewhere_if_the_usual_places_are_silent(tmp_path: Path) -> None:
    spm = write_tokenizer(tmp_path / "spm", "spm", tokenizer_config_json={})
    assert special(tokenizer_metadata(spm, config(N_PIECES))) == {"bos_token_id": 1, "eos_token_id": 2}
    named = write_tokenizer(
        tmp_path / "map", "bpe", tokenizer_config_json={}, special_tokens_map_json={"eos_token": "<|eot_id|>"}
    )
    assert special(tokenizer_metadata(named, config(N_BYTE_LEVEL)))["eos_token_id"] == 383
    generation = write_tokenizer(
        tmp_path / "generation", "bpe", tokenizer_config_json={}, generation_config_json={"eos_token_id": [383, 382]}
    )
    assert special(tokenizer_metadata(generation, config(N_BYTE_LEVEL, bos_token_id=381)))["eos_token_id"] == 383


@pytest.mark.parametrize(
    ("model", "generation", "named", "further"),
    [
        (2, None, {"eos": 2}, None),
        ([2], None, {"eos": 2}, None),
        ([2, 300], None, {"eos": 2, "eot": 300}, None),
        ([300, 2], None, {"eos": 2, "eot": 300}, None),
        (2, [2, 300, 301], {"eos": 2, "eot": 300, "eom": 301}, None),
        (2, [2, 300, 301, 302, 303], {"eos": 2, "eot": 300, "eom": 301}, [2, 300, 301, 302, 303]),
        ([2, 302, 303], [300, 301], {"eos": 2, "eot": 300, "eom": 301}, [300, 301, 2, 302, 303]),
        (2, 300, {"eos": 2, "eot": 300}, None),
        (7, 2, {"eos": 2}, None),
        ([2, 300, 9999, -1, True, "</s>", None, 300], None, {"eos": 2, "eot": 300}, None),
    ],
)
def test_every_end_that_the_files_list_is_told(
    tmp_path: Path, model: Any, generation: Any, named: dict[str, int], further: list[int] | None
) -> None:
    files = {} if generation is None else {"generation_config_json": {"eos_token_id": generation}}
    directory = write_tokenizer(tmp_path, "json", **files)
    metadata = tokenizer_metadata(directory, config(N_PIECES, eos_token_id=model))
    found = special(metadata)
    assert {role: found[key] for role in ("eos", "eot", "eom") if (key := f"{role}_token_id") in found} == named
    expected = None if further is None else GGUFValue(ValueType.ARRAY, further, ValueType.UINT32)
    assert metadata.get("ggufmoe.eos_token_ids") == expected


def test_ends_that_llama_cpp_knows_by_their_text_need_no_key(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "bpe", generation_config_json={"eos_token_id": [382, 383]})
    metadata = tokenizer_metadata(directory, config(N_BYTE_LEVEL))
    assert {key: value for key, value in special(metadata).items() if "_id" in key} == {
        "bos_token_id": 381,
        "eos_token_id": 382,
    }


def test_cls_and_sep_stand_in_for_bos_and_eos(tmp_path: Path) -> None:
    roles = {"cls_token": "<|begin_of_text|>", "sep_token": "<|end_of_text|>"}
    directory = write_tokenizer(tmp_path, "bpe", tokenizer_config_json=roles)
    found = special(tokenizer_metadata(directory, config(N_BYTE_LEVEL)))
    assert (found["bos_token_id"], found["eos_token_id"], found["seperator_token_id"]) == (381, 382, 382)


def test_a_leading_token_that_is_not_the_bos_is_not_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_tokenizer(
        tmp_path, "bpe", tokenizer_config_json={"bos_token": "<|eot_id|>", "cls_token": "x", "eos_token": "<|eot_id|>"}
    )
    assert special(tokenizer_metadata(directory, config(N_BYTE_LEVEL)))["add_bos_token"] is False
    assert "'<|begin_of_text|>' before a text, which is not bos" in caplog.text


def test_ids_outside_of_the_vocabulary_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata = tokenizer_metadata(
        write_tokenizer(tmp_path, "spm"), config(N_PIECES, pad_token_id=-1, sep_token_id=N_PIECES)
    )
    assert not {"padding_token_id", "seperator_token_id"} & set(plain(metadata))
    assert "pad_token_id is -1" in caplog.text


def test_no_bos_is_added_unless_somebody_says_so(tmp_path: Path) -> None:
    """llama.cpp adds one by default for Llama 3's pre-tokenizer."""
    directory = edit_json(write_tokenizer(tmp_path, "bpe"), lambda t: t.update(post_processor=None))
    assert special(tokenizer_metadata(directory, config(N_BYTE_LEVEL)))["add_bos_token"] is False


def test_code_llama_has_an_end_of_turn(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "spm", added_tokens_json={"▁<EOT>": 32010})
    assert special(tokenizer_metadata(directory, config(32016)))["eot_token_id"] == 32010


def test_starcoder_vocabularies_get_no_bos(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(write_tokenizer(tmp_path, "smollm"), config(49152))
    assert special(metadata)["add_bos_token"] is False


def test_templates_whose_names_fall_together_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    templates = [{"name": name, "template": f"of {name}"} for name in ("a b", "a-b", "")]
    directory = write_tokenizer(tmp_path, "spm", tokenizer_config_json={"chat_template": templates})
    metadata = tokenizer_metadata(directory, config(N_PIECES))
    assert metadata["tokenizer.chat_template.a_b"].value == "of a-b"
    assert metadata["tokenizer.chat_templates"].value == ["a_b"]
    assert "the chat template 'a b' is left out" in caplog.text
    assert "the chat template '' is left out" in caplog.text


def test_chat_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "D"},
        {"name": "tool use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    directory = write_tokenizer(tmp_path, "spm", tokenizer_config_json={"chat_template": named})
    metadata = tokenizer_metadata(directory, config(N_PIECES))
    assert plain(metadata)["tokenizer.chat_template"] == "D"
    assert plain(metadata)["tokenizer.chat_template.tool_use"] == "T"
    assert metadata["tokenizer.chat_templates"] == GGUFValue(ValueType.ARRAY, ["rag", "tool_use"], ValueType.STRING)
    override = tokenizer_metadata(directory, config(N_PIECES), chat_template="mine")
    assert [value.value for key, value in override.items() if "chat_template" in key] == ["mine"]


def test_chat_template_file(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "spm")
    assert not [key for key in tokenizer_metadata(directory, config(N_PIECES)) if "chat" in key]
    (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert plain(tokenizer_metadata(directory, config(N_PIECES)))["tokenizer.chat_template"] == "{{ messages }}"


def test_what_a_template_writes_and_the_vocabulary_lacks_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chatml = "<|im_start|>user\n{{ messages[0].content }}<|im_end|></s>"
    directory = write_tokenizer(tmp_path / "plain", "spm")
    tokenizer_metadata(directory, config(N_PIECES), chat_template=chatml)
    assert "the chat template writes <|im_start|>, <|im_end|>, which this vocabulary does not have" in caplog.text
    caplog.clear()
    named = {"chat_template": {"default": "x", "tool_use": "<|tool|>"}}
    tokenizer_metadata(write_tokenizer(tmp_path / "named", "spm", tokenizer_config_json=named), config(N_PIECES))
    assert "the chat template 'tool_use' writes <|tool|>, which" in caplog.text
    caplog.clear()
    added = {"<|im_start|>": 400, "<|im_end|>": 401}
    known = write_tokenizer(tmp_path / "known", "spm", added_tokens_json=added)
    tokenizer_metadata(known, config(402), chat_template=chatml)
    assert caplog.text == ""


def test_what_llama_cpp_cannot_do_quite_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="ggufmoe")
    strips = added_token(384, "<mask>", special=True) | {"lstrip": True}
    directory = edit_json(write_tokenizer(tmp_path, "bpe"), lambda t: t["added_tokens"].append(strips))
    edit_json(directory, lambda t: t.update(normalizer={"type": "NFC"}))
    tokenizer_metadata(directory, config(N_BYTE_LEVEL + 1))
    assert "'<mask>' strips spaces" in caplog.text
    assert "does not normalize to NFC" in caplog.text


def test_byte_alphabet_is_gpt2s() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_alphabet().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert (byte_alphabet()[0x20], byte_alphabet()[0x0A], byte_alphabet()[0x41]) == ("Ġ", "Ċ", "A")
