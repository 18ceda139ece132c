"""How a GGUF file is laid out: order and alignment of tensors, shards, and which tensors an importance matrix weights.

Shared by exports of checkpoints and by quantizations of GGUF files; both give a ``WritePlan``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ggufmoe.errors import GGUFError, OptionError
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, read_header
from ggufmoe.gguf.model import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS
from ggufmoe.gguf.names import OUTPUT
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT
from ggufmoe.quant.chosen_mix import ChosenMix
from ggufmoe.quant.filetypes import IGNORES_IMATRIX
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.mixes import TOKEN_EMBEDDINGS
from ggufmoe.sizes import counted
from ggufmoe.writing.plan import PlannedFile, PlannedTensor, WritePlan, plan_file, split_tensors

_LOG = logging.getLogger("ggufmoe")

_MAX_FILES = 99_999


def plan_gguf(
    output: Path,
    metadata: Mapping[str, GGUFValue],
    tensors: Sequence[PlannedTensor],
    *,
    input_paths: Sequence[Path],
    file_type: str,
    imatrix: Imatrix | None,
    split_max_bytes: int | None,
    mix: ChosenMix | None = None,
) -> WritePlan:
    """Plan a GGUF file, or its shards of at most ``split_max_bytes`` of tensors each.

    Raises OptionError if there are more shards than can be named.
    """
    files = lay_out_files(output, metadata, tensors, split_max_bytes)
    inputs = (*input_paths, *([imatrix.path] if imatrix else []))
    return WritePlan(output, files, inputs, file_type, reads_back_as_gguf, imatrix=imatrix, mix=mix)


def lay_out_files(
    output: Path, metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor], split_max_bytes: int | None
) -> tuple[PlannedFile, ...]:
    """Distribute tensors over files and give each its offset; the metadata goes into the first.

    Shards are cut and marked as llama.cpp's gguf-split does: a shard takes tensors, in order, until the next one would
    take their padded sizes beyond the limit. If all fits into one file, it is not marked at all. Raises OptionError if
    there are more shards than can be named.
    """
    groups = split_tensors(tensors, split_max_bytes, DEFAULT_ALIGNMENT)
    n_files = len(groups)
    if n_files > _MAX_FILES:
        raise OptionError(
            f"the split size makes {n_files} files, at most {_MAX_FILES} can be named; give a larger size"
        )
    if n_files == 1:
        return (_gguf_file(output, metadata, tensors),)
    stem = output.name.removesuffix(".gguf")
    files: list[PlannedFile] = []
    for number, group in enumerate(groups):
        keys = dict(metadata) if number == 0 else {}
        keys[SPLIT_NUMBER] = GGUFValue(ValueType.UINT16, number, None)
        keys[SPLIT_COUNT] = GGUFValue(ValueType.UINT16, n_files, None)
        keys[SPLIT_TENSORS] = GGUFValue(ValueType.INT32, len(tensors), None)
        path = output.with_name(f"{stem}-{number + 1:05d}-of-{n_files:05d}.gguf")
        files.append(_gguf_file(path, keys, group))
    return tuple(files)


def _gguf_file(path: Path, metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor]) -> PlannedFile:
    def header(placed: Sequence[PlannedTensor]) -> bytes:
        infos = [TensorInfo(tensor.name, tensor.type, tensor.shape, tensor.offset, tensor.n_bytes) for tensor in placed]
        return encode_header(metadata, infos, DEFAULT_ALIGNMENT)

    return plan_file(path, tensors, header, DEFAULT_ALIGNMENT)


def reads_back_as_gguf(file: PlannedFile, path: Path) -> bool:
    """Whether the header of the GGUF file at ``path`` is the planned one."""
    try:
        header = read_header(path)
    except GGUFError:
        return False
    found = [(t.name, t.type, t.shape, header.data_offset + t.offset, t.n_bytes) for t in header.tensors]
    return found == [(t.name, t.type, t.shape, t.offset, t.n_bytes) for t in file.tensors]


def fit_imatrix(imatrix: Imatrix | None, shapes: Mapping[str, Sequence[int]]) -> frozenset[str] | None:
    """Names of the tensors that the importance matrix has weights for; None without an importance matrix.

    Experts that it never saw are logged. Raises ImatrixError if it is of another model.
    """
    if imatrix is None:
        return None
    weighted = imatrix.fit(shapes)
    if coverage := imatrix.coverage:
        name, experts = next(iter(coverage.items()))
        _LOG.warning(
            "%s never saw some experts (%d tensors, for example expert %d of %s); all their columns count alike",
            imatrix.path, len(coverage), experts[0], name,
        )  # fmt: skip
    return weighted


def warn_of_missing_importances(
    imatrix: Imatrix | None, types: Mapping[str, GGMLType], weighted: Collection[str] | None
) -> None:
    """Log quantized tensors that the importance matrix lacks, for example because it is of a smaller model.

    Embeddings and output are not counted: llama-imatrix does not measure them unless it is asked to.
    """
    if imatrix is None or weighted is None:
        return
    unmeasured = {*TOKEN_EMBEDDINGS, OUTPUT, *weighted}
    missing = [
        name
        for name, kind in types.items()
        if kind.is_quantized and kind not in IGNORES_IMATRIX and name not in unmeasured
    ]
    if missing:
        _LOG.warning(
            "%s has nothing for %s (for example %s), quantized as without it",
            imatrix.path, counted(len(missing), "quantized tensor"), missing[0],
        )  # fmt: skip
