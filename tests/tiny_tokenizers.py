"""Small tokenizers for the tiny models, trained on a few sentences, once in a process.

``spm`` is sentencepiece's own file, ``gemma`` one that puts no space before a text; ``json`` the same vocabulary as
``spm`` in a ``tokenizer.json`` of the sentencepiece kind; ``bpe`` a byte-level ``tokenizer.json`` with Llama 3's
pre-tokenizer, ``smollm`` one with SmolLM2's, ``qwen`` one with Qwen2's, ``qwen35`` one with Qwen3.5's, ``harmony``
one with gpt-oss's and ``glm`` one with GLM-4's.
"""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

N_PIECES = 400
N_BYTE_LEVEL = 384

CORPUS = (
    "Once upon a time, there was a little girl named Lily who loved to play outside in the sunshine.",
    "One day she saw a big red ball in the grass, and her brother said that it was not theirs.",
    "The quick brown fox jumps over the lazy dog; the dog does not mind, because it is asleep.",
    "In 1969 two people walked on the Moon, and about 600 million others watched them do it.",
    "To solve for x, subtract 42 from both sides, divide by 7, and check the answer twice.",
    'Her mother asked: "What have you learned at school today?" Nothing, she answered, as always.',
    "Water boils at 100 degrees; higher up the air is thinner, therefore it boils earlier.",
    "The farmer had seventeen sheep, all but nine ran away; how many sheep are left over now?",
    "for index in range(10):\n    total = total + values[index]\n    print(index, total)\n",
    "Rivers carry sand and stones to the sea, where the waves grind them smaller and smaller.",
    "Das Mädchen fragte seine Großmutter, warum der Himmel über den Bergen so blau wäre.",
    "L'été dernier, nous avons mangé des crêpes à côté de la fenêtre; ça sentait très bon.",
    "It's what they've said: we'll go, you're late, I'm here, he'd rather stay, don't worry.",
)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def sentencepiece_model(*, begins_with_space: bool = True) -> bytes:
    """A BPE ``tokenizer.model`` of N_PIECES pieces with byte fallback, as Llama 2 and Mistral have it; without a space
    before each text as Gemma has it."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_PIECES,
        byte_fallback=True,
        character_coverage=0.99,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=begins_with_space,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


def _scored_pieces() -> dict[str, float]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    return {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.get_piece_size())}


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Every way to make a piece of two others, best score first, as Hugging Face derives them."""
    ids = {piece: i for i, piece in enumerate(scores)}
    found = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [pair for *_, pair in sorted(found)]


def _special(id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": True}


def _begin_with(token: str, id: int) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


@cache
def sentencepiece_json() -> str:
    """``tokenizer.json`` of the same vocabulary, in the words of mergekit's output (Metaspace, merges as pairs)."""
    scores = _scored_pieces()
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(i, piece) for i, piece in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        "post_processor": _begin_with("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(scores)},
            "merges": _merges(scores),
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False)


QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BEGIN, _END = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O_PATTERN = (
    rf"{_BEGIN}*{_END}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{_BEGIN}+{_END}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "bpe": LLAMA3_PATTERN,
    "qwen": QWEN2_PATTERN,
    "qwen35": QWEN35_PATTERN,
    "harmony": GPT4O_PATTERN,
    "glm": LLAMA3_PATTERN,
}
"""Kinds of which the pre-tokenizer is one pattern."""


def _splitting_pre_tokenizer(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _smollm_pre_tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@cache
def byte_level_json(kind: str) -> str:
    """A byte-level ``tokenizer.json``: ``bpe`` as Llama 3's (specials last, BOS added), ``smollm`` as SmolLM2's, and
    those of ``PATTERNS`` as the models that have them (specials last, none added)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = list(SPECIAL_TOKENS[kind])
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("bpe", "glm")))
    tokenizer.pre_tokenizer = _splitting_pre_tokenizer(PATTERNS[kind]) if kind in PATTERNS else _smollm_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_BYTE_LEVEL - (len(specials) if kind in PATTERNS else 0),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials if kind == "smollm" else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(specials)
    written: dict[str, Any] = json.loads(tokenizer.to_str())
    if kind == "bpe":
        written["post_processor"] = _begin_with(specials[0], N_BYTE_LEVEL - len(specials))
    if kind == "glm":
        written["post_processor"] = _begin_with(specials[0], N_BYTE_LEVEL - len(specials))
        for template in ("single", "pair"):
            written["post_processor"][template].insert(1, {"SpecialToken": {"id": "<sop>", "type_id": 0}})
        place = N_BYTE_LEVEL - len(specials) + specials.index("<sop>")
        written["post_processor"]["special_tokens"]["<sop>"] = {"id": "<sop>", "ids": [place], "tokens": ["<sop>"]}
    return json.dumps(written, ensure_ascii=False)


SPECIAL_TOKENS = {
    "spm": ("<s>", "</s>"),
    "gemma": ("<s>", "</s>"),
    "json": ("<s>", "</s>"),
    "bpe": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "smollm": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "glm": ("[gMASK]", "<|endoftext|>", "<sop>", "<|user|>", "<|observation|>"),
    "qwen35": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "harmony": (
        *("<|startoftext|>", "<|return|>", "<|endoftext|>"),
        *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
    ),
}
"""Beginning and end of text first; ``smollm`` begins with the token that also ends, those of Qwen with none."""


def special_ids(kind: str) -> tuple[int, int]:
    """Ids of the tokens that begin and end a text."""
    if kind in ("spm", "gemma", "json"):
        return 1, 2
    if kind == "bpe":
        return N_BYTE_LEVEL - 3, N_BYTE_LEVEL - 2
    if kind.startswith("qwen"):
        return N_BYTE_LEVEL - 3, N_BYTE_LEVEL - 1
    if kind in ("harmony", "glm"):
        first = N_BYTE_LEVEL - len(SPECIAL_TOKENS[kind])
        return first, first + 1
    return 1, 2


def vocabulary_size(kind: str | None) -> int:
    """Number of tokens; models without a tokenizer get as many as ``spm`` ones."""
    return N_PIECES if kind in (None, "spm", "gemma", "json") else N_BYTE_LEVEL


def tokenizer_files(kind: str) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer by name, ``tokenizer_config.json`` left to the caller."""
    if kind in ("spm", "gemma"):
        return {"tokenizer.model": sentencepiece_model(begins_with_space=kind == "spm")}
    text = sentencepiece_json() if kind == "json" else byte_level_json(kind)
    return {"tokenizer.json": text.encode()}


def tokenizer_config(kind: str) -> dict[str, Any]:
    """``tokenizer_config.json`` as transformers writes it for a tokenizer of this kind."""
    if kind.startswith("qwen"):
        return {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_prefix_space": False,
                "tokenizer_class": "Qwen2Tokenizer"}  # fmt: skip
    if kind == "glm":
        return {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    begin, end = SPECIAL_TOKENS[kind][:2] if kind != "smollm" else SPECIAL_TOKENS[kind][1:]
    config: dict[str, Any] = {
        "bos_token": begin,
        "eos_token": end,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    if kind in ("spm", "gemma", "json"):
        llama = {
            "add_bos_token": True,
            "add_eos_token": False,
            "unk_token": "<unk>",
            "tokenizer_class": "LlamaTokenizer",
        }
        return config | llama | ({} if kind == "json" else {"legacy": True})
    return config | {"tokenizer_class": "GPT2Tokenizer" if kind == "smollm" else "PreTrainedTokenizerFast"}
