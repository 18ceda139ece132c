"""How two GGUF files differ: names, shapes, types and bytes of tensors, and metadata.

Both are read with gguf-py, so that a mistake in our own reader cannot hide one in our writer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

SAME_GENERAL = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")
"""The keys under ``general`` that are facts of the file; the others tell where a model comes from."""

EXPONENTIALS = ".ssm_a"
"""Float32 values that may differ in the last bit: torch's exp, which the converter takes, is not rounded correctly in
about 1 of 100 values on x86-64 (measured: 10 868 of a million; ours are) and depends on the processor."""


def differences(ours: Path, theirs: Path, except_keys: tuple[str, ...] = ()) -> list[str]:
    """Every difference in words but in provenance, keys of ours and ``except_keys``; empty if they say the same."""
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    return [*_metadata_differences(a, b, except_keys), *_tensor_differences(a, b)]


def _metadata_differences(ours: gguf.GGUFReader, theirs: gguf.GGUFReader, except_keys: tuple[str, ...]) -> list[str]:
    a, b = _metadata(ours), _metadata(theirs)
    found = []
    for key in sorted({*a, *b}):
        if key in except_keys or key.startswith("ggufmoe.") or (key.startswith("general.") and key not in SAME_GENERAL):
            continue
        if key not in a or key not in b:
            found.append(f"{key}: only in {'ours' if key in a else 'theirs'}")
        elif a[key] != b[key]:
            found.append(f"{key}: {_in_words(a[key], b[key])}")
    return found


def _metadata(reader: gguf.GGUFReader) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Key to (type names, value); the three fields that gguf-py adds for the header itself are dropped."""
    return {
        name: (tuple(kind.name for kind in field.types), field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }


def _in_words(ours: tuple[tuple[str, ...], Any], theirs: tuple[tuple[str, ...], Any]) -> str:
    if ours[0] != theirs[0]:
        return f"type {'/'.join(ours[0])}, theirs {'/'.join(theirs[0])}"
    a, b = ours[1], theirs[1]
    if not isinstance(a, list):
        return f"{a!r:.80}, theirs {b!r:.80}"
    if len(a) != len(b):
        return f"{len(a)} values, theirs {len(b)}"
    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"value {first} is {a[first]!r:.80}, theirs {b[first]!r:.80}"


def tensor_differences(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """The number of tensors of ours, and every difference of tensors in words, whatever the metadata say."""
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    return len(a.tensors), _tensor_differences(a, b)


def _tensor_differences(ours: gguf.GGUFReader, theirs: gguf.GGUFReader) -> list[str]:
    a, b = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    found = [f"{name}: only in {'ours' if name in a else 'theirs'}" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        x, y = a[name], b[name]
        if x.tensor_type != y.tensor_type:
            found.append(f"{name}: type {x.tensor_type.name}, theirs {y.tensor_type.name}")
        elif x.shape.tolist() != y.shape.tolist():
            found.append(f"{name}: shape {x.shape.tolist()}, theirs {y.shape.tolist()}")
        elif name.endswith(EXPONENTIALS) and np.all(np.abs(x.data - y.data) <= np.spacing(np.abs(y.data))):
            continue
        elif x.data.tobytes() != y.data.tobytes():
            n_wrong = int(np.count_nonzero(x.data.view(np.uint8) != y.data.view(np.uint8)))
            found.append(f"{name}: {n_wrong} of {x.data.nbytes} bytes differ")
    return found
