"""Tables of metadata keys that several packages need: recommended sampling, and special tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ggufmoe.gguf.types import ValueType
from ggufmoe.gguf.upstream import Keys

SAMPLING_PREFIX = "general.sampling."


@dataclass(frozen=True)
class SamplingKey:
    """One sampling setting that a file can recommend."""

    key: str
    type: ValueType
    generation_config: str
    """Its key in generation_config.json."""
    option: str
    """Its field in ``SamplingOptions``."""


_INT, _FLOAT, _General = ValueType.INT32, ValueType.FLOAT32, Keys.General
SAMPLING_KEYS = (
    SamplingKey(_General.SAMPLING_TOP_K, _INT, "top_k", "top_k"),
    SamplingKey(_General.SAMPLING_TOP_P, _FLOAT, "top_p", "top_p"),
    SamplingKey(_General.SAMPLING_MIN_P, _FLOAT, "min_p", "min_p"),
    SamplingKey(_General.SAMPLING_XTC_PROBABILITY, _FLOAT, "xtc_probability", "xtc_probability"),
    SamplingKey(_General.SAMPLING_XTC_THRESHOLD, _FLOAT, "xtc_threshold", "xtc_threshold"),
    SamplingKey(_General.SAMPLING_TEMP, _FLOAT, "temperature", "temperature"),
    SamplingKey(_General.SAMPLING_PENALTY_LAST_N, _INT, "penalty_last_n", "repeat_last_n"),
    SamplingKey(_General.SAMPLING_PENALTY_REPEAT, _FLOAT, "repetition_penalty", "repeat_penalty"),
    SamplingKey(_General.SAMPLING_MIROSTAT, _INT, "mirostat", "mirostat"),
    SamplingKey(_General.SAMPLING_MIROSTAT_TAU, _FLOAT, "mirostat_tau", "mirostat_ent"),
    SamplingKey(_General.SAMPLING_MIROSTAT_ETA, _FLOAT, "mirostat_eta", "mirostat_lr"),
)
"""In the order in which llama.cpp's converter writes them."""

TOKEN_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
"""The key of the id of each special token, by its name in Hugging Face's configurations."""


def template_name(name: str) -> str:
    """The name of a chat template as it stands in the key of a file: other characters become underscores (gguf-py)."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
