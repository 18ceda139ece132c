"""A model that says what the test wants: each token is followed by the one that the test names.

Attention and feed-forward add nothing, the embedding of a token is a unit vector of its own, and the output matrix has
one large number in its column: the token that follows. So answers, ends and bytes are known exactly, through the real
engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

CONTROL, USER_DEFINED, BYTE, UNKNOWN = 3, 4, 6, 2
UNK, BOS, EOS = 0, 1, 2
_N_HEAD = 4


@dataclass(frozen=True)
class Scripted:
    """What the model says, and what its file tells; ``write`` makes the file."""

    follows: Mapping[str, str | Mapping[str, float]] = field(default_factory=dict)
    """Piece to the piece that follows, or to several with their logits; what is not named is followed by ``</s>``.
    Bytes are written ``<0xE2>``."""
    pieces: Sequence[str] = ()
    """Further pieces of the vocabulary."""
    controls: Sequence[str] = ()
    """Pieces that are control tokens, without a text of their own."""
    chat_template: str | None = None
    add_bos: bool = True
    n_ctx_train: int = 512
    arch: str = "llama"
    vocabulary: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    random_layers: bool = False
    """Attention and feed-forward with random weights: the next token then depends on all before it."""
    n_expert: int = 0
    """Experts in place of the feed-forward; a random router sends each token to two of them."""

    @property
    def vocab(self) -> list[str]:
        named = [*self.follows, *self.pieces, *self.controls]
        for value in self.follows.values():
            named += [value] if isinstance(value, str) else list(value)
        fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        return fixed + sorted(set(named) - set(fixed))

    def id(self, piece: str) -> int:
        return self.vocab.index(piece)

    def ids(self, *pieces: str) -> list[int]:
        return [self.id(piece) for piece in pieces]

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        vocab = self.vocab
        n_embd = -(-len(vocab) // 32) * 32
        _add_shape(writer, self, n_embd, len(vocab))
        if self.vocabulary:
            _add_vocabulary(writer, self, vocab)
        else:
            writer.add_tokenizer_model("no_vocab")
        for key, value in self.metadata.items():
            items = _value_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(key, value, _value_type(value), items)
        for name, data in {**_tensors(self, n_embd), **self.tensors}.items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _add_shape(writer: gguf.GGUFWriter, spec: Scripted, n_embd: int, n_vocab: int) -> None:
    writer.add_context_length(spec.n_ctx_train)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(_N_HEAD)
    writer.add_head_count_kv(_N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // _N_HEAD)
    writer.add_vocab_size(n_vocab)
    if spec.n_expert:
        writer.add_expert_count(spec.n_expert)
        writer.add_expert_used_count(2)


def _add_vocabulary(writer: gguf.GGUFWriter, spec: Scripted, vocab: list[str]) -> None:
    types = [USER_DEFINED] * len(vocab)
    types[UNK], types[BOS], types[EOS] = UNKNOWN, CONTROL, CONTROL
    types[3 : 3 + 256] = [BYTE] * 256
    for piece in spec.controls:
        types[spec.id(piece)] = CONTROL
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab)
    writer.add_token_scores([0.0] * len(vocab))
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_space_prefix(False)
    if spec.chat_template is not None:
        writer.add_chat_template(spec.chat_template)


def _value_type(value: Any) -> gguf.GGUFValueType:
    types = {str: "STRING", float: "FLOAT32", int: "INT32", np.uint32: "UINT32", bool: "BOOL", list: "ARRAY"}
    return gguf.GGUFValueType[types[type(value)]]


def _tensors(spec: Scripted, n_embd: int) -> dict[str, NDArray[np.float32]]:
    vocab = spec.vocab
    embedding = np.eye(len(vocab), n_embd, dtype=np.float32)
    output = np.zeros((len(vocab), n_embd), np.float32)
    scale = np.float32(1 / np.sqrt(n_embd))  # the norm makes a unit vector sqrt(n_embd) long
    for token, piece in enumerate(vocab):
        following = spec.follows.get(piece, "</s>")
        for name, logit in ({following: 50.0} if isinstance(following, str) else following).items():
            output[vocab.index(name), token] = logit * scale
    tensors = {"token_embd.weight": embedding, "output.weight": output, "output_norm.weight": _ones(n_embd)}
    return tensors | {f"blk.0.{name}.weight": data for name, data in _layer(spec, n_embd).items()}


def _layer(spec: Scripted, n_embd: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(7)

    def matrix(rows: int, cols: int) -> NDArray[np.float32]:
        weights = random.normal(0, 0.2, (rows, cols)) if spec.random_layers else np.zeros((rows, cols))
        return weights.astype(np.float32)

    attention = {name: matrix(n_embd, n_embd) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    feed_forward = {"ffn_gate": matrix(32, n_embd), "ffn_up": matrix(32, n_embd), "ffn_down": matrix(n_embd, 32)}
    return {
        "attn_norm": _ones(n_embd),
        "ffn_norm": _ones(n_embd),
        **attention,
        **(_experts(spec.n_expert, n_embd) if spec.n_expert else feed_forward),
    }


def _experts(n_expert: int, n_embd: int) -> dict[str, NDArray[np.float32]]:
    router = np.random.default_rng(8).normal(0, 0.2, (n_expert, n_embd)).astype(np.float32)
    shapes = {"gate": (32, n_embd), "up": (32, n_embd), "down": (n_embd, 32)}
    stacks = {f"ffn_{name}_exps": np.zeros((n_expert, *shape), np.float32) for name, shape in shapes.items()}
    return {"ffn_gate_inp": router, **stacks}


def _ones(n: int) -> NDArray[np.float32]:
    return np.ones(n, np.float32)
