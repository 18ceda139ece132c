"""What broken, foreign or inexpressible tokenizers get: one line with the file, what is wrong and a way out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.checkpoint import tokenizer_files
from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab import tokenizer_metadata
from tests.export.test_vocab_ids import native_byte_fallback
from tests.export.vocab_files import added_token, config, edit_json, write_tokenizer
from tests.tiny_tokenizers import CORPUS, N_BYTE_LEVEL, N_PIECES, sentencepiece_model

Edit = Callable[[dict[str, Any]], object]


def refuse(directory: Path, match: str, n_vocab: int = 500, **raw: Any) -> None:
    """The conversion fails with one line that matches."""
    with pytest.raises(TokenizerError, match=match) as caught:
        tokenizer_metadata(directory, config(n_vocab, **raw))
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def model(**fields: Any) -> Edit:
    return lambda tokenizer: tokenizer["model"].update(fields)


def top(**fields: Any) -> Edit:
    return lambda tokenizer: tokenizer.update(fields)


def adding(*tokens: Any) -> Edit:
    return lambda tokenizer: tokenizer["added_tokens"].extend(tokens)


@pytest.mark.parametrize(
    ("present", "match"),
    [
        ([], "looked for tokenizer.model, tokenizer.json.*copy the tokenizer's files"),
        (["tekken.json"], "tekken.json, Mistral's own format"),
        (["vocab.json", "merges.txt"], "vocab.json, merges.txt only"),
    ],
)
def test_no_tokenizer(tmp_path: Path, present: list[str], match: str) -> None:
    for name in present:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    refuse(tmp_path, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b"[]", "the file should be a dict, found list"),
    ],
)
def test_hostile_json(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    refuse(tmp_path, match)


def test_empty_files_are_passed_over_and_optional_ones_may_be_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tokenizer_metadata(write_tokenizer(tmp_path / "plain", "spm"), config(500))
    directory = write_tokenizer(tmp_path / "odd", "spm")
    (directory / "tokenizer.json").write_bytes(b"")
    (directory / "added_tokens.json").write_bytes(b" ")
    (directory / "generation_config.json").write_bytes(b"{")
    (directory / "special_tokens_map.json").write_bytes(b"\xff\xfe[\0")
    assert tokenizer_metadata(directory, config(500)) == plain
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        assert f"{name} is ignored" in caplog.text
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (directory / name).write_bytes(b"{")
        refuse(directory, f"{name} is not JSON")
        (directory / name).write_bytes(b"{}")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json")
    more = {"added_tokens_json": {}, "generation_config_json": {"eos_token_id": [2, 300]}}
    plain = tokenizer_metadata(write_tokenizer(tmp_path / "plain", "json", **more), config(500))
    directory = write_tokenizer(tmp_path / "marked", "json", **more)
    for name in names:
        (directory / name).write_bytes((directory / name).read_text(encoding="utf-8").encode(encoding))
    assert tokenizer_metadata(directory, config(500)) == plain


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    directory = write_tokenizer(tmp_path, "spm" if name == "tokenizer.model" else "json")
    (directory / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 499723\n")
    refuse(directory, f"{name} is a git-lfs pointer in the place of the file")


def test_huge_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "MAX_TOKENIZER_BYTES", 1000)
    refuse(write_tokenizer(tmp_path, "json"), "more than the 1000 that a tokenizer file may have")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    directory = write_tokenizer(tmp_path, "json")
    monkeypatch.setattr(Path, "read_bytes", denied)
    refuse(directory, "cannot be read .Permission denied.; check its permissions")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (top(model=None), "model should be a dict, found NoneType"),
        (model(type="Unigram"), "is a Unigram model; only BPE"),
        (model(type="WordPiece"), "is a WordPiece model"),
        (model(dropout=0.1), "dropout = 0.1"),
        (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (model(vocab=[]), "model.vocab should be a dict, found list"),
        (model(vocab={}, merges=[]), "vocabulary is empty"),
        (model(vocab={"a": "0"}), "the id of 'a' should be a int, found str"),
        (model(vocab={"a": True}), "should be a int, found bool"),
        (model(vocab={"a": 0, "b": 0}, merges=[]), "1 ids are given to more than one token"),
        (model(merges=None), "model.merges should be a list"),
        (model(merges=["a b c"]), "'a b c' is not a merge"),
        (model(merges=[["a"]]), "is not a merge of two tokens"),
        (model(merges=[["q", "zzz"]]), "needs '.*', which has no id"),
        (model(byte_fallback=False), "neither byte-level nor has byte_fallback"),
        (top(normalizer={"type": "NFKC"}), "llama.cpp does not support the normalizer .*NFKC"),
        (top(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer .*Whitespace"),
        (top(pre_tokenizer=None), "nothing turns spaces into"),
        (top(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "pre-tokenizer .*Metaspace"),
        (top(decoder={"type": "WordPiece"}), "decoder .*WordPiece"),
        (top(added_tokens={}), None),
        (top(added_tokens="x"), "added_tokens should be a list"),
        (adding(1), "an added token should be a dict"),
        (adding({"id": "1", "content": "x"}), "the id of an added token should be a int"),
        (adding({"id": 1}), "the content of an added token should be a str"),
        (adding(added_token(1, "<other>", special=True)), "token 1 is '<s>' and also added as '<other>'"),
        (model(vocab={"a": 500}, merges=[]), "'a' has id 500, but the embedding has only 500 rows"),
        (adding(added_token(-1, "<early>", special=True)), "'<early>' has id -1"),
        (adding(added_token(450, "a\0b", special=True)), "holds NUL"),
        (adding(added_token(450, "\ud800", special=True)), "half a surrogate pair"),
        (adding(added_token(450, "x" * 2000, special=True)), "longer than 1024 characters"),
        (adding(added_token(400, "[PAD460]", special=True)), "tokens 400 and 460 are both"),
        (top(post_processor={"type": "BertProcessing"}), "post-processor BertProcessing"),
    ],
)
def test_tokenizer_json_of_the_sentencepiece_kind(tmp_path: Path, edit: Edit, match: str | None) -> None:
    directory = edit_json(write_tokenizer(tmp_path, "json"), edit)
    if match is None:
        tokenizer_metadata(directory, config(500))
    else:
        refuse(directory, match)


def drop_byte(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["vocab"]["<0x41>"]


def drop_merge(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["merges"][0]


def move_merge(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    twice = next(i for i, pair in enumerate(merges[1:], 1) if "".join(pair) == "".join(merges[i - 1]))
    merges.append(merges.pop(twice))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop_byte, "1 of the 256 byte tokens are missing .<0x41> first"),
        (move_merge, "are not next to each other, so no score can order them"),
        (drop_merge, "it would join '.*' and '.*', which is not a merge of this tokenizer"),
    ],
)
def test_merges_that_llama_cpp_would_do_otherwise(tmp_path: Path, edit: Edit, match: str) -> None:
    refuse(edit_json(write_tokenizer(tmp_path, "json"), edit), match)


def test_merges_of_its_own_with_a_space_prefix(tmp_path: Path) -> None:
    refuse(native_byte_fallback(tmp_path, prefix=True), "which is not a merge of this tokenizer", 720, eos_token_id=1)


def test_metaspace_that_cuts_words_apart(tmp_path: Path) -> None:
    def cut(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"]["split"] = True
        tokenizer["model"]["vocab"]["▁▁"] = 400
        tokenizer["model"]["merges"].append(["▁", "▁"])

    refuse(edit_json(write_tokenizer(tmp_path, "json"), cut), "Metaspace splits words that merges would join")


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def cuts(*steps: dict[str, Any]) -> Edit:
    return top(pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, BYTES]})


def forget_a_byte(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"].pop("Q")
    tokenizer["model"]["unk_token"] = "<|eot_id|>"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            cuts(SPLIT | {"pattern": {"Regex": r"\d"}}),
            r"known to equal '\\\\d'; supported are llama-bpe, smaug-bpe, glm4, smollm",
        ),
        (cuts(SPLIT | {"pattern": {"String": "."}}), "no pre-tokenizer known to equal"),
        (cuts(SPLIT | {"pattern": {}}), "does not support the pre-tokenizer .*Split"),
        (cuts(SPLIT | {"pattern": {"Regex": "x"}, "behavior": "Removed"}), "pre-tokenizer .*Removed"),
        (cuts({"type": "Digits", "individual_digits": False}), "no pre-tokenizer known to equal"),
        (top(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "pre-tokenizer .*add_prefix_space"),
        (top(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
        (top(decoder={"type": "BPEDecoder"}), "decoder .*BPEDecoder"),
        (model(byte_fallback=True), "byte-level vocabulary with byte_fallback"),
        (model(ignore_merges=True, merges=[]), None),
        (forget_a_byte, "byte 0x51 has no token and gives"),
        (adding(added_token(9, "<nine>", special=True)), "also added as '<nine>'"),
    ],
)
def test_byte_level(tmp_path: Path, edit: Edit, match: str | None) -> None:
    directory = edit_json(write_tokenizer(tmp_path, "bpe"), edit)
    if match is None:
        tokenizer_metadata(directory, config(500))
    else:
        refuse(directory, match)


def test_ignore_merges_that_llama_cpp_has_otherwise(tmp_path: Path) -> None:
    def lone_word(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["ignore_merges"] = True
        tokenizer["model"]["vocab"]["Ġzebrafish"] = 400

    refuse(
        edit_json(write_tokenizer(tmp_path, "smollm"), lone_word),
        "ignore_merges is True, but False for llama.cpp's smollm",
    )


def test_template_that_adds_more_than_llama_cpp_can(tmp_path: Path) -> None:
    first = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    single = [first, first, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": []}
    refuse(
        edit_json(write_tokenizer(tmp_path, "bpe"), top(post_processor=post)), "llama.cpp adds one token at each end"
    )


def test_no_end_of_text(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "bpe", tokenizer_config_json={"bos_token": "<|begin_of_text|>"})
    refuse(directory, "no file says which token ends a text, and llama.cpp would take token 11")


def test_no_bos_to_add(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "smollm", tokenizer_config_json={"add_bos_token": True})
    refuse(directory, "bos is to be added to every text, but no file says which", eos_token_id=0)


def test_template_that_utf8_cannot_hold(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, "spm", tokenizer_config_json={"chat_template": "\udc00"})
    refuse(directory, "chat template 'default' holds half a surrogate pair")


def trained(**options: Any) -> bytes:
    """A sentencepiece model of another sort."""
    import sentencepiece

    model_file = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "num_threads": 1,
        "minloglevel": 3,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model_file, **(settings | options)
    )
    return model_file.getvalue()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model_type": "unigram"}, "it is a Unigram model"),
        ({"model_type": "char", "vocab_size": 310}, "it is a Char model"),
        ({"normalization_rule_name": "nfkc"}, "normalizes characters before tokenizing"),
        ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
        ({"escape_whitespaces": False, "add_dummy_prefix": False}, None),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of words"),
        ({"byte_fallback": False, "vocab_size": 150}, "256 of the 256 byte tokens are missing"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_does_not_know(
    tmp_path: Path, options: dict[str, Any], match: str | None
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**options) if match else _unescaped())
    refuse(tmp_path, match or "does not escape spaces")


def _unescaped() -> bytes:
    """The tiny model with ``escape_whitespaces`` false: a later field of a message wins over an earlier one."""
    normalizer = bytes([0x20, 0, 0x28, 0])
    return sentencepiece_model() + bytes([0x1A, len(normalizer)]) + normalizer


def test_unused_pieces(tmp_path: Path) -> None:
    unused = b"\x0a\x02ab\x18\x05"
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model() + bytes([0x0A, len(unused)]) + unused)
    refuse(tmp_path, "it has unused pieces")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a sentencepiece model .it has no pieces"),
        (b"IQ== 0\nIg== 1\n", "not a sentencepiece model .*; if the model's tokenizer is in tokenizer.json"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "number too long"),
        (b"\x0a", "cut short inside a number"),
        (b"\x0a\x02\x08\x01", "a piece whose fields are of other types"),
        (b"\x0a\x04\x0a\x02\xff\xff", "not a sentencepiece model"),
        (b"\x0a\x02\x18\x09\x12\x02\x18\x02", "not a sentencepiece model .9 is not a valid TokenType"),
        (b"\x09" + bytes(8) + b"\x0b", "wire type 3 at byte"),
    ],
)
def test_bytes_that_are_no_sentencepiece_model(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    refuse(tmp_path, match)


def test_a_sentencepiece_model_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model()[:1000])
    refuse(tmp_path, "cut short at byte")
    path.write_bytes(sentencepiece_model()[: 2 + sentencepiece_model()[1]])
    refuse(tmp_path, "it ends before it says how it was trained")


def test_fewer_rows_than_pieces(tmp_path: Path) -> None:
    refuse(write_tokenizer(tmp_path, "spm"), "has id 399, but the embedding has only 399 rows", N_PIECES - 1)
    refuse(write_tokenizer(tmp_path / "b", "bpe"), "has only 380 rows", N_BYTE_LEVEL - 4)


def test_two_files_that_disagree(tmp_path: Path) -> None:
    other = {"added_tokens": [added_token(5, "<five>", special=True)]}
    directory = write_tokenizer(tmp_path, "spm", tokenizer_json=other)
    refuse(directory, "token 5 is '<0x02>', but '<five>' in tokenizer.json; keep the one that belongs")


def test_files_that_name_tokens_wrongly(tmp_path: Path) -> None:
    refuse(write_tokenizer(tmp_path / "a", "spm", added_tokens_json={"x": "y"}), "x should be a int, found str")
    decoder = {"added_tokens_decoder": {"1x": added_token(1, "x", special=True)}}
    refuse(write_tokenizer(tmp_path / "b", "spm", tokenizer_config_json=decoder), "the id of an added token")
    twice = write_tokenizer(tmp_path / "c", "spm", added_tokens_json={"the same": 400})
    (twice / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"401": added_token(401, "the same", special=False)}}), encoding="utf-8"
    )
    refuse(twice, "tokens 400 and 401 are both 'the same'")
