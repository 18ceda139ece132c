"""Headers of GGUF models on the hub, read by ranges: what is in a file before it is downloaded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ggufmoe.gguf.header import read_header_from
from ggufmoe.gguf.model import ModelHeader, Shard, join_shards
from ggufmoe.hub.hub_errors import explained, hub_failures
from ggufmoe.hub.hub_file import HubFile, Line
from ggufmoe.hub.hub_models import HubGGUF

if TYPE_CHECKING:
    from typing_extensions import Buffer


def read_hub_header(model: HubGGUF, line: Line | None = None) -> ModelHeader:
    """The headers of all files of a model on the hub; no tensor byte is read beyond the first 256 KiB of a file.

    Raises HubError if the hub does not give them, and GGUFError as ``read_model_header`` does.
    """
    line = line or Line()
    shards = []
    for entry in model.entries:
        try:
            file = HubFile(model.repo_id, entry.name, model.commit, line)
            try:
                header = read_header_from(_HubStream(file), Path(model.repo_id, entry.name), file.n_bytes)
            finally:
                file.close()
        except hub_failures() as error:
            raise explained(f"{model.repo_id}/{entry.name}", model.repo_id, error) from error
        shards.append(Shard(file.path, header))
    return join_shards(tuple(shards))


class _HubStream(io.RawIOBase):
    """A file of the hub, read from front to back."""

    def __init__(self, file: HubFile) -> None:
        self._file, self._position = file, 0

    def readinto(self, buffer: Buffer) -> int:
        """Fill the buffer, or as much of it as is left of the file."""
        view = memoryview(buffer).cast("B")
        n_bytes = min(len(view), self._file.n_bytes - self._position)
        self._file.read_into(self._position, view[:n_bytes])
        self._position += n_bytes
        return n_bytes
