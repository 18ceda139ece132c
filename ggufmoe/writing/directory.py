"""An output that is a directory: made beside its place, and put there when everything in it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ggufmoe.errors import OutputError, OutputExistsError
from ggufmoe.files import check_parent, partial_path, sync_directory

_OURS = ("*.safetensors", "*.safetensors.partial", "*.partial.journal")
_SIGN = "config.json"
"""What tells that a directory is a checkpoint, and may be replaced as one."""


def check_directory(target: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse a directory that holds an input, is there already, or cannot be there.

    Even with ``force`` only an empty directory or a checkpoint is replaced.
    """
    place = target.resolve()
    if not target.name:
        raise OutputError(f"{target} cannot be made anew; give the name of a directory that is to be")
    for given in inputs:
        if place == given.resolve().parent or place in given.resolve().parents:
            raise OutputExistsError(f"{target} holds {given}, which is read; choose another output directory")
    check_parent(target)
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / _SIGN).is_file()):
        raise OutputExistsError(f"{target} is there and is no checkpoint; choose another output directory")
    if any(target.iterdir()) and not force:
        raise OutputExistsError(f"{target} exists already; choose another name, or replace it with --force")


@contextlib.contextmanager
def open_partial_directory(target: Path, *, keep: bool) -> Iterator[Path]:
    """The directory to write into; what an earlier run left there is kept only to be resumed.

    It stays when the work fails, to be resumed, unless there is nothing in it.
    """
    partial = partial_path(target)
    try:
        partial.mkdir(exist_ok=True)
        if not keep:
            for pattern in _OURS:
                for path in partial.glob(pattern):
                    path.unlink()
    except OSError as error:
        raise OutputError(f"{partial} cannot be written: {error.strerror}") from error
    try:
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            partial.rmdir()
        raise


def place_directory(partial: Path, target: Path, files: Mapping[str, bytes]) -> None:
    """Add ``files`` to the finished weights and give the directory its name; an older one is replaced as a whole."""
    try:
        for name, content in files.items():
            _write(partial / name, content)
        sync_directory(partial)
        replaced = target.with_name(target.name + ".replaced")
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, replaced)
        os.replace(partial, target)
        sync_directory(target.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}; all is in {partial}") from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
