"""Tokenizer directories for the tests, and llama.cpp's own view of the metadata made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ggufmoe.families.model_config import ModelConfig, RopeScaling
from ggufmoe.gguf.header import GGUFValue
from tests.llama_log import llama_log_to
from tests.tiny_tokenizers import tokenizer_config, tokenizer_files

NASTY = (
    "",
    " ",
    "a",
    "      many      spaces   ",
    "tab\tand\t\ttabs",
    "line\nbreaks\n\n\nand\r\nreturns\r",
    "\n \n  \n",
    "It's, we'LL, they'Ve, I'm, 'tis, 'S, o'clock's",
    "1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 一二三",
    "emoji 😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈 end",
    "zero\u200bwidth\u200djoin\u200cer\ufeffbom",
    "漢字かな交じり文とカタカナ、한국어 텍스트。",
    "עברית מימין לשמאל وعربي مع تشكيلٍ",
    "e\u0301 a\u0308 n\u0303 \u0301alone Z\u0351\u036b\u0343",
    "Ωμέγα Привет мир Ünïcödé ǅ ŉ ß ﬁ",
    "literal ▁ and ▁▁ lower one eighth▁block▁",
    "\x01\x02\x1b[0m\x7f control \x85 \xa0 nbsp \u3000 wide",
    "\U0001f9ff\U00010348\U000e0041\U0010ffff",
    "!!!???...---===+++///\\\\\\|||~~~```",
    "def f(x):\n    return {\n        'a': x ** 2,\n    }\n",
    "x" * 300,
    "y" + " " * 200 + "x" + "\t" * 50,
)


def write_tokenizer(directory: Path, kind: str, **files: Any) -> Path:
    """The tiny tokenizer of this kind, with further files (``NAME_json={...}``) written over it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(kind).items():
        (directory / name).write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(kind)), encoding="utf-8")
    for name, content in files.items():
        (directory / name.replace("_json", ".json")).write_text(json.dumps(content), encoding="utf-8")
    return directory


def edit_json(directory: Path, edit: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> Path:
    """Change one JSON file in place."""
    path = directory / name
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return directory


def config(n_vocab: int, **raw: Any) -> ModelConfig:
    """The hyper-parameters that a vocabulary cares for."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        n_layer=1,
        n_embd=8,
        n_ff=8,
        n_head=1,
        n_head_kv=1,
        head_dim=8,
        n_vocab=n_vocab,
        n_ctx=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=RopeScaling(),
        tie_embeddings=False,
        raw=raw,
    )


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


Tokenize = Callable[..., list[int]]


@contextmanager
def llama_cpp_vocabulary(path: Path, metadata: Mapping[str, GGUFValue]) -> Iterator[Tokenize]:
    """llama.cpp's tokenizer for this metadata: ``tokenize(text, special=False, parse=False)`` gives ids."""
    from llama_cpp import llama_cpp as lib

    _write(path, metadata)
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    with llama_log_to(lambda _: None):
        model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    assert model
    vocab = lib.llama_model_get_vocab(model)

    def tokenize(text: str, special: bool = False, parse: bool = False) -> list[int]:
        data = text.encode()
        ids = (lib.llama_token * (len(data) + 16))()
        count = lib.llama_tokenize(vocab, data, len(data), ids, len(ids), special, parse)
        return list(ids[:count])

    try:
        yield tokenize
    finally:
        lib.llama_model_free(model)


def _write(path: Path, metadata: Mapping[str, GGUFValue]) -> None:
    """A file of nothing but metadata, by the format's reference writer."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        item = None if value.item_type is None else GGUFValueType(int(value.item_type))
        writer.add_key_value(key, value.value, GGUFValueType(int(value.type)), item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
