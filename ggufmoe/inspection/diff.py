"""How two model files differ: metadata, tensors, types, shapes, and how far the values of each tensor are apart.

Tensors are matched by name, so shards and their order do not matter. Bytes are compared first; only where they differ
are values computed, tile by tile, so memory is a few MB for each thread. Nothing is printed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.header import GGUFValue, TensorInfo
from ggufmoe.gguf.model import SPLIT_KEYS, ModelHeader
from ggufmoe.gguf.names import part_of
from ggufmoe.gguf.stored_rows import GGUFRows, OpenModel
from ggufmoe.native.quantizing import can_widen, widened
from ggufmoe.work import CancelFlag, OnProgress, Work

_TILE_WEIGHTS = 2**18

Verdict = Literal["same", "values", "type", "shape", "added", "removed", "unread"]
"""same: type, shape and bytes; values: only the bytes differ; type, shape: these do; added: only the second file has
it; removed: only the first; unread: of one type and shape, its bytes were not looked at."""


@dataclass(frozen=True)
class KeyDifference:
    """A metadata key whose values differ; None for a file that lacks it.

    ``n_items`` and ``first_item``, for arrays of the same length: how many items differ, and the index of the first.
    """

    key: str
    before: GGUFValue | None
    after: GGUFValue | None
    n_items: int | None = None
    first_item: int | None = None


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in both files; None for a file that lacks it.

    ``relative_error`` is the root mean square of the differences divided by that of the first file's values,
    ``max_difference`` the largest difference; both are None where values were not, or cannot be, compared. Where the
    first file's values are all zero the error is infinite; NaN in either file makes both NaN.
    """

    name: str
    verdict: Verdict
    before: TensorInfo | None
    after: TensorInfo | None
    relative_error: float | None = None
    max_difference: float | None = None
    error_square: float = 0.0
    """Sum of the squares of the differences."""
    square: float = 0.0
    """Sum of the squares of the first file's values, where values were compared."""

    @property
    def n_weights(self) -> int:
        """Number of weights in the file that has it."""
        info = self.before or self.after
        assert info is not None, "one of the files has it"
        return info.n_elements


@dataclass(frozen=True)
class PartDifference:
    """Tensors of one part of the model (experts, attention, ...) that both files have, together."""

    name: str
    n_tensors: int
    n_different: int
    bits_before: float
    bits_after: float
    relative_error: float | None


@dataclass(frozen=True)
class ModelDifference:
    """The result of ``diff_models``. Tensors in the first file's order, then those that only the second file has."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    keys: tuple[KeyDifference, ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def is_same(self) -> bool:
        """Whether no difference was found."""
        return not self.keys and not self.different

    @property
    def different(self) -> tuple[TensorDifference, ...]:
        """The tensors that differ in any way."""
        return tuple(tensor for tensor in self.tensors if tensor.verdict not in ("same", "unread"))

    @property
    def relative_error(self) -> float | None:
        """Relative error over all compared values together; None if none were compared."""
        return _together(self.tensors)

    @property
    def parts(self) -> tuple[PartDifference, ...]:
        """Tensors summed by part of the model, the largest part first."""
        groups: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            if tensor.before is not None and tensor.after is not None:
                groups.setdefault(part_of(tensor.name), []).append(tensor)
        by_size = sorted(groups.items(), key=lambda item: -sum(tensor.n_weights for tensor in item[1]))
        return tuple(_part(name, group) for name, group in by_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite as strings."""
        return {
            "same": self.is_same,
            "before": list(self.before),
            "after": list(self.after),
            "relative_error": _finite(self.relative_error),
            "metadata": [_key_as_dict(key) for key in self.keys],
            "parts": [{name: _finite(value) for name, value in asdict(part).items()} for part in self.parts],
            "tensors": [_tensor_as_dict(tensor) for tensor in self.tensors],
        }


def diff_models(
    before: Path,
    after: Path,
    *,
    headers_only: bool = False,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> ModelDifference:
    """Compare two GGUF files, or split models given any of their files.

    With ``headers_only`` no tensor byte is read. Raises GGUFError where a file cannot be read, Cancelled when
    ``cancel`` is set meanwhile, EngineMissingError where ggml is needed to compare values and is not there.
    """
    with OpenModel(before) as first, OpenModel(after) as second:
        found = {difference.name: difference for difference in _header_differences(first.header, second.header)}
        if not headers_only:
            comparable = [each for each in found.values() if each.verdict in ("unread", "type")]
            by_size = sorted(comparable, key=lambda difference: -difference.n_weights)
            pairs = [(each, first.tensors[each.name], second.tensors[each.name]) for each in by_size]
            n_bytes = sum(a.n_bytes + b.n_bytes for _, a, b in pairs)
            stopped = "comparing was stopped"
            work = Work("compare", n_bytes, stopped=stopped, on_progress=on_progress, cancel=cancel)
            compared = work.map(lambda pair: _compare(*pair, work), pairs, n_threads)
            found |= {difference.name: difference for difference in compared}
        names = [tuple(path.name for path in files.header.paths) for files in (first, second)]
        keys = _key_differences(first.header, second.header)
        return ModelDifference(names[0], names[1], keys, tuple(found.values()))


# ---- metadata


def _key_differences(first: ModelHeader, second: ModelHeader) -> tuple[KeyDifference, ...]:
    found = []
    for key in dict.fromkeys((*first.metadata, *second.metadata)):
        before, after = first.metadata.get(key), second.metadata.get(key)
        # by their texts NaN equals NaN
        if key not in SPLIT_KEYS and before != after and repr(before) != repr(after):
            found.append(_key_difference(key, before, after))
    return tuple(found)


def _key_difference(key: str, before: GGUFValue | None, after: GGUFValue | None) -> KeyDifference:
    if before is None or after is None or not (isinstance(before.value, list) and isinstance(after.value, list)):
        return KeyDifference(key, before, after)
    if len(before.value) != len(after.value):
        return KeyDifference(key, before, after)
    places = [i for i, (a, b) in enumerate(zip(before.value, after.value, strict=True)) if a != b]
    return KeyDifference(key, before, after, len(places), places[0] if places else None)


# ---- tensors


def _header_differences(first: ModelHeader, second: ModelHeader) -> Iterator[TensorDifference]:
    before, after = ({info.name: info for info in header.tensors} for header in (first, second))
    for name in dict.fromkeys((*before, *after)):
        pair = (before.get(name), after.get(name))
        yield TensorDifference(name, _verdict(*pair), *pair)


def _verdict(before: TensorInfo | None, after: TensorInfo | None) -> Verdict:
    if before is None:
        return "added"
    if after is None:
        return "removed"
    if before.plain_shape != after.plain_shape:
        return "shape"
    return "unread" if before.type is after.type else "type"


def _compare(found: TensorDifference, first: GGUFRows, second: GGUFRows, work: Work) -> TensorDifference:
    """``found`` with a verdict on the bytes, and with the errors where the two have values that can be compared."""
    if first.type is second.type:
        if _has_equal_bytes(first, second, work):
            return replace(found, verdict="same")
        found = replace(found, verdict="values")
    if not (can_widen(first.type) and can_widen(second.type)):
        return found
    return _measured(found, first, second, work)


def _has_equal_bytes(first: GGUFRows, second: GGUFRows, work: Work) -> bool:
    n_read = 0
    for start, stop in first.tiles(_TILE_WEIGHTS):
        work.check()
        if not np.array_equal(first.read(start, stop), second.read(start, stop)):
            # its values are read from the beginning
            work.advance(-n_read, first.name)
            return False
        n_bytes = 2 * (stop - start) * first.row_bytes
        n_read += n_bytes
        work.advance(n_bytes, first.name)
    return True


def _measured(found: TensorDifference, first: GGUFRows, second: GGUFRows, work: Work) -> TensorDifference:
    square = error_square = largest = 0.0
    for start, stop in first.tiles(_TILE_WEIGHTS):
        work.check()
        a, b = (widened(rows.type, rows.read(start, stop), rows.n_cols) for rows in (first, second))
        with np.errstate(over="ignore", invalid="ignore"):
            b -= a
            square += _sum_of_squares(a)
            error_square += _sum_of_squares(b)
            # np.maximum keeps NaN
            largest = float(np.maximum(largest, np.abs(b, out=b).max()))
        work.advance((stop - start) * (first.row_bytes + second.row_bytes), first.name)
    return replace(
        found,
        relative_error=_ratio(error_square, square),
        max_difference=largest,
        error_square=error_square,
        square=square,
    )


def _sum_of_squares(values: NDArray[np.float32]) -> float:
    """Sum in double precision, without BLAS, which would start threads of its own."""
    return float(np.square(values).sum(dtype=np.float64))


def _ratio(error_square: float, square: float) -> float:
    if math.isnan(error_square) or math.isnan(square):
        return math.nan
    if not error_square:
        return 0.0
    return math.sqrt(error_square / square) if square else math.inf


# ---- sums and JSON


def _together(tensors: Iterable[TensorDifference]) -> float | None:
    measured = [tensor for tensor in tensors if tensor.relative_error is not None]
    if not measured:
        return None
    return _ratio(sum(tensor.error_square for tensor in measured), sum(tensor.square for tensor in measured))


def _part(name: str, group: list[TensorDifference]) -> PartDifference:
    n_different = sum(tensor.verdict not in ("same", "unread") for tensor in group)
    before = [tensor.before for tensor in group if tensor.before]
    after = [tensor.after for tensor in group if tensor.after]
    return PartDifference(name, len(group), n_different, _bits(before), _bits(after), _together(group))


def _bits(infos: list[TensorInfo]) -> float:
    return 8 * sum(info.n_bytes for info in infos) / sum(info.n_elements for info in infos)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _key_as_dict(found: KeyDifference) -> dict[str, Any]:
    entry: dict[str, Any] = {"key": found.key}
    for side, value in (("before", found.before), ("after", found.after)):
        if value is not None:
            plain = value.value
            plain = [_finite(item) for item in plain] if isinstance(plain, list) else _finite(plain)
            entry[side] = {"type": value.type.name, "value": plain}
    if found.n_items is not None:
        entry |= {"n_items": found.n_items, "first_item": found.first_item}
    return entry


def _tensor_as_dict(found: TensorDifference) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": found.name, "verdict": found.verdict, "part": part_of(found.name)}
    for side, info in (("before", found.before), ("after", found.after)):
        if info is not None:
            entry[side] = {"type": info.type.name, "shape": list(info.shape), "bytes": info.n_bytes}
    if found.relative_error is not None:
        entry |= {"relative_error": _finite(found.relative_error), "max_difference": _finite(found.max_difference)}
    return entry
