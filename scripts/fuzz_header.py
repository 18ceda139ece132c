"""Mutate GGUF headers for a while, and check that each is read or refused: quickly, in little memory, by GGUFError.

    python scripts/fuzz_header.py --seconds 120 [--seed N] [--save DIR] [FILE.gguf ...]

Seeds are headers made here and those of the given files. Beside ``read_header`` each survivor goes through
``inspect_model``, and its header is encoded again. Exits with 1 at the first input that breaks a promise, which is kept
in DIR.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, Header, TensorInfo, padded, read_header
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.inspection.inspect import inspect_model

MAX_SECONDS = 0.5
MAX_MEMORY_BYTES = 64 * 2**20
"""For inputs of some kilobytes; a real vocabulary of 32,000 tokens takes 6 MB."""
MEMORY_EVERY = 16
"""Memory is traced for one input in so many, because tracing is slow."""

_MAGIC_NUMBERS = (0, 1, 2, 7, 31, 32, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61 + 1, 2**63 - 1, 2**63, 2**64 - 1)


def main() -> int:
    arguments = _arguments()
    rng = random.Random(arguments.seed)
    seeds = [_made_header(rng) for _ in range(8)] + [_head_of(path) for path in arguments.files]
    counts: Counter[str] = Counter()
    slowest, deadline = 0.0, time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fuzzed.gguf"
        while time.monotonic() < deadline:
            content = mutate(rng, rng.choice(seeds))
            path.write_bytes(content)
            try:
                outcome, seconds = _try(path, trace=sum(counts.values()) % MEMORY_EVERY == 0)
            except Exception as error:
                return _report(content, error, arguments.save)
            counts[outcome] += 1
            slowest = max(slowest, seconds)
    print(f"seed {arguments.seed}: {sum(counts.values())} inputs, {dict(counts)}, slowest {1000 * slowest:.1f} ms")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--save", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("files", nargs="*", type=Path)
    return parser.parse_args()


def _try(path: Path, *, trace: bool) -> tuple[str, float]:
    """Read one file; the outcome and the seconds it took. Raises whatever breaks a promise."""
    if trace:
        tracemalloc.start()
    started = time.process_time()
    outcome = _read(path)
    seconds = time.process_time() - started
    if trace:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > MAX_MEMORY_BYTES:
            raise AssertionError(f"took {peak} bytes of memory")
    elif seconds > MAX_SECONDS:
        raise AssertionError(f"took {seconds:.2f} s")
    return outcome, seconds


def _read(path: Path) -> str:
    try:
        header = read_header(path)
    except GGUFError as error:
        message = str(error)
        if "\n" in message or len(message) > 1000:
            raise AssertionError(f"not a short line: {message!r}") from error
        return "refused"
    raw = path.read_bytes()
    if header.data_offset + header.data_bytes > len(raw):
        raise AssertionError("a tensor lies beyond the end of the file")
    again = encode_header(header.metadata, header.tensors, header.alignment)
    # version 2 becomes 3, and padding may hold anything
    if not raw[8:].startswith(again[8:].rstrip(b"\0")) and not _has_nan(header):
        raise AssertionError("encoded again, the header differs")
    try:
        inspect_model(path).to_dict()
    except GGUFError:
        return "read, shards refused"
    return "read"


def _has_nan(header: Header) -> bool:
    """Whether a float is NaN, whose bits Python does not keep."""
    listed = (value.value if isinstance(value.value, list) else [value.value] for value in header.metadata.values())
    return any(item != item for items in listed for item in items)


def mutate(rng: random.Random, content: bytes) -> bytes:
    """A few random changes: bytes, numbers, cuts, repeats, insertions."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        start = rng.randrange(len(changed)) if changed else 0
        length = rng.choice((1, 4, 8, 16, rng.randrange(1, 200)))
        match rng.randrange(7):
            case 0:
                changed[start : start + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[start : start + 1] = bytes(
                    byte ^ (1 << rng.randrange(8)) for byte in changed[start : start + 1]
                )
            case 2:
                changed[start : start + 8] = struct.pack("<Q", rng.choice(_MAGIC_NUMBERS))
            case 3:
                changed[start : start + 4] = struct.pack("<I", rng.choice(_MAGIC_NUMBERS) % 2**32)
            case 4:
                del changed[start : start + length]
            case 5:
                changed[start:start] = changed[start : start + length]
            case 6:
                del changed[max(start, len(changed) - length) :]
    return bytes(changed)


def _made_header(rng: random.Random) -> bytes:
    """A small header with values of all types and some tensors, followed by their bytes."""
    metadata = {"general.architecture": GGUFValue(ValueType.STRING, "llama")}
    for kind in set(ValueType) - {ValueType.ARRAY}:
        item = {ValueType.STRING: "text", ValueType.BOOL: True}.get(kind, 1)
        metadata[f"llama.{kind.name.lower()}"] = GGUFValue(kind, item)
        metadata[f"tokenizer.{kind.name.lower()}s"] = GGUFValue(ValueType.ARRAY, [item] * rng.randrange(5), kind)
    metadata["general.alignment"] = GGUFValue(ValueType.UINT32, rng.choice((8, 32)))
    metadata["split.count"] = GGUFValue(ValueType.UINT16, 1)
    metadata["tokenizer.ggml.tokens"] = GGUFValue(ValueType.ARRAY, ["a", "b", "c"], ValueType.STRING)
    metadata["llama.expert_count"] = metadata["llama.expert_used_count"] = GGUFValue(ValueType.UINT32, 2)
    alignment = int(metadata["general.alignment"].value)
    tensors, offset = [], 0
    for number in range(rng.randrange(1, 6)):
        kind_of = rng.choice(list(GGMLType))
        shape = (*(rng.randrange(1, 4) for _ in range(rng.randrange(4))), kind_of.block_size)
        n_bytes = kind_of.block_bytes
        for dim in shape[:-1]:
            n_bytes *= dim
        tensors.append(TensorInfo(f"blk.{number}.ffn_up_exps.weight", kind_of, shape, offset, n_bytes))
        offset = padded(offset + n_bytes, alignment)
    return encode_header(metadata, tensors, alignment) + bytes(offset)


def _head_of(path: Path) -> bytes:
    header = read_header(path)
    with path.open("rb") as file:
        return file.read(header.data_offset + min(header.data_bytes, 2**16))


def _report(content: bytes, error: Exception, directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{type(error).__name__}-{int(time.time())}.gguf"
    path.write_bytes(content)
    print(f"{type(error).__name__}: {error}; the input is {path}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
