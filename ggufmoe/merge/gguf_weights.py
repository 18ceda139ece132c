"""The model in a GGUF file as a forward pass reads it: dequantized, with its family's names and order of rows.

Owns the way back from a GGUF file's keys and tensors to a configuration. What the family cannot express of the file is
an error: a key or a tensor that is not understood might change what llama.cpp computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import ArchitectureError, GGUFError, TensorMismatchError
from ggufmoe.families import all_families
from ggufmoe.families.family import Family, TensorRule
from ggufmoe.families.model_config import ModelConfig, RopeScaling
from ggufmoe.gguf.header import without_leading_ones
from ggufmoe.gguf.hyper import TypedMetadata
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.names import OUTPUT, TOKEN_EMBEDDING, is_rope_table, without_layer
from ggufmoe.gguf.stored_rows import GGUFRows
from ggufmoe.gguf.upstream import MODEL_TENSOR, TENSOR_NAMES, Keys
from ggufmoe.native import quantizing
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.source_tensor import Dtype, SourceTensor
from ggufmoe.weights.views import Computed, PickedColumns, PickedRows, ReorderedRows

_ROPE_THETA = 10000.0
"""What llama.cpp takes where a file states none."""

Stored = Mapping[str, tuple[GGUFRows, ...]]
"""The matrices of each tensor of a GGUF file by its name: of a stack one for each expert."""


class DequantizedRows:
    """The rows of a matrix or vector of a GGUF file, of any type, as float32."""

    dtype = Dtype.F32

    def __init__(self, name: str, rows: GGUFRows) -> None:
        self.name = name
        self.shape = rows.shape
        self._rows = rows

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        out[...] = quantizing.widened(self._rows.type, self._rows.read(start, stop), self._rows.n_cols)


class GGUFWeights:
    """The model of a GGUF file: ``ModelWeights``.

    Raises ArchitectureError for a model of a family whose files are not read back, GGUFError and TensorMismatchError
    for a key or a tensor that is missing, or that the family does not have.
    """

    def __init__(self, header: ModelHeader, stored: Stored) -> None:
        path = header.paths[0]
        family = _family(path, header, stored)
        self.config = _config(path, header, family, stored)
        self.n_bytes = sum(rows.n_bytes for matrices in stored.values() for rows in matrices)
        """Bytes of all tensors as they are stored."""
        self.tensors: Mapping[str, SourceTensor] = dict(_tensors(path, family, self.config, stored))


def _family(path: Path, header: ModelHeader, stored: Stored) -> Family:
    """The family whose tensors the file has."""
    readable = [family for family in all_families() if family.stored_values is not None]
    alike = [family for family in readable if family.gguf_arch == header.hyper.architecture]
    if not alike:
        known = ", ".join(family.architecture for family in readable)
        raise ArchitectureError(
            f"{path}: the states of {header.hyper.architecture} files cannot be computed; they are for {known}"
        )
    there = {without_layer(name) for name in stored if not is_rope_table(name)}
    family = min(alike, key=lambda one: len(_unknown(one, there)))
    if left := _unknown(family, there):
        raise ArchitectureError(
            f"{path} has {min(left)}, which no {family.architecture} has; its states cannot be computed"
        )
    return family


def _unknown(family: Family, names: set[str]) -> set[str]:
    """Those of the names of a layer's tensors that the family does not have."""
    return names - {without_layer(rule.gguf_name()) for rule in family.tensors}


def _config(path: Path, header: ModelHeader, family: Family, stored: Stored) -> ModelConfig:
    typed = TypedMetadata(header.metadata)

    def whole(key: str) -> int:
        return int(_stated(path, family, key, typed.whole(_spelt(key, family))))

    assert family.stored_values is not None, "_family gives families whose files are read back"
    n_embd, n_head = whole(Keys.LLM.EMBEDDING_LENGTH), whole(Keys.Attention.HEAD_COUNT)
    head_dim = typed.whole(_spelt(Keys.Attention.KEY_LENGTH, family))
    hyper = header.hyper
    config = ModelConfig(
        architecture=family.architecture,
        n_layer=whole(Keys.LLM.BLOCK_COUNT),
        n_embd=n_embd,
        n_ff=whole(Keys.LLM.FEED_FORWARD_LENGTH),
        n_head=n_head,
        n_head_kv=typed.whole(_spelt(Keys.Attention.HEAD_COUNT_KV, family)) or n_head,
        head_dim=head_dim or n_embd // n_head,
        n_vocab=_one(path, TOKEN_EMBEDDING, stored).n_rows,
        n_ctx=whole(Keys.LLM.CONTEXT_LENGTH),
        rms_norm_eps=_stated(path, family, Keys.Attention.LAYERNORM_RMS_EPS, hyper.rms_norm_eps),
        rope_theta=hyper.rope_theta or _ROPE_THETA,
        rope_scaling=_rope_scaling(path, header, stored),
        tie_embeddings=OUTPUT not in stored,
        n_expert=hyper.n_expert,
        n_expert_used=whole(Keys.LLM.EXPERT_USED_COUNT) if hyper.n_expert else 0,
        sliding_window=hyper.unapplied_window or hyper.sliding_window,
        values={name: whole(key) for name, key in family.stored_values.items()},
        raw={} if head_dim is None else {"head_dim": head_dim},
    )
    _check_expressed(path, header, family.metadata(config))
    return config


def _spelt(key: str, family: Family) -> str:
    return key.format(arch=family.gguf_arch)


def _stated(path: Path, family: Family, key: str, value: Any) -> Any:
    if not value:
        raise GGUFError(f"{path}: {_spelt(key, family)} is missing, or no number; is this a whole model?")
    return value


def _rope_scaling(path: Path, header: ModelHeader, stored: Stored) -> RopeScaling:
    hyper = header.hyper
    kind = hyper.rope_scaling or "none"
    if tables := [name for name in stored if is_rope_table(name)]:
        if tables != [f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"] or kind != "none":
            raise ArchitectureError(f"{path}: its rope scaling ({kind}, {tables[0]}) cannot be computed")
        factors = DequantizedRows(tables[0], _one(path, tables[0], stored))
        return RopeScaling("llama3", factors=tuple(map(float, read_f32(factors)[0])))
    if kind not in ("none", "linear"):
        raise ArchitectureError(f"{path}: its rope scaling ({kind}) cannot be computed")
    return RopeScaling(kind, {} if kind == "none" else {"factor": hyper.rope_scaling_factor or 1.0})


def _check_expressed(path: Path, header: ModelHeader, written: Mapping[str, Any]) -> None:
    """Raise GGUFError for a key of the architecture that the configuration does not give, or gives otherwise."""
    for key, found in header.metadata.items():
        if not key.startswith(f"{header.hyper.architecture}."):
            continue
        if key not in written:
            raise GGUFError(f"{path}: {key} is {found.value!r:.40}, which its states cannot be computed with")
        if found.value != written[key].value:
            raise GGUFError(f"{path}: {key} is {found.value!r:.40}, expected {written[key].value!r:.40}")


def _one(path: Path, name: str, stored: Stored) -> GGUFRows:
    if name not in stored:
        raise TensorMismatchError(f"{path}: {name} is missing; is this a whole model?")
    return stored[name][0]


def _tensors(path: Path, family: Family, config: ModelConfig, stored: Stored) -> Iterator[tuple[str, SourceTensor]]:
    used = set()
    for rule, layer, expert in family.instances(config):
        name = rule.gguf_name(layer)
        if name not in stored and rule.optional(config):
            continue
        _one(path, name, stored)
        used.add(name)
        matrices, shape = stored[name], without_leading_ones(rule.shape(config))
        n_matrices = config.n_expert if rule.is_per_expert else 1
        if len(matrices) != n_matrices or any(rows.shape != shape for rows in matrices):
            found = f"{len(matrices)} of {' x '.join(map(str, matrices[0].shape))}"
            raise TensorMismatchError(
                f"{path}: {name} is {found}, expected {n_matrices} of {' x '.join(map(str, shape))}"
            )
        if not quantizing.can_widen(matrices[expert].type):
            raise GGUFError(f"{path}: {name} is {matrices[expert].type.name}, which cannot be read as numbers")
        yield rule.name(layer, expert), _as_in_checkpoints(rule, matrices[expert], config, rule.name(layer, expert))
    if left := sorted(name for name in stored if name not in used and not is_rope_table(name)):
        raise TensorMismatchError(f"{path}: {left[0]} is left over; the file says {config.n_layer} layers")


def _as_in_checkpoints(rule: TensorRule, rows: GGUFRows, config: ModelConfig, name: str) -> SourceTensor:
    """A tensor with the rule's transform undone, which may put rows, or the values of a vector, in another order."""
    stored = DequantizedRows(name, rows)
    turned = rule.transform(stored, config)
    if turned is stored:
        return stored
    if isinstance(turned, ReorderedRows):
        return PickedRows(stored, np.argsort([turned.source_row(row) for row in range(rows.n_rows)]))
    assert isinstance(turned, PickedColumns), "of the families whose files are read back none changes values"
    order = read_f32(rule.transform(Computed(name, range(rows.n_cols)), config))[0]
    return PickedColumns(stored, np.argsort(order))
