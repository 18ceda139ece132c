"""An output that is a directory: written as ``NAME.partial`` and renamed when every file in it is complete."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ggufmoe.errors import OutputError, OutputExistsError
from ggufmoe.files import check_parent, delete, delete_directory, move, partial_path, sync, sync_directory
from ggufmoe.writing.lock import output_lock

_PARTIAL_FILES = ("*.safetensors", "*.safetensors.partial", "*.partial.journal", "*.partial.router")


def check_directory(target: Path, inputs: Sequence[Path], *, record: str, force: bool) -> None:
    """Raise OutputError if ``target`` cannot be made, OutputExistsError if it exists or holds one of ``inputs``.

    An empty directory may exist. ``force`` allows to replace a directory that holds the file ``record``, which every
    directory that is written here has, but no other one.
    """
    place = Path(os.path.realpath(target))
    if not target.name:
        raise OutputError(f"{target} is no name of a new directory; give one, for example merged-model")
    for given in inputs:
        if place == given.resolve().parent or place in given.resolve().parents:
            raise OutputExistsError(f"{target} holds {given}, which is read; choose another output directory")
    check_parent(target)
    if _replaced_path(target).exists():
        raise OutputError(
            f"{_replaced_path(target)} is there, left by a run that was interrupted while it replaced {target.name}; "
            "move away what you need of it, then delete it"
        )
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / record).is_file()):
        raise OutputExistsError(
            f"{target} is there and was not written by ggufmoe (it has no {record}); choose another output directory"
        )
    if any(target.iterdir()) and not force:
        raise OutputExistsError(f"{target} exists already; choose another name, or replace it with --force")


@contextlib.contextmanager
def open_partial_directory(target: Path, *, keep: bool) -> Iterator[Path]:
    """Make ``NAME.partial`` of a target directory, to write into. Raises OutputError.

    Files of an earlier run are deleted in it unless ``keep``. If the block raises, the directory stays, so that the
    work can be resumed, unless it is empty.
    """
    with output_lock(target):
        yield from _partial_directory(target, keep=keep)


def _partial_directory(target: Path, *, keep: bool) -> Iterator[Path]:
    partial = partial_path(target)
    try:
        partial.mkdir(exist_ok=True)
        if not keep:
            for pattern in _PARTIAL_FILES:
                for path in partial.glob(pattern):
                    delete(path)
    except OSError as error:
        raise OutputError(f"{partial} cannot be written: {error.strerror}") from error
    try:
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            partial.rmdir()
        raise


def place_directory(partial: Path, target: Path, files: Mapping[str, bytes], *, written: Sequence[str]) -> None:
    """Write ``files`` (name to content) into the partial directory and give it its name, replacing an older directory.

    ``written`` are patterns of the names that may be written here. Of an older directory the files that match one are
    replaced, and all others move into the new one. Raises OutputError.
    """
    try:
        _remove_leftovers(partial, files, written)
        for name, content in files.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
        sync_directory(partial)
        replaced = _replaced_path(target)
        with contextlib.suppress(FileNotFoundError):
            move(target, replaced)
        try:
            move(partial, target)
        except OSError:
            with contextlib.suppress(OSError):
                move(replaced, target)
            raise
        for pattern in ("*.partial.journal", "*.partial.router"):
            for path in target.glob(pattern):
                delete(path)
        sync_directory(target.parent)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}; all is in {partial}") from error
    if replaced.exists():
        _keep_what_is_not_ours(replaced, target, written)


def _remove_leftovers(partial: Path, files: Mapping[str, bytes], written: Sequence[str]) -> None:
    """Remove what an earlier run left beside the weights: a stale tokenizer or template would change the model."""
    for path in list(partial.iterdir()):
        if path.suffix == ".safetensors" or not _matches(path.name, written):
            continue
        if path.is_dir():
            delete_directory(path)
        elif path.name not in files:
            delete(path)


def _keep_what_is_not_ours(replaced: Path, target: Path, written: Sequence[str]) -> None:
    """Move the user's files from the directory that was replaced into its successor, and delete the rest."""
    try:
        for path in sorted(replaced.iterdir()):
            if not _matches(path.name, written):
                move(path, target / path.name)
        sync_directory(target)
        delete_directory(replaced)
    except OSError as error:
        raise OutputError(
            f"{target} is complete, but files of yours could not be moved from {replaced} into it: "
            f"{error.strerror or error}; move what you need, then delete {replaced.name}"
        ) from error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _replaced_path(target: Path) -> Path:
    """Where an older directory is while its successor takes its place."""
    return target.with_name(target.name + ".replaced")
