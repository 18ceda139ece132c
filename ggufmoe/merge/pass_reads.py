"""Reads the weights of a forward pass ahead of it, where they come over the network.

The pass says which tensors it reads, in which order (``ForwardPass.steps``), and which tile it reads at the moment. On
a line with a long way there and back each tile would else wait for the one before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from ggufmoe.hub.hub_file import Line
from ggufmoe.hub.read_ahead import ReadAhead
from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.weights.dtypes import row_count
from ggufmoe.weights.source_tensor import SourceTensor

Step = Sequence[SourceTensor]
"""Tensors of one shape that are read together, tile by tile: mostly one."""


class PassReads:
    """The weights that one pass of a text through a model's layers reads, fetched from the hub ahead of it.

    ``steps`` are the tensors that are needed together, in the order in which the pass reads them; ``line`` is the
    connection. Without ``running`` nothing is read ahead.
    """

    def __init__(self, line: Line, steps: Iterable[Step], tile_rows: Callable[[SourceTensor], int]) -> None:
        """``tile_rows`` is the number of rows of each tile of a tensor but the last."""
        self._line, self._tile_rows = line, tile_rows
        self._steps = [tuple(step) for step in steps]
        self._ahead = ReadAhead(line)
        self._first: dict[int, int] = {}
        """The number of the first tile of a step, by the identity of its first tensor."""
        n_tiles = 0
        for step in self._steps:
            self._first[id(step[0])] = n_tiles
            n_tiles += len(self._starts(step[0]))

    def running(self) -> AbstractContextManager[None]:
        """Read ahead while the block runs."""
        return self._ahead.running(self._schedule(), self._line.stopped)

    def begin(self, tensor: SourceTensor) -> None:
        """The pass comes to the step that begins with ``tensor``; no thread reads a tile of one before it."""
        if (first := self._first.get(id(tensor))) is not None:
            self._ahead.skip_to(first)

    def tile(self, tensor: SourceTensor, start: int) -> AbstractContextManager[None]:
        """The block reads the tile from row ``start`` on of the step that begins with ``tensor``."""
        first = self._first.get(id(tensor))
        if first is None:
            return contextlib.nullcontext()
        return self._ahead.item(first + start // self._tile_rows(tensor))

    def _schedule(self) -> Iterator[tuple[int, list[ByteRange]]]:
        number = 0
        for step in self._steps:
            for start in self._starts(step[0]):
                stop = min(start + self._tile_rows(step[0]), row_count(step[0].shape))
                yield number, [one for tensor in step for one in byte_ranges(tensor, start, stop)]
                number += 1

    def _starts(self, tensor: SourceTensor) -> range:
        return range(0, row_count(tensor.shape), self._tile_rows(tensor))
