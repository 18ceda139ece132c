"""Names of models on the hub, what a repository holds, and which GGUF files of it a name means.

A name is ``org/name``, ``org/name:Q4_K_M`` or ``org/name/file.gguf``, where ``@revision`` may follow ``org/name``.
Quants are chosen as llama.cpp's ``-hf`` chooses them (``find_best_model`` of common/download.cpp), but a name that fits
several models is an error. Nothing is downloaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ggufmoe.errors import HubError
from ggufmoe.hub.hub_errors import explained, hub_failures

_REPO = r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]*[\w])"
_ID = re.compile(rf"{_REPO}(@(?P<revision>[^@:\s]+))?", re.ASCII)
_OF_FILE = re.compile(
    rf"{_REPO}(@(?P<revision>refs/[^/@:\s]+/[^/@:\s]+|[^/@:\s]+))?/(?P<file>[^@:\s]+\.gguf)", re.ASCII | re.IGNORECASE
)
_OF_QUANT = re.compile(rf"{_REPO}(@(?P<revision>[^@:\s]+))?:(?P<quant>[\w.-]+)", re.ASCII)

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.ASCII)
_QUANT = re.compile(r"(?:.*?[-._])?(?P<quant>(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|FP?16|FP?32|(?:MX|NV)FP4\w*))", re.I)
_DEFAULTS = ("Q4_K_M", "Q8_0")
"""Quants that are taken, in this order, where a name does not say which."""
_MOST_SHOWN = 24
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""In names of GGUF files that belong to a model and are none (``gguf_filename_is_model`` of common/download.cpp)."""


@dataclass(frozen=True)
class HubName:
    """A model as it is named: a repository, and perhaps a revision and a quant or a GGUF file of it."""

    repo_id: str
    revision: str | None = None
    quant: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """What ``text`` names, or None if it has not the form of a name. Paths that exist take precedence."""
        if (match := _OF_FILE.fullmatch(text)) is not None:
            return cls(match["repo"], match["revision"], file=match["file"])
        if (match := _OF_QUANT.fullmatch(text)) is not None:
            return cls(match["repo"], match["revision"], quant=match["quant"])
        match = _ID.fullmatch(text)
        return None if match is None else cls(match["repo"], match["revision"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        rest = f":{self.quant}" if self.quant else f"/{self.file}" if self.file else ""
        return f"{self.repo_id}{revision}{rest}"


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a hub id, ``org/name`` or ``org/name@revision``."""
    return _ID.fullmatch(source) is not None


def split_id(source: str, revision: str | None) -> tuple[str, str | None]:
    """Split a hub id into repository and revision (None if not given).

    Raises HubError if ``source`` is not a hub id, or names another revision than ``revision``.
    """
    match = _ID.fullmatch(source)
    if match is None:
        raise HubError(f"{source!r} is not a hub id; expected org/name or org/name@revision")
    if revision is not None and match["revision"] not in (None, revision):
        raise HubError(f"{source} names a revision already; it cannot be {revision} too")
    return match["repo"], revision or match["revision"]


@dataclass(frozen=True)
class HubEntry:
    """One file of a repository: its path there, its size, and the SHA-256 of its content if it is in git-lfs."""

    name: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubGGUF:
    """One GGUF model of a repository at a commit; ``entries`` are its files in order, several of a split one."""

    repo_id: str
    commit: str
    entries: tuple[HubEntry, ...]

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.n_bytes for entry in self.entries)

    @property
    def is_whole(self) -> bool:
        """Whether all parts are there of which the names tell."""
        return len(self.entries) == _stem(self.entries[0].name)[2]

    @property
    def stem(self) -> str:
        """The path of the model in the repository without the number of a part and without ``.gguf``."""
        return _stem(self.entries[0].name)[0]

    @property
    def quant(self) -> str:
        """The quant in the name of the file, else in that of its folder, in capitals; empty if none is named."""
        path = PurePosixPath(self.stem)
        found = (_QUANT.fullmatch(text) for text in (path.name, path.parent.name))
        return next((match["quant"].upper() for match in found if match), "")

    @property
    def name(self) -> str:
        """What names the model: ``org/name/file.gguf``, of a split model its first file."""
        return f"{self.repo_id}/{self.entries[0].name}"


@dataclass(frozen=True)
class HubListing:
    """The files of a repository at a commit."""

    repo_id: str
    commit: str
    entries: tuple[HubEntry, ...]

    @property
    def has_checkpoint(self) -> bool:
        """Whether it has a configuration and tensor files, which can be converted."""
        names = {entry.name for entry in self.entries}
        return "config.json" in names and any("/" not in name and name.endswith(".safetensors") for name in names)

    @property
    def gguf_models(self) -> tuple[HubGGUF, ...]:
        """The GGUF models, ordered by name; projectors, importance matrices and draft models are left out."""
        groups: dict[tuple[str, int], list[HubEntry]] = {}
        for entry in sorted(self.entries, key=lambda entry: entry.name):
            path = PurePosixPath(entry.name)
            if path.suffix.lower() == ".gguf" and not any(word in path.name.lower() for word in _NO_MODELS):
                stem, _, count = _stem(entry.name)
                groups.setdefault((stem, count), []).append(entry)
        return tuple(HubGGUF(self.repo_id, self.commit, tuple(group)) for group in groups.values())

    def choose(self, name: HubName) -> HubGGUF:
        """The GGUF model that ``name`` means: that of its file (any part of a split model), or that of its quant.

        A name without either means Q4_K_M, else Q8_0, else the only model.

        Raises HubError, with what there is, if no model fits, several do, or parts of it are missing.
        """
        models = self.gguf_models
        if not models:
            way_out = f"; `ggufmoe convert {self.repo_id}` makes one" if self.has_checkpoint else ""
            raise HubError(f"{self.repo_id} has no GGUF file of a model{way_out}")
        found = _fitting(models, name)
        if not found:
            raise HubError(f"{name}: there is no such GGUF file; {self.repo_id} has {_shown(models)}")
        if len(found) > 1:
            raise HubError(f"{name}: several models fit; name one: {_shown(found, by_name=True)}")
        if not found[0].is_whole:
            _, _, count = _stem(found[0].entries[0].name)
            raise HubError(
                f"{found[0].name}: {len(found[0].entries)} of {count} parts are there; the hub's copy is broken"
            )
        return found[0]


def list_repository(repo_id: str, revision: str | None = None) -> HubListing:
    """The files of a model's repository, by one request to the hub. Raises HubError with the way out."""
    from huggingface_hub import HfApi

    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        found = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except hub_failures() as error:
        raise explained(where, repo_id, error) from error
    if found.sha is None:
        raise HubError(f"{where}: the hub does not say which commit it is")
    entries = (
        HubEntry(one.rfilename, one.size or 0, None if one.lfs is None else one.lfs.sha256)
        for one in found.siblings or ()
        if ".." not in PurePosixPath(one.rfilename).parts and not one.rfilename.startswith("/")  # leads out of it
    )
    return HubListing(repo_id, found.sha, tuple(entries))


def find_gguf(name: HubName) -> HubGGUF:
    """The GGUF model on the hub that ``name`` means, by one request. Raises HubError with the way out."""
    return list_repository(name.repo_id, name.revision).choose(name)


def _stem(name: str) -> tuple[str, int, int]:
    """The path of a GGUF file without its ending, and which of how many parts it is."""
    stem = name[: -len(".gguf")]
    match = _PART.fullmatch(stem)
    return (stem, 1, 1) if match is None else (match["stem"], int(match["number"]), int(match["count"]))


def _fitting(models: Sequence[HubGGUF], name: HubName) -> list[HubGGUF]:
    if name.file is not None:
        return [model for model in models if any(entry.name == name.file for entry in model.entries)]
    if name.quant is not None:
        return _of_quant(models, name.quant)
    if len(models) == 1:
        return list(models)
    return next((found for quant in _DEFAULTS if (found := _of_quant(models, quant))), list(models))


def _of_quant(models: Sequence[HubGGUF], quant: str) -> list[HubGGUF]:
    """The models whose quant it is, else those whose name ends in it, else those that have it anywhere."""
    exact = [model for model in models if model.quant == quant.upper()]
    ending = [model for model in models if re.search(rf"[-._/]{re.escape(quant)}$", model.stem, re.IGNORECASE)]
    inside = [model for model in models if re.search(rf"{re.escape(quant)}[.-]", model.stem, re.IGNORECASE)]
    return exact or ending or inside


def _shown(models: Iterable[HubGGUF], *, by_name: bool = False) -> str:
    """Quants, or file names where the models have none or the same ones."""
    words = [model.quant for model in models]
    if by_name or not all(words) or len(set(words)) < len(words):
        words = [model.entries[0].name for model in models]
    return ", ".join(words[:_MOST_SHOWN]) + (
        f" and {len(words) - _MOST_SHOWN} more" if len(words) > _MOST_SHOWN else ""
    )


_MOST_SHOWN = 24
