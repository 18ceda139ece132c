"""Tiny checkpoints of any family, in any of its layouts, with seeded random weights.

The weights depend only on the seed and on each tensor's name in a model source: checkpoints of one configuration in
different layouts hold the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.config import parse_config
from ggufmoe.checkpoint.layouts import TensorPiece, pieces
from ggufmoe.families import family_of
from tests import tiny, tiny_tokenizers


def config_json(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    """A config.json of tiny sizes; ``keys`` are put in, and a value of ``...`` removes one."""
    begin, end = tiny_tokenizers.special_ids("spm")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tiny_tokenizers.vocabulary_size("spm"),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "bos_token_id": begin,
        "eos_token_id": end,
    }
    return {key: value for key, value in (config | keys).items() if value is not ...}


def weights(config: Mapping[str, Any], *, seed: int = 0, layout: str = "classic") -> dict[str, NDArray[Any]]:
    """Every tensor that a checkpoint must have, by its name in a model source, as bits of BF16."""
    return {piece.name: _random(seed, piece) for piece in _pieces(config, layout)}


def make_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    *,
    layout: str = "classic",
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """Write a checkpoint in BF16 with the tokenizer of ``tests.tiny``; returns its directory."""
    stored: dict[str, NDArray[Any]] = {}
    for piece in _pieces(config, layout):
        whole = stored.setdefault(piece.stored, np.zeros(piece.stored_shape, np.uint16))
        _fill(whole, piece, _random(seed, piece))
    directory.mkdir(parents=True, exist_ok=True)
    tiny.write_shards(directory, {name: ("BF16", data) for name, data in stored.items()}, None)
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tiny.write_tokenizer(directory, "spm", chat_template)
    return directory


def add_tensors(directory: Path, *names: str) -> None:
    """Store further tensors, small ones of zeros, beside those of a checkpoint."""
    (stored,) = directory.glob("*.safetensors")
    stored.rename(directory / "model-00001-of-00002.safetensors")
    tensors = {name: ("BF16", np.zeros((2, 2), np.uint16)) for name in names}
    tiny.write_safetensors(directory / "model-00002-of-00002.safetensors", tensors)


def _pieces(config: Mapping[str, Any], layout: str) -> Iterable[TensorPiece]:
    model = parse_config(Path("config.json"), config)
    return pieces(model, next(one for one in family_of(model).layouts if one.name == layout))


def _random(seed: int, piece: TensorPiece) -> NDArray[Any]:
    values = tiny.random_values(seed, piece.name, piece.shape)
    if piece.name.endswith("bias"):
        values = values - np.float32(1)
    return tiny.stored_bits(values, "BF16")


def _fill(whole: NDArray[Any], piece: TensorPiece, data: NDArray[Any]) -> None:
    if len(piece.stored_shape) == 1:
        whole[...] = data
        return
    rows = whole.swapaxes(-1, -2) if piece.transposed else whole
    n_rows = int(np.prod(piece.shape[:-1]))
    places = piece.first_row + piece.step * np.arange(n_rows)
    if rows.ndim == 2:
        rows[places] = data.reshape(n_rows, -1)
        return
    rows[places // rows.shape[-2], places % rows.shape[-2]] = data.reshape(n_rows, -1)
