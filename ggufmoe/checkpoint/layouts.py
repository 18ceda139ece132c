"""Where a checkpoint stores each tensor of a model, and whether it holds all of them in the right shape.

A family says which tensors its models have and in which layouts they are stored (``families.family``). In a model
source every tensor has one name, whatever the layout: in a fused one it is a range of rows of a stored tensor, or every
second row, and may have to be transposed.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from numpy.typing import NDArray

from ggufmoe.checkpoint.config import quantization_method
from ggufmoe.checkpoint.foreign_weights import packed_among, way_out_of, what_made
from ggufmoe.checkpoint.fp8_blocks import STORED_DTYPE, BlockScaledRows, scales_among, scales_shape, stated_blocks
from ggufmoe.checkpoint.mxfp4 import BLOCK_WEIGHTS, CODE_BYTES, MXFP4Rows
from ggufmoe.checkpoint.safetensors import TensorEntry, TensorFile
from ggufmoe.errors import CheckpointError, TensorMismatchError
from ggufmoe.families import family_of
from ggufmoe.families.family import EXPERT, LAYER, Family, FusedTensor, Shape, StoredLayout, TensorRule, numbered
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.sizes import counted
from ggufmoe.weights.byte_ranges import ByteRange
from ggufmoe.weights.dtypes import row_count
from ggufmoe.weights.source_tensor import Dtype, SourceTensor
from ggufmoe.weights.views import SpacedRows, Transposed

_LOG = logging.getLogger("ggufmoe")

_HARMLESS = re.compile(r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attention\.masked_bias|attention\.bias)")
"""Names of buffers of old checkpoints, which are computed and not read."""
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing insert into names, at any depth."""
_EMBEDDING = "embed_tokens.weight"
_INNER = re.compile(r"(embed_tokens|layers|norm|embedding_norm)\.")
_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A tensor of a model and where it is stored: in the tensor ``stored``, whole or a part of it.

    A part is the rows ``first_row``, ``first_row + step``, ... of the stored tensor, or, where that is ``transposed``,
    of the stack of its matrices with rows and columns exchanged. With ``scales``, the stored tensor has codes of MXFP4
    in place of columns (``families.family.FusedTensor``).
    """

    name: str
    shape: Shape
    stored: str
    stored_shape: Shape
    first_row: int = 0
    step: int = 1
    transposed: bool = False
    scales: str | None = None


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A SourceTensor whose rows are a range of rows of a tensor in a safetensors file, from byte ``begin`` on."""

    name: str
    dtype: Dtype
    shape: Shape
    file: TensorFile
    begin: int

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, shape (stop - start, n_cols) and dtype ``self.dtype.numpy``, with rows [start, stop).

        Raises SafetensorsError if the file has become shorter or cannot be read any more.
        """
        n_cols = self.shape[-1]
        if not 0 <= start <= stop <= row_count(self.shape):
            raise ValueError(f"{self.name}: rows {start} to {stop} are not in a tensor of shape {self.shape}")
        if out.shape != (stop - start, n_cols) or out.dtype != self.dtype.numpy or not out.flags.c_contiguous:
            raise ValueError(f"{self.name}: out must be contiguous {(stop - start, n_cols)} {self.dtype.numpy}")
        if out.size:
            begin = self.begin + start * self.dtype.row_bytes(n_cols)
            self.file.read_into(begin, out.data.cast("B"))

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        row_bytes = self.dtype.row_bytes(self.shape[-1])
        yield ByteRange(self.file.bytes, self.begin + start * row_bytes, self.begin + stop * row_bytes)


def pieces(config: ModelConfig, layout: StoredLayout, stored: Container[str] = ()) -> Iterator[TensorPiece]:
    """Yield every tensor of a model of this configuration, in the order of its family.

    Of tensors that may be missing, and of other spellings of names, those are taken that ``stored`` has. A layer
    that may be missing as a whole is left out where ``stored`` lacks its first tensor.
    """
    family = family_of(config)
    first = next(rule for rule in family.tensors if rule.is_per_layer)
    held = {part: fused for fused in layout.fused for part in fused.parts}
    for rule, layer, expert in family.instances(config):
        if family.may_lack(config, layer) and first.name(layer) not in stored:
            continue
        fused = held.get(rule.hf)
        patterns = (layout.renamed.get(rule.hf, rule.hf), *rule.spellings) if fused is None else (fused.stored,)
        names = [numbered(pattern, layer, expert) for pattern in patterns]
        found = next((name for name in names if name in stored), None)
        if found is None and rule.optional(config):
            continue
        piece = TensorPiece(rule.name(layer, expert), rule.shape(config), found or names[0], rule.shape(config))
        yield piece if fused is None else _within(fused, piece, rule, config, layer, expert)


def _within(
    fused: FusedTensor, piece: TensorPiece, rule: TensorRule, config: ModelConfig, layer: int, expert: int
) -> TensorPiece:
    """The piece as a part of a fused tensor: which rows it has there."""
    shapes = {other.hf: other.shape(config) for other in family_of(config).tensors if other.hf in fused.parts}
    n_rows = [row_count(shapes[part]) for part in fused.parts]
    place, n_cols = fused.parts.index(rule.hf), piece.shape[-1]
    matrix: Shape = (n_cols, sum(n_rows)) if fused.transposed else (sum(n_rows), n_cols)
    if fused.scales is not None:
        if n_cols % BLOCK_WEIGHTS:
            raise TensorMismatchError(f"{piece.stored}: rows of {n_cols} weights do not fill blocks of {BLOCK_WEIGHTS}")
        matrix = (sum(n_rows), n_cols // BLOCK_WEIGHTS, CODE_BYTES)
    return replace(
        piece,
        stored_shape=(config.n_expert, *matrix) if rule.is_per_expert else matrix,
        first_row=expert * sum(n_rows) + (place if fused.interleaved else sum(n_rows[:place])),
        step=len(fused.parts) if fused.interleaved else 1,
        transposed=fused.transposed,
        scales=None if fused.scales is None else numbered(fused.scales, layer, expert),
    )


def find_layout(where: str, family: Family, names: Iterable[str]) -> StoredLayout:
    """Find the layout of a checkpoint from the stored tensor names; the family's first one if no name tells.

    Raises TensorMismatchError, with one tensor of each layout, if there is more than one. ``where`` names the
    checkpoint in the message.
    """
    if len(family.layouts) == 1:
        return family.layouts[0]
    patterns = [_stored_patterns(family, layout) for layout in family.layouts]
    in_layouts = Counter(pattern for stored in patterns for pattern in stored)
    marks = {
        pattern: layout
        for layout, stored in zip(family.layouts, patterns, strict=True)
        for pattern in stored
        if in_layouts[pattern] == 1
    }
    found: dict[int, tuple[StoredLayout, str]] = {}
    for name in names:
        if (layout := marks.get(_pattern_of(name))) is not None:
            found.setdefault(id(layout), (layout, name))
    if len(found) > 1:
        one_of_each = " and ".join(_shown(name) for _, name in list(found.values())[:2])
        raise TensorMismatchError(f"{where} stores its experts in more than one layout ({one_of_each}); save it again")
    return next((layout for layout, _ in found.values()), family.layouts[0])


def _stored_patterns(family: Family, layout: StoredLayout) -> set[str]:
    held = {part for fused in layout.fused for part in fused.parts}
    single = {layout.renamed.get(rule.hf, rule.hf) for rule in family.tensors if rule.hf not in held}
    return single | {fused.stored for fused in layout.fused} | _quantized_patterns(layout)


def _quantized_patterns(layout: StoredLayout) -> set[str]:
    """Patterns of the stored names of quantized weights and their scales."""
    return {name for fused in layout.fused if fused.scales is not None for name in (fused.stored, fused.scales)}


def _pattern_of(name: str) -> str:
    """A name with placeholders in place of its first two numbers, which are those of layer and expert."""
    placeholders = iter((LAYER, EXPERT))
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda number: next(placeholders, number[0]), name)


def is_harmless(name: str) -> bool:
    """Whether a tensor of this name is a buffer that models compute anyway, so that it may be present or absent."""
    return _HARMLESS.fullmatch(name) is not None


def unread(config: ModelConfig, names: Collection[str]) -> list[str]:
    """The stored names but for those of quantized weights that are read: by a layout of the model's family, or with
    scales of blocks, which config.json states."""
    read = {pattern for layout in family_of(config).layouts for pattern in _quantized_patterns(layout)}
    scales = set(scales_among(names, config.raw).values())
    return [name for name, plain in plain_names(names).items() if _pattern_of(plain) not in read and name not in scales]


def is_read_quantization(config: ModelConfig) -> bool:
    """Whether config.json states a quantization that is read here."""
    return quantization_method(config.raw) in family_of(config).quant_methods or stated_blocks(config.raw) is not None


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Stored names to the names of transformers, without the parts that wrappers add.

    The prefix is found from the name of the embedding: ``module.`` (DDP), ``base_model.model.`` (PEFT), ``model.``
    twice, or none if the model was saved without its head. Prefixes are kept if there is not exactly one embedding.
    """
    without = {name: _WRAPPERS.sub("", name) for name in names}
    embeddings = [name for name in without.values() if name == _EMBEDDING or name.endswith("." + _EMBEDDING)]
    if len(embeddings) != 1 or embeddings[0] == f"model.{_EMBEDDING}":
        return without
    inner = embeddings[0].removesuffix(_EMBEDDING)
    outer = inner.removesuffix("model.") if inner == "model." or inner.endswith(".model.") else inner
    return {name: _plain_name(plain, inner, outer) for name, plain in without.items()}


def _plain_name(name: str, inner: str, outer: str) -> str:
    rest = name.removeprefix(inner)
    if name.startswith(inner) and _INNER.match(rest):
        return f"model.{rest}"
    return name.removeprefix(outer)


def arrange(
    where: str, config: ModelConfig, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> dict[str, SourceTensor]:
    """Map the name of every tensor of the model to its rows in the files.

    ``stored`` maps the names in the files, which may have prefixes of wrappers, to file and entry. An
    ``lm_head.weight`` is kept even if the config ties the embeddings, as in llama.cpp's converter
    (``conversion/llama.py``). Raises TensorMismatchError if tensors are missing, left over or wrongly shaped (it names
    up to eight of each kind), and CheckpointError for weights that are not BF16, F16 or F32, nor quantized in a way
    that is read here (``fp8_blocks``, ``mxfp4``).
    """
    if (made := what_made(unread(config, stored))) is not None:
        raise CheckpointError(f"{where} {made}")
    try:
        return _arrange(where, config, _by_plain_name(where, stored))
    except CheckpointError as error:
        method = quantization_method(config.raw)
        if method is None or is_read_quantization(config):
            raise
        raise CheckpointError(
            f"{where}: config.json says that this checkpoint is quantized already ({method!r:.40}); "
            f"use the original one ({error})"
        ) from error


def _arrange(
    where: str, config: ModelConfig, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> dict[str, SourceTensor]:
    family = family_of(config)
    layout = find_layout(where, family, stored)
    # refuses a config of absurd size before a million names are made from it
    n_least = _count(family, config, layout)
    if n_least > 1000 + 10 * len(stored):
        raise TensorMismatchError(
            f"{where} holds {len(stored)} tensors, but a model of its config.json has at least {n_least}"
        )
    stored = _without_skipped(where, family, config, stored)
    scaled = _block_scaled(where, config, stored)
    beside = {one.scales.name for one in scaled.values()}
    stored = {name: found for name, found in stored.items() if name not in beside}
    wanted = list(pieces(config, layout, stored))
    shapes = {piece.stored: piece.stored_shape for piece in wanted}
    scales = {piece.scales: piece.stored_shape[:-1] for piece in wanted if piece.scales is not None}
    quantized = {piece.stored for piece in wanted if piece.scales is not None}
    _check_shapes(where, shapes | scales, stored, read=quantized | scales.keys() | scaled.keys())
    _check_bytes(where, quantized | scales.keys(), stored)
    dtypes = _dtypes(where, shapes.keys() - quantized - scaled.keys(), stored)

    def rows_of(piece: TensorPiece) -> SourceTensor:
        if piece.scales is not None:
            return _quantized_rows(piece, stored[piece.stored], stored[piece.scales])
        if piece.stored in scaled:
            return _scaled_rows(piece, scaled[piece.stored])
        return _rows(piece, *stored[piece.stored], dtypes[piece.stored])

    return {piece.name: rows_of(piece) for piece in wanted}


def _block_scaled(
    where: str, config: ModelConfig, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> dict[str, BlockScaledRows]:
    """The stored tensors that have scales of blocks, which must have the right shapes and dtypes."""
    blocks = stated_blocks(config.raw)
    scales = scales_among(stored, config.raw)
    if blocks is None or not scales:
        return {}
    dtypes = _dtypes(where, set(scales.values()), stored)
    found: dict[str, BlockScaledRows] = {}
    for name, beside in scales.items():
        if name not in stored:
            raise TensorMismatchError(f"{where} holds {_shown(beside)}, but no {_shown(name)}")
        (file, entry), (file_of_scales, its) = stored[name], stored[beside]
        if entry.dtype != STORED_DTYPE or len(entry.shape) < 2:
            raise CheckpointError(
                f"{where}: {_shown(name)} has scales and is {entry.dtype} of shape {list(entry.shape)}, expected a "
                f"matrix of {STORED_DTYPE}"
            )
        block = blocks.size(entry.shape)
        if its.shape != (shape := scales_shape(entry.shape, block)):
            raise TensorMismatchError(
                f"{where}: {_shown(beside)} is {list(its.shape)}, by the blocks of {block[0]} x {block[1]} of "
                f"config.json it should be {list(shape)}; fetch both again"
            )
        rows = StoredRows(beside, dtypes[beside], its.shape, file_of_scales, its.begin)
        found[name] = BlockScaledRows(name, entry.shape, file, entry.begin, rows, block)
    lacking = sorted(name for name, (_, entry) in stored.items() if entry.dtype == STORED_DTYPE and name not in found)
    if lacking:
        raise TensorMismatchError(f"{where} has 8-bit floats without their scales: {_listed(lacking)}; fetch it again")
    _LOG.info("%s: %d tensors of 8-bit floats are read with the scales of their blocks", where, len(found))
    return found


def _count(family: Family, config: ModelConfig, layout: StoredLayout) -> int:
    """How many tensors a checkpoint of this configuration and layout has at least."""
    held = {part: fused.stored for fused in layout.fused for part in fused.parts}
    counts: dict[str, int] = {}
    for rule in family.tensors:
        if not rule.optional(config):
            layers = range(family.n_blocks(config) if rule.is_per_layer else 1)
            n_each = config.n_expert if rule.is_per_expert and rule.hf not in held else 1
            n_layers = sum(rule.where(config, layer) and not family.may_lack(config, layer) for layer in layers)
            counts[held.get(rule.hf, rule.hf)] = n_each * n_layers
    return sum(counts.values())


def _without_skipped(
    where: str, family: Family, config: ModelConfig, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> Mapping[str, tuple[TensorFile, TensorEntry]]:
    """The stored tensors but for those that the family leaves out, which is told."""
    for skipped in family.skipped:
        kept = {name: found for name, found in stored.items() if not skipped.matches(config, name)}
        if len(kept) < len(stored):
            _LOG.warning("%s: leaves out %s: %s", where, counted(len(stored) - len(kept), "tensor"), skipped.why)
        stored = kept
    return stored


def _by_plain_name(
    where: str, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> Mapping[str, tuple[TensorFile, TensorEntry]]:
    plain: dict[str, tuple[TensorFile, TensorEntry]] = {}
    for name, new in plain_names(stored).items():
        if new in plain:
            first = _shown(plain[new][1].name)
            raise TensorMismatchError(f"{where} holds {_shown(new)} twice: as {first} and as {_shown(name)}")
        plain[new] = stored[name]
    return plain


def _rows(piece: TensorPiece, file: TensorFile, entry: TensorEntry, dtype: Dtype) -> SourceTensor:
    if piece.step == 1 and not piece.transposed:
        begin = entry.begin + piece.first_row * dtype.row_bytes(piece.shape[-1])
        return StoredRows(piece.name, dtype, piece.shape, file, begin)
    if not piece.transposed:
        whole = StoredRows(piece.name, dtype, piece.stored_shape, file, entry.begin)
        return SpacedRows(whole, piece.shape, first=piece.first_row, step=piece.step)
    # only the matrix that the piece lies in is transposed
    matrix_rows = piece.stored_shape[-1]
    number, first = divmod(piece.first_row, matrix_rows)
    begin = entry.begin + number * dtype.row_bytes(prod(piece.stored_shape[-2:]))
    matrix = Transposed(StoredRows(piece.name, dtype, piece.stored_shape[-2:], file, begin))
    return SpacedRows(matrix, piece.shape, first=first, step=piece.step)


def _quantized_rows(
    piece: TensorPiece, codes: tuple[TensorFile, TensorEntry], scales: tuple[TensorFile, TensorEntry]
) -> SourceTensor:
    whole = MXFP4Rows(
        piece.name,
        (*piece.stored_shape[:-2], piece.shape[-1]),
        codes=(codes[0], codes[1].begin),
        scales=(scales[0], scales[1].begin),
    )
    return SpacedRows(whole, piece.shape, first=piece.first_row, step=piece.step)


def _scaled_rows(piece: TensorPiece, whole: BlockScaledRows) -> SourceTensor:
    if piece.shape == piece.stored_shape and not piece.transposed:
        return whole
    rows = Transposed(whole) if piece.transposed else whole
    return SpacedRows(rows, piece.shape, first=piece.first_row, step=piece.step)


def _check_shapes(
    where: str,
    wanted: Mapping[str, Shape],
    stored: Mapping[str, tuple[TensorFile, TensorEntry]],
    *,
    read: Collection[str],
) -> None:
    """Raise TensorMismatchError unless ``stored`` has the tensors ``wanted``; ``read`` are quantized ones among them
    that are no sign of a tool whose weights are not read."""
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted and not is_harmless(name)]
    misshaped = [
        f"{name} is {list(stored[name][1].shape)}, by config.json it should be {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name][1].shape != shape
    ]
    found = {"missing": missing, "left over": extra, "wrongly shaped": misshaped}
    faults = [f"{kind}: {_listed(names)}" for kind, names in found.items() if names]
    modules = {name.rpartition(".")[0] for name in wanted}
    of_modules = {
        name: entry.dtype
        for name, (_, entry) in stored.items()
        if name.rpartition(".")[0] in modules and name not in read
    }
    if faults and (packed := packed_among(of_modules)) is not None:  # says more than what is missing
        raise TensorMismatchError(f"{where} {packed} ({'; '.join(faults)})")
    if faults:
        raise TensorMismatchError(f"{where} does not hold the tensors of its config.json; {'; '.join(faults)}")


def _check_bytes(where: str, names: set[str], stored: Mapping[str, tuple[TensorFile, TensorEntry]]) -> None:
    """Raise CheckpointError if tensors that hold bytes of quantized weights have another dtype."""
    odd = [f"{name} ({stored[name][1].dtype})" for name in sorted(names) if stored[name][1].dtype != "U8"]
    if odd:
        raise CheckpointError(f"{where} has quantized weights that are not bytes (U8): {_listed(odd)}; fetch it again")


def _dtypes(where: str, names: set[str], stored: Mapping[str, tuple[TensorFile, TensorEntry]]) -> dict[str, Dtype]:
    known = {dtype.value for dtype in Dtype}
    odd = [f"{name} ({stored[name][1].dtype})" for name in sorted(names) if stored[name][1].dtype not in known]
    if odd:
        raise CheckpointError(
            f"{where} has weights that are not BF16, F16 or F32: {_listed(odd)}; "
            f"{way_out_of(stored[name][1].dtype for name in names if stored[name][1].dtype not in known)}"
        )
    return {name: Dtype(stored[name][1].dtype) for name in names}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(_shown, names[:_NAMES_SHOWN])) + more


def _shown(name: str) -> str:
    return name[:200] if name.isprintable() else f"{name!r:.200}"
