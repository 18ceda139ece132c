"""Compare the token ids of a GGUF file with those of the checkpoint's own tokenizer, line by line.

usage: token_ids.py CHECKPOINT_DIR MODEL.gguf TEXT

sentencepiece is the judge where the directory has tokenizer.model, Hugging Face's tokenizers where it has only
tokenizer.json. One difference is known, counted apart and forgiven: llama.cpp puts a space before every stretch of
text, a Metaspace puts none before one that begins with a space, nor (prepend_scheme first) behind a special token.
Exit code 1 for any other.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Tokenize = Callable[[str], list[int]]

NASTY = (
    "",
    "a",
    " ",
    "  ",
    "      many      spaces   ",
    "tab\tand\t\ttabs",
    "line\nbreaks\n\n\nand\r\nreturns\r",
    "\n",
    "\n \n  \n",
    "It's, we'LL, they'Ve, I'm, 'tis, 'S, o'clock's",
    "1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 一二三",
    "emoji 😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈 end",
    "zero\u200bwidth\u200djoin\u200cer\ufeffbom",
    "漢字かな交じり文とカタカナ、한국어 텍스트。",
    "עברית מימין לשמאל وعربي مع تشكيلٍ",
    "e\u0301 a\u0308 n\u0303 \u0301alone Z\u0351\u036b\u0343",
    "Ωμέγα Привет мир Ünïcödé ǅ ŉ ſ ß ﬁ",
    "▁ literal ▁▁ lower one eighth ▁▁▁block▁",
    "\x01\x02\x1b[0m\x7f control \x85 \xa0 nbsp \u2028 sep \u3000 wide",
    "<s> </s> <unk> <0x0A> <|im_start|>user<|im_end|> [INST] x [/INST]",
    "<s>[INST]x[/INST]y</s><unk><0x0A><|im_start|>user\nx<|im_end|>\n",
    "\U0001f9ff\U00010348\U000e0041\U0010ffff",
    "!!!???...---===+++///\\\\\\|||~~~```",
    "def f(x):\n    return {\n        'a': x ** 2,\n    }\n",
    "https://example.org/a_b-c?d=%20e&f#g",
    "ALLCAPS camelCase snake_case kebab-case ÉCOLE élÈve",
    "x" * 300,
    " " * 200 + "x" + "\t" * 50,
)


@contextmanager
def llama_tokenizer(path: Path) -> Iterator[Callable[[str, bool], list[int]]]:
    """A function of text and ``parse_special`` that gives llama.cpp's ids, without bos or eos."""
    from llama_cpp import llama_cpp as lib

    previous, user_data = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise SystemExit(f"{path}: llama.cpp does not load it")
    vocab = lib.llama_model_get_vocab(model)

    def tokenize(text: str, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(vocab, data, len(data), ids, room, False, parse_special)
        return list(ids[:count])

    try:
        yield tokenize
    finally:
        lib.llama_model_free(model)
        lib.llama_log_set(previous, user_data)


def original_tokenizer(directory: Path) -> tuple[Tokenize, str]:
    """The checkpoint's own tokenizer, and the name of the library behind it."""
    if (directory / "tokenizer.model").is_file():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        return lambda text: list(processor.encode(text)), "sentencepiece"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), "tokenizers"


def differing(directory: Path, gguf: Path, texts: list[str]) -> tuple[list[str], int, str]:
    """The texts whose ids differ, the number of ids compared, and the judge's name."""
    original, judge = original_tokenizer(directory)
    by_json = judge == "tokenizers"
    differ, n_ids = [], 0
    with llama_tokenizer(gguf) as tokenize:
        for text in texts:
            wanted = original(text)
            n_ids += len(wanted)
            if tokenize(text, by_json) != wanted:
                differ.append(text)
    return differ, n_ids, judge


def extra_space(directory: Path) -> Callable[[str], bool]:
    """Whether llama.cpp puts a space into a text where the directory's Metaspace puts none."""
    if (directory / "tokenizer.model").is_file():
        return lambda text: False
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    metaspace = tokenizer.get("pre_tokenizer") or {}
    if metaspace.get("type") != "Metaspace" or metaspace.get("prepend_scheme") == "never":
        return lambda text: False
    specials = "|".join(re.escape(token["content"]) for token in tokenizer.get("added_tokens", [])) or "(?!)"
    behind = f"(?:{specials})." if metaspace.get("prepend_scheme") == "first" else f"(?:{specials})[ \u2581]"
    pattern = re.compile(f"^[ \u2581]|{behind}", re.DOTALL)
    return lambda text: pattern.search(text) is not None


def texts_of(path: Path) -> list[str]:
    """Every line of the file, as it is and without the spaces around it, and every sixteen lines as one text."""
    lines = path.read_text(encoding="utf-8").split("\n")
    texts = [*lines, *(line.strip() for line in lines)]
    return texts + ["\n".join(lines[at : at + 16]).strip() for at in range(0, len(lines), 16)]


def report(directory: Path, gguf: Path, name: str, texts: list[str]) -> int:
    """Print one line of counts and the first texts that differ; gives how many differ and are not forgiven."""
    forgiven = extra_space(directory)
    differ, n_ids, judge = differing(directory, gguf, texts)
    wrong = [text for text in differ if not forgiven(text)]
    known = len(differ) - len(wrong)
    print(
        f"{gguf.name}: {name}: {len(texts)} texts, {n_ids} ids of {judge}; {len(wrong)} differ"
        f" ({known} more by the space that llama.cpp adds)"
    )
    for text in wrong[:10]:
        print(f"  differs: {text[:100]!r}")
    return len(wrong)


def main() -> int:
    """Print counts; 1 if a text differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    wrong = report(arguments.checkpoint, arguments.gguf, arguments.text.name, texts_of(arguments.text))
    wrong += report(arguments.checkpoint, arguments.gguf, "nasty strings", list(NASTY))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
