"""What tensors of a checkpoint say that they read is what they read, in every way in which weights are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ggufmoe.checkpoint.opening import Checkpoint, open_directory
from ggufmoe.weights.byte_ranges import ByteReader, byte_ranges
from ggufmoe.weights.dtypes import read_f32, row_count
from tests.checkpoint.test_fp8_blocks import quantized
from tests.families import test_gpt_oss as gpt_oss
from tests.tiny import make_checkpoint


class Recorder:
    """A file that records which of its bytes are read."""

    def __init__(self, file: ByteReader) -> None:
        self.file, self.path, self.n_bytes = file, file.path, file.n_bytes
        self.read: list[tuple[int, int]] = []

    def read_into(self, begin: int, buffer: memoryview) -> None:
        self.read.append((begin, begin + len(buffer)))
        self.file.read_into(begin, buffer)

    def close(self) -> None:
        self.file.close()


def fused(directory: Path) -> Path:
    return make_checkpoint(directory, layout="fused", n_embd=32, n_ff=48, n_head=2, n_layer=1, max_shard_bytes=30_000)


def of_8_bits(directory: Path) -> Path:
    return quantized(directory, n_embd=64, n_ff=96, n_head=2, n_layer=1)


def of_4_bits(directory: Path) -> Path:
    return gpt_oss.write(directory, gpt_oss.mxfp4_tensors(), quantization_config={"quant_method": "mxfp4"})


@pytest.mark.parametrize("make", [fused, of_8_bits, of_4_bits])
def test_what_is_told_is_read(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with open_directory(make(tmp_path / "model")) as model:
        recorders = recorded(model)
        for name, tensor in model.tensors.items():
            n_rows = row_count(tensor.shape)
            for start, stop in ((0, n_rows), (n_rows // 3, n_rows // 3 + 1), (n_rows // 2, n_rows)):
                told = list(byte_ranges(tensor, start, stop))
                read_f32(tensor, start, stop)
                for path, recorder in recorders.items():
                    here = [(one.begin, one.end) for one in told if one.file.path.name == path]
                    assert joined(here) == joined(recorder.read), f"{name}: rows {start} to {stop} in {path}"
                    recorder.read.clear()


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as the fewest ranges."""
    whole: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if whole and begin <= whole[-1][1]:
            first, last = whole.pop()
            begin, end = first, max(end, last)
        whole.append((begin, end))
    return whole


def recorded(model: Checkpoint) -> dict[str, Recorder]:
    """A recorder in the place of each file."""
    for file in model.files:
        file.bytes = Recorder(file.bytes)
    return {file.path.name: file.bytes for file in model.files if isinstance(file.bytes, Recorder)}
