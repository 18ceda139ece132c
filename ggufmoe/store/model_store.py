"""The folder of stored models: plain GGUF files with plain names, and a record beside each.

The folder is the user's: files may be added, moved and deleted by hand. It is looked at anew each time. A record whose
model has gone is dropped, a file without a record is a model all the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ggufmoe.errors import InputError, OutputError
from ggufmoe.files import allowed_name, delete
from ggufmoe.folders import data_directory
from ggufmoe.store.records import ModelRecord, read_record
from ggufmoe.writing.lock import lock_path, output_lock

_SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-\d{5}", re.DOTALL)
_UNFINISHED = (".gguf.partial", ".gguf.partial.journal", ".gguf.partial.router")
_NOT_RECORDS = (".manifest.json",)


@dataclass(frozen=True)
class StoredModel:
    """A model in the store: its name, its files in order, and its record, if it has one."""

    name: str
    paths: tuple[Path, ...]
    n_bytes: int
    record: ModelRecord | None
    used_s: float
    """When it was made or used last, in seconds since 1970."""

    @property
    def path(self) -> Path:
        """The file to load."""
        return self.paths[0]


@dataclass(frozen=True)
class UnfinishedModel:
    """A model that is being made, or whose making was interrupted; ``n_bytes`` are on disk."""

    name: str
    paths: tuple[Path, ...]
    n_bytes: int
    record: ModelRecord | None


def models_directory() -> Path:
    """The folder of stored models, which need not exist. Raises InputError for a user without a home."""
    base = data_directory()
    if base is None:
        raise InputError("this user has no home directory for models; name a folder in GGUFMOE_HOME")
    return base / "models"


class ModelStore:
    """The stored models of a folder, by default the user's."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = models_directory() if directory is None else directory

    def models(self) -> list[StoredModel]:
        """The complete models, ordered by name. Records of models that have gone are dropped."""
        groups: dict[str, list[Path]] = {}
        for path in self._files(".gguf"):
            groups.setdefault(_name_of(path), []).append(path)
        self._drop_records_without(set(groups))
        return [self._model(name, tuple(paths)) for name, paths in sorted(groups.items())]

    def unfinished(self) -> list[UnfinishedModel]:
        """What interrupted runs have left, and what is being made at the moment, ordered by name."""
        groups: dict[str, list[Path]] = {}
        for ending in _UNFINISHED:
            for path in self._files(ending):
                groups.setdefault(_name_of(path), []).append(path)
        return [
            UnfinishedModel(name, tuple(paths), sum(map(_allocated, paths)), read_record(self.record_path(name)))
            for name, paths in sorted(groups.items())
        ]

    def find(self, name: str) -> StoredModel | None:
        """The complete model of a name as ``models`` lists it, with or without ``.gguf``."""
        wanted = name.removesuffix(".gguf")
        return next((model for model in self.models() if model.name == wanted), None)

    def find_request(self, request: str) -> StoredModel | None:
        """The model that was the answer to ``request`` before, if what it was made from is unchanged."""
        for model in self.models():
            if model.record is not None and request in model.record.requests and model.record.is_current:
                return model
        return None

    def named(self, name: str) -> StoredModel:
        """``find``, but InputError, which lists similar names, if there is no such model."""
        import difflib

        if (found := self.find(name)) is None:
            names = [model.name for model in self.models()]
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "`ggufmoe list` shows what is stored"
            raise InputError(f"{name}: there is no such model in {self.directory}; {hint}")
        return found

    def record_path(self, name: str) -> Path:
        """Where the record of a model is."""
        return self.directory / f"{name}.json"

    def used(self, model: StoredModel, request: str | None = None) -> None:
        """Note that a model is used now, and that it is the answer to ``request``."""
        path = self.record_path(model.name)
        if model.record is not None and request is not None and request not in model.record.requests:
            replace(model.record, requests=(*model.record.requests, request)).write(path)
        with contextlib.suppress(OSError):  # the folder may be write-protected
            os.utime(path)

    def claim(self, wanted: str, record: ModelRecord, wait: Callable[[str], None]) -> str:
        """The name under which the model of ``record`` is made: ``wanted``, or with a number where that is taken.

        A claim that an interrupted run has left for the same model is found again. Raises OutputError.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.directory} cannot be made: {error.strerror}; see GGUFMOE_HOME") from error
        with output_lock(self.directory / "names", wait=wait):
            taken = {model.name for model in self.models()}
            for number in range(1, 10_000):
                name = allowed_name(wanted if number == 1 else f"{wanted}-{number}")
                other = read_record(self.record_path(name))
                is_ours = other is not None and (other.source, other.file_type) == (record.source, record.file_type)
                if is_ours or (other is None and name not in taken):
                    if not is_ours:
                        record.write(self.record_path(name))
                    return name
        raise OutputError(f"{self.directory} has too many models called {wanted}; delete some with `ggufmoe rm`")

    @contextlib.contextmanager
    def making(self, name: str, wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the right to make, replace or delete a model; ``wait`` is that of ``output_lock``."""
        with output_lock(self.record_path(name), wait=wait):
            yield

    def remove(self, model: StoredModel | UnfinishedModel) -> int:
        """Delete a model with its record; returns the bytes that are free again.

        Raises OutputError if it is being made at the moment, or if the system refuses.
        """
        with self.making(model.name):
            try:
                for path in model.paths:
                    delete(path)
                for ending in (".json", ".manifest.json"):
                    delete(self.directory / f"{model.name}{ending}")
            except OSError as error:
                raise OutputError(f"{model.name} cannot be deleted: {error.strerror or error}") from error
        return model.n_bytes

    def unused(self, days: float) -> list[StoredModel]:
        """The models that were neither made nor used for so many days."""
        limit_s = time.time() - days * 86400
        return [model for model in self.models() if model.used_s < limit_s]

    def _files(self, ending: str) -> list[Path]:
        try:
            return sorted(path for path in self.directory.iterdir() if path.name.endswith(ending))
        except OSError:
            return []

    def _model(self, name: str, paths: tuple[Path, ...]) -> StoredModel:
        record = read_record(self.record_path(name))
        sizes = {path.name: path.stat().st_size for path in paths if path.exists()}
        if record is not None and {file.name: file.n_bytes for file in record.files} != sizes:
            record = None  # other files lie under these names now
        used_s = self.record_path(name).stat().st_mtime if record else max(p.stat().st_mtime for p in paths)
        return StoredModel(name, paths, sum(sizes.values()), record, used_s)

    def _drop_records_without(self, names: set[str]) -> None:
        """Delete the records of models that have gone; a claim stays while its model is unfinished."""
        for path in self._files(".json"):
            name = path.name.removesuffix(".json")
            if name in names or path.name.endswith(_NOT_RECORDS) or read_record(path) is None:
                continue
            is_begun = any(_name_of(left) == name for ending in _UNFINISHED for left in self._files(ending))
            if not is_begun and not lock_path(path).exists():
                with contextlib.suppress(OSError):
                    delete(path)


def _name_of(path: Path) -> str:
    """The name of the model that a file belongs to."""
    name = path.name[: path.name.rindex(".gguf")]
    match = _SHARD.fullmatch(name)
    return match["name"] if match else name


def _allocated(path: Path) -> int:
    """Bytes that a file takes on disk: a partial file has its full size from the start."""
    status = path.stat()
    return min(status.st_size, int(getattr(status, "st_blocks", status.st_size // 512 + 1)) * 512)
