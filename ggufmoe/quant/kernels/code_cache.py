"""A cache of compiled kernels on disk: loading one takes a millisecond, compiling it tenths of a second.

An entry is used only if it belongs to this user, its checksum is right, and it was made from the same sources, by the
same versions, for the same processor; any other entry is ignored and replaced. Nothing here raises: if the folder
cannot be used, each process compiles its kernels.
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
"""How many makers' folders are kept, those used last. A folder takes a few megabytes."""
_ABANDONED_S = 3600.0
"""Age at which a temporary file is taken to be left over from a process that died."""


@dataclass(frozen=True)
class Code:
    """A native function as relocatable object code, and the bytes of scratch memory that a call needs."""

    object_code: bytes
    scratch_bytes: int


class CodeCache:
    """The cache entries of one maker: the processor, versions and sources on which compiled code depends."""

    def __init__(self, folder: Path, maker: Mapping[str, str]) -> None:
        """``folder`` need not exist. ``maker`` maps names to processor, versions and the hash of the sources."""
        self._maker = dict(maker)
        digest = hashlib.sha256(json.dumps(self._maker, sort_keys=True).encode()).hexdigest()
        self._root, self._folder = folder, folder / digest[:20]

    def has(self, name: str) -> bool:
        """Whether there is an entry called ``name``, valid or not."""
        return os.path.exists(self._folder / name)

    def load(self, name: str) -> Code | None:
        """Load the code called ``name``; None if there is no valid entry."""
        try:
            entry = _read_private(self._folder, name)
            if entry is None:
                return None
            code = self._decoded(name, entry)
            with contextlib.suppress(OSError):
                os.utime(self._folder)
        except OSError:
            return None
        return code

    def save(self, name: str, code: Code) -> None:
        """Save ``code`` as ``name``, replacing an existing entry; does nothing if the folder cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                try:
                    header = {"name": name, "maker": self._maker, "scratch_bytes": code.scratch_bytes}
                    payload = json.dumps(header).encode() + b"\n" + code.object_code
                    file.write(_MAGIC + hashlib.sha256(payload).digest() + payload)
                    file.close()
                    os.replace(file.name, self._folder / name)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise
            self._prune()
        except OSError as error:
            _LOG.debug("compiled kernels are not kept in %s: %s", self._folder, error.strerror)

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
        """Remove the folders of the least recently used makers, and temporary files that killed processes left."""
        others = [path for path in self._root.iterdir() if re.fullmatch("[0-9a-f]{20}", path.name)]
        others.sort(key=lambda path: path.lstat().st_mtime, reverse=True)
        for path in others[_N_MAKERS_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(".*"):
            if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                path.unlink()


def _read_private(folder: Path, name: str) -> bytes | None:
    """The bytes of a file in ``folder``; None unless both are private.

    The opened folder and file are checked, so that none can be put in their place after the check. Windows opens no
    folders: there the paths are checked for symbolic links, and the user's folders are protected by inherited rights.
    """
    with contextlib.ExitStack() as opened:
        if sys.platform == "win32":
            folder_status, file_status = folder.lstat(), (folder / name).lstat()
            file = opened.enter_context(open(folder / name, "rb"))
        else:
            folder_id = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            opened.callback(os.close, folder_id)
            # not to wait for the writer of a pipe
            file_id = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_id)
            file = opened.enter_context(open(file_id, "rb"))
            folder_status, file_status = os.fstat(folder_id), os.fstat(file_id)
        if _is_private(folder_status, stat.S_ISDIR) and _is_private(file_status, stat.S_ISREG):
            return file.read(_MAX_ENTRY_BYTES + 1)
    return None


def _is_private(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether a path is of the kind that ``is_kind`` tests, and only this user and root can write to it."""
    if not is_kind(status.st_mode):
        return False
    return sys.platform == "win32" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


@cache
def source_hash(folder: Path) -> str | None:
    """A SHA-256 of all Python files of a package's folder, in hexadecimal; None if they cannot be read (an archive)."""
    found = hashlib.sha256()
    try:
        for path in sorted(folder.glob("*.py")):
            found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    except OSError:
        return None
    return found.hexdigest() if any(folder.glob("*.py")) else None
