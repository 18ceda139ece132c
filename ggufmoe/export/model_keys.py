"""Every metadata key of a GGUF file but the tokenizer's, in the order of llama.cpp's converter.

The hyper-parameters come from the model's family; this module adds what the file says about itself: name
and origin, size, recommended sampling, file type and the importance matrix that was used.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_optional
from ggufmoe.checkpoint.source import ModelSource, Provenance
from ggufmoe.export.model_tensors import ModelTensor
from ggufmoe.families import family_of
from ggufmoe.families.config_reader import is_float32
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.key_tables import SAMPLING_KEYS
from ggufmoe.gguf.names import is_expert_stack
from ggufmoe.gguf.own_keys import MIX
from ggufmoe.gguf.types import ValueType
from ggufmoe.gguf.upstream import QUANTIZATION_VERSION, Keys
from ggufmoe.gguf.values import text, texts, u32
from ggufmoe.quant.chosen_mix import ChosenMix
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.importances import Imatrix

_LOG = logging.getLogger("ggufmoe")

_PHI3 = re.compile(r"(phi)-?(?=3)", re.IGNORECASE)
_PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}

_MAX_OVERRIDE_BYTES = 127
"""llama-quantize cuts a string that it adds to a file's metadata to so many bytes."""


def model_metadata(
    source: ModelSource, tensors: Sequence[ModelTensor], file_type: FileType, tokenizer: Mapping[str, GGUFValue]
) -> dict[str, GGUFValue]:
    """All keys of a model's file: ``general.*``, the keys of its family and, last, the keys of ``tokenizer``.

    Each part of the model's configuration that no key can express is logged as a warning.
    """
    family = family_of(source.config)
    for clause in family.unexpressed(source.config):
        _LOG.warning("%s: %s", source.provenance.name, clause)
    return {
        Keys.General.ARCHITECTURE: text(family.gguf_arch),
        Keys.General.TYPE: text("model"),
        **sampling_metadata(source.tokenizer_dir),
        **_provenance_metadata(source.provenance, size_label(tensors)),
        Keys.General.NAME: text(_loadable_name(source.provenance.name, tokenizer)),
        **family.metadata(source.config),
        Keys.General.FILE_TYPE: u32(file_type.id),
        Keys.General.QUANTIZATION_VERSION: u32(QUANTIZATION_VERSION),
        **{key: text(value) for key, value in source.provenance.extra.items()},
        **tokenizer,
    }


def _loadable_name(name: str, tokenizer: Mapping[str, GGUFValue]) -> str:
    """The name of the model, without ``phi-3`` and ``phi3`` where the vocabulary is not Phi-3's.

    In a file of such a name llama.cpp looks for Phi-3's tokens, and without them does not load it. Source:
    ``load`` of ``src/llama-vocab.cpp`` at the pinned llama.cpp.
    """
    listed = tokenizer.get(Keys.Tokenizer.LIST)
    if not _PHI3.search(name) or listed is None or set(listed.value) >= _PHI3_TOKENS:
        return name
    changed = _PHI3.sub(r"\1 ", name)
    _LOG.warning(
        "%s is called %r in the file: llama.cpp takes a name with phi3 for Phi-3's, and loads none without its tokens",
        *(name, changed),
    )
    return changed


def _provenance_metadata(provenance: Provenance, size: str) -> dict[str, GGUFValue]:
    """The keys of name, size, license, base models, tags and languages; what is unknown has no key."""
    keys: dict[str, GGUFValue | None] = {
        Keys.General.NAME: text(provenance.name),
        Keys.General.SIZE_LABEL: text(size),
        Keys.General.LICENSE: _known(provenance.license),
        Keys.General.LICENSE_NAME: _known(provenance.license_name),
        Keys.General.LICENSE_LINK: _known(provenance.license_link),
    }
    if provenance.base_models:
        keys[Keys.General.BASE_MODEL_COUNT] = u32(len(provenance.base_models))
    for i, base in enumerate(provenance.base_models):
        keys[Keys.General.BASE_MODEL_NAME.format(id=i)] = _known(base.name)
        keys[Keys.General.BASE_MODEL_VERSION.format(id=i)] = _known(base.version)
        keys[Keys.General.BASE_MODEL_ORGANIZATION.format(id=i)] = _known(base.organization)
        keys[Keys.General.BASE_MODEL_REPO_URL.format(id=i)] = _known(base.repo_url)
    keys[Keys.General.TAGS] = texts(provenance.tags) if provenance.tags else None
    keys[Keys.General.LANGUAGES] = texts(provenance.languages) if provenance.languages else None
    return {key: value for key, value in keys.items() if value is not None}


def _known(value: str | None) -> GGUFValue | None:
    return text(value) if value else None


def size_label(tensors: Iterable[ModelTensor]) -> str:
    """The size class of a model: ``2x7.2B`` for a mixture of experts, ``7.2B`` for a dense model.

    The number behind the x counts the weights of one expert and all that the experts share. Source: ``size_label`` of
    ``gguf-py/gguf/utility.py``.
    """
    shared = expert = n_expert = 0
    for tensor in tensors:
        n_weights = math.prod(tensor.shape)
        if is_expert_stack(tensor.name) and len(tensor.shape) > 2:  # their biases count as shared
            n_expert = tensor.shape[0]
            expert += n_weights // n_expert
        else:
            shared += n_weights
    size = _rounded(shared + expert)
    return f"{n_expert}x{size}" if n_expert else size


def _rounded(n_weights: int) -> str:
    """A number of weights with at least two digits and a unit: 12M, 7.2B."""
    scale, letter = next((s for s in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if n_weights > s[0]), (1e3, "K"))
    scaled = n_weights / scale
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{letter}"


_NOT_IN_GGUF: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings"), (None, [], ())),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "penalty_alpha"), (None, 0)),
    **dict.fromkeys(("no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (None, 0)),
    **dict.fromkeys(("num_beams", "typical_p", "guidance_scale"), (None, 1)),
}
"""Keys of generation_config.json that change answers and have no key in GGUF, with the values that change nothing."""


def sampling_metadata(directory: Path) -> dict[str, GGUFValue]:
    """The sampling that the model's authors recommend in generation_config.json, as ``general.sampling.*``.

    No keys if the file is absent or cannot be read, as in llama.cpp's converter.
    """
    given = read_optional(directory / "generation_config.json", allow_broken=True)
    if left_out := [key for key, neutral in _NOT_IN_GGUF.items() if given.get(key, neutral[0]) not in neutral]:
        _LOG.warning(
            "%s sets %s, which a GGUF file cannot recommend; give what matters when you run the model",
            *(directory / "generation_config.json", ", ".join(left_out)),
        )
    keys: dict[str, GGUFValue] = {}
    for setting in SAMPLING_KEYS:
        value: Any = given.get(setting.generation_config)
        if not is_float32(value):
            continue
        whole = setting.type is ValueType.INT32
        if whole and not (value == int(value) and abs(value) < 2**31):
            continue
        keys[setting.key] = GGUFValue(setting.type, int(value) if whole else float(value), None)
    return keys


def imatrix_metadata(imatrix: Imatrix) -> dict[str, GGUFValue]:
    """The ``quantize.imatrix.*`` keys that llama-quantize writes."""
    keys = {"quantize.imatrix.file": text(_cut(str(imatrix.path)))}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = text(_cut(imatrix.datasets[0]))
    keys["quantize.imatrix.entries_count"] = u32(len(imatrix.names))
    if imatrix.chunk_count > 0:
        keys["quantize.imatrix.chunks_count"] = u32(imatrix.chunk_count)
    return keys


def mix_metadata(mix: ChosenMix | None) -> dict[str, GGUFValue]:
    """The key that says how the types of a file were chosen; none for the mix of a file type."""
    return {} if mix is None else {MIX: text(json.dumps(mix.to_dict()))}


def _cut(value: str) -> str:
    return value.encode("utf-8", "replace")[:_MAX_OVERRIDE_BYTES].decode("utf-8", "ignore")
