"""Compiled kernels kept on disk, so that a later process loads in a millisecond what took tenths of a second to make.

Owns the folder and the layout of its entries. An entry is used only if it belongs to this user, is undamaged and was
made of the same sources, by the same versions, for the same processor; every other one is ignored and written anew.
Nothing here raises: where the folder cannot be used, kernels are compiled in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LOG = logging.getLogger("ggufmoe")
_MAGIC = b"ggufmoe kernel 1\n"
_HASH_BYTES = hashlib.sha256().digest_size
_MAX_ENTRY_BYTES = 64 << 20
_N_MAKERS_KEPT = 4
"""How many makers' folders stay: those used last. One holds a few megabytes."""
_ABANDONED_S = 3600.0
"""The age of a temporary file whose process must have died."""


@dataclass(frozen=True)
class Code:
    """One native function as relocatable object code, and the scratch memory that a call of it needs."""

    object_code: bytes
    scratch_bytes: int


class CodeCache:
    """Entries of one maker: everything that the code depends on besides its name."""

    def __init__(self, folder: Path, maker: Mapping[str, str]) -> None:
        """``folder`` need not exist. ``maker`` has processor, versions and the hash of the sources."""
        self._maker = dict(maker)
        digest = hashlib.sha256(json.dumps(self._maker, sort_keys=True).encode()).hexdigest()
        self._root, self._folder = folder, folder / digest[:20]

    def has(self, name: str) -> bool:
        """Whether there is an entry under ``name``, trusted or not."""
        return os.path.exists(self._folder / name)

    def load(self, name: str) -> Code | None:
        """The code kept under ``name``; None if there is none that can be trusted."""
        path = self._folder / name
        try:
            if not (_is_private(self._folder.lstat(), stat.S_ISDIR) and _is_private(path.lstat(), stat.S_ISREG)):
                return None
            with open(path, "rb") as file:
                code = self._decoded(name, file.read(_MAX_ENTRY_BYTES + 1))
            with contextlib.suppress(OSError):
                os.utime(self._folder)
        except OSError:
            return None
        return code

    def save(self, name: str, code: Code) -> None:
        """Keep ``code`` under ``name``, in the place of what is there; without an effect where that is impossible."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                try:
                    file.write(self._encoded(name, code))
                    file.close()
                    os.replace(file.name, self._folder / name)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise
            self._prune()
        except OSError as error:
            _LOG.debug("compiled kernels are not kept in %s: %s", self._folder, error.strerror)

    def _encoded(self, name: str, code: Code) -> bytes:
        header = {"name": name, "maker": self._maker, "scratch_bytes": code.scratch_bytes}
        payload = json.dumps(header).encode() + b"\n" + code.object_code
        return _MAGIC + hashlib.sha256(payload).digest() + payload

    def _decoded(self, name: str, entry: bytes) -> Code | None:
        start = len(_MAGIC) + _HASH_BYTES
        payload = entry[start:]
        if entry[:start] != _MAGIC + hashlib.sha256(payload).digest():
            return None
        text, _, object_code = payload.partition(b"\n")
        header = json.loads(text)
        if header["name"] != name or header["maker"] != self._maker:
            return None
        return Code(object_code, header["scratch_bytes"])

    def _prune(self) -> None:
        """Remove the folders of makers that have not been used for longest, and what killed processes left."""
        others = [path for path in self._root.iterdir() if re.fullmatch("[0-9a-f]{20}", path.name)]
        others.sort(key=lambda path: path.lstat().st_mtime, reverse=True)
        for path in others[_N_MAKERS_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(".*"):
            if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                path.unlink()


def _is_private(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether a file or folder is of the kind, and no other user but root could have put code into it."""
    if not is_kind(status.st_mode):
        return False
    return sys.platform == "win32" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


@cache
def source_hash(folder: Path) -> str | None:
    """One hash of all Python files of a package's folder; None where they cannot be read, for example in an archive."""
    found = hashlib.sha256()
    try:
        for path in sorted(folder.glob("*.py")):
            found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    except OSError:
        return None
    return found.hexdigest() if any(folder.glob("*.py")) else None
