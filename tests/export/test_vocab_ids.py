"""llama.cpp's token ids from our metadata, against the ids of the libraries that own the tokenizers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.export.vocab import tokenizer_metadata
from ggufmoe.export.vocab.pretokenizer import KNOWN, PreTokenizer
from ggufmoe.families import all_families, llama
from tests.export.vocab_files import (
    NASTY,
    Tokenize,
    added_token,
    config,
    edit_json,
    llama_cpp_vocabulary,
    write_tokenizer,
)
from tests.tiny_tokenizers import CORPUS, N_BYTE_LEVEL, N_PIECES, sentencepiece_model

ODD = "\t\n\r \u00a0\u200d\u3000'’.,;!?#$%/\\_-▁éÉßñΩжا١中가👍½²\u0301\x01\x7f"


def generated_lines(n: int, seed: int = 7) -> list[str]:
    """Lines of words, numbers and odd characters in all orders, from a fixed seed."""
    chance = random.Random(seed)
    words = " ".join(CORPUS).split()
    parts = [*words, *ODD, *map(str, range(0, 2000, 37))]
    glue = ("", " ", " ", "  ", "\n")
    return ["".join(chance.choice(parts) + chance.choice(glue) for _ in range(chance.randint(1, 12))) for _ in range(n)]


TEXTS = (*NASTY, *generated_lines(2500))


def differing(tokenize: Tokenize, original: Any, texts: tuple[str, ...], *, parse: bool) -> list[str]:
    return [text for text in texts if tokenize(text, parse=parse) != original(text)]


def hugging_face(directory: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def doubles_no_space(text: str) -> bool:
    """llama.cpp doubles a space that text begins with; a Metaspace does not, and no key can say so."""
    return not text.startswith((" ", "▁"))


def test_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    metadata = tokenizer_metadata(write_tokenizer(tmp_path, "spm"), config(N_PIECES))
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, processor.encode, TEXTS, parse=False) == []
        assert tokenize("Once", special=True) == [1, *processor.encode("Once")]
        assert tokenize("<s>Once</s>", parse=True) == [1, *processor.encode("Once"), 2]


@pytest.mark.parametrize("kind", ["json", "bpe", "smollm"])
def test_tokenizer_json(tmp_path: Path, kind: str) -> None:
    n_vocab = N_PIECES if kind == "json" else N_BYTE_LEVEL
    metadata = tokenizer_metadata(write_tokenizer(tmp_path, kind), config(n_vocab))
    texts = tuple(text for text in TEXTS if kind != "json" or doubles_no_space(text))
    special = {"json": "<s>Once upon</s>a time<unk>", "bpe": "<|eot_id|>a time\n<|begin_of_text|>"}
    texts += (special.get(kind, "<|im_start|>user\nHi <|im_end|>\n"),)
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, hugging_face(tmp_path), texts, parse=True) == []


def test_bos_is_added_as_the_post_processor_says(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    for kind, n_vocab in (("json", N_PIECES), ("bpe", N_BYTE_LEVEL), ("smollm", N_BYTE_LEVEL)):
        directory = write_tokenizer(tmp_path / kind, kind)
        metadata = tokenizer_metadata(directory, config(n_vocab))
        wanted = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("Once upon a time").ids
        with llama_cpp_vocabulary(directory / "vocab.gguf", metadata) as tokenize:
            assert tokenize("Once upon a time", special=True) == wanted


def test_user_defined_pieces(tmp_path: Path) -> None:
    """sentencepiece cuts these out before merging; llama.cpp's converter would leave them to be spelt."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>", "▁▁", "▁▁▁▁", "\n"],
        num_threads=1,
        minloglevel=3,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    metadata = tokenizer_metadata(tmp_path, config(380))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert metadata["tokenizer.ggml.add_space_prefix"].value is False
    plain = [text for text in generated_lines(300) if "▁" not in text]
    texts = ("a <tool> b<tool>c", "x\n\ny", "Once<tool>", *plain)
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, processor.encode, texts, parse=False) == []


def prepend_and_replace(tokenizer: dict[str, Any]) -> None:
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    tokenizer |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


def replace_only(tokenizer: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer |= {"normalizer": step, "pre_tokenizer": None}


def metaspace(**fields: Any) -> Any:
    step = {"type": "Metaspace", "replacement": "▁", **fields}
    return lambda tokenizer: tokenizer.update(pre_tokenizer=step)


@pytest.mark.parametrize(
    ("edit", "prefix"),
    [
        (prepend_and_replace, None),
        (replace_only, False),
        (metaspace(prepend_scheme="never", split=False), False),
        (metaspace(prepend_scheme="first", split=False), None),
    ],
)
def test_space_prefix_in_its_spellings(tmp_path: Path, edit: Any, prefix: bool | None) -> None:
    directory = edit_json(write_tokenizer(tmp_path, "json"), edit)
    metadata = tokenizer_metadata(directory, config(N_PIECES))
    stated = metadata.get("tokenizer.ggml.add_space_prefix")
    assert (stated.value if stated else None) == prefix
    texts = tuple(
        text for text in TEXTS[:800] if prefix is False or edit is prepend_and_replace or doubles_no_space(text)
    )
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, hugging_face(directory), texts, parse=True) == []


def native_byte_fallback(directory: Path, *, prefix: bool) -> Path:
    """A BPE with byte fallback that was trained by ``tokenizers`` itself: one merge for each token."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([line.strip() for line in CORPUS if "\n" not in line], trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = vocab | {byte: len(vocab) + i for i, byte in enumerate(alphabet)}
    content["model"]["byte_fallback"] = True
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_merges_that_scores_cannot_stand_for(tmp_path: Path) -> None:
    directory = native_byte_fallback(tmp_path, prefix=False)
    metadata = tokenizer_metadata(directory, config(720, bos_token_id=0, eos_token_id=1))
    assert metadata["tokenizer.ggml.model"].value == "gpt2"
    texts = tuple(text for text in TEXTS[:800] if text)
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, hugging_face(directory), texts, parse=True) == []


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_every_pre_tokenizer_of_the_table(
    tmp_path: Path, known: PreTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in known.patterns]
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *NASTY, *generated_lines(200, seed=8)], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    of_family = next((one for one in all_families() if one.tokenizer.pre_tokenizer == known.name), llama.FAMILY)
    model = replace(config(600, eos_token_id=0), architecture=of_family.architecture)
    metadata = tokenizer_metadata(tmp_path, model)
    assert metadata["tokenizer.ggml.pre"].value == known.name
    assert ("some token ids will differ" in caplog.text) == known.approximate
    plain = tuple(text for text in TEXTS[:600] if not known.approximate or text.isascii())
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, hugging_face(tmp_path), plain, parse=True) == []
        assert tokenize("Once", special=True) == hugging_face(tmp_path)("Once")


def test_ignore_merges_may_differ_where_it_changes_nothing(tmp_path: Path) -> None:
    directory = edit_json(write_tokenizer(tmp_path, "smollm"), lambda t: t["model"].update(ignore_merges=True))
    metadata = tokenizer_metadata(directory, config(N_BYTE_LEVEL))
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        assert differing(tokenize, hugging_face(directory), TEXTS[:300], parse=True) == []


def test_added_tokens_are_cut_out(tmp_path: Path) -> None:
    extra = [added_token(N_BYTE_LEVEL, "[TOOL]", special=False), added_token(N_BYTE_LEVEL + 1, "<|x|>", special=True)]
    directory = edit_json(write_tokenizer(tmp_path, "bpe"), lambda t: t["added_tokens"].extend(extra))
    metadata = tokenizer_metadata(directory, config(N_BYTE_LEVEL + 4))
    with llama_cpp_vocabulary(tmp_path / "vocab.gguf", metadata) as tokenize:
        text = "call [TOOL] now<|x|>."
        assert tokenize(text, parse=True) == hugging_face(directory)(text)
        assert N_BYTE_LEVEL in tokenize(text)
        assert N_BYTE_LEVEL + 1 not in tokenize(text)
