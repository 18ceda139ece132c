"""Gets what a conversion needs from the Hugging Face Hub: small files through huggingface_hub's cache, and weights by
ranges (``hub.hub_file``), so that nothing of them is stored, or into the cache as well where they are to be kept.

Small files come first, so that no weights are fetched of a model that is not supported. Token, endpoint, cache and
offline mode are huggingface_hub's own (``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint import shards
from ggufmoe.checkpoint.config import quantization_method, read_config
from ggufmoe.checkpoint.foreign_weights import what_made
from ggufmoe.checkpoint.layouts import is_read_quantization, unread
from ggufmoe.checkpoint.safetensors import TensorFile
from ggufmoe.checkpoint.shards import Elsewhere
from ggufmoe.errors import CheckpointError, HubError
from ggufmoe.hub.hub_errors import explained, hub_failures, is_offline
from ggufmoe.hub.hub_file import HubFile, Line
from ggufmoe.hub.hub_models import split_id

_AT_ONCE = 8
"""Requests at once that ask where files are."""

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    shards.INDEX,
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "README.md",
    "ggufmoe.json",
)


@dataclass(frozen=True)
class HubModel:
    """A model of the hub whose files are read by ranges: as it was named, at which commit, and what is read of it."""

    source: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def identity(self) -> tuple[str, ...]:
        """What the bytes of the model depend on."""
        return (self.source, self.commit, *(f"{file.path.name} {file.n_bytes} {file.etag}" for file in self.files))


class HubAccess:
    """How models of the hub are reached in one conversion, and which were: shared by all sources of a recipe.

    ``keep_source`` downloads whole files into huggingface_hub's cache; otherwise only small files go there, and tensor
    files that are not in it are read by ranges. ``pins`` are commits by the names of models, from an interrupted run.
    """

    def __init__(
        self, *, keep_source: bool = False, pins: Mapping[str, str] | None = None, line: Line | None = None
    ) -> None:
        self.line = line or Line()
        self.origins: list[HubModel] = []
        self.header_bytes = 0
        """What was read of files to open them."""
        self.cached_bytes = 0
        """Size of the tensor files that are read from huggingface_hub's cache."""
        self._keep_source = keep_source
        self._pins = pins or {}

    def open(self, source: str, revision: str | None = None) -> tuple[Path, Elsewhere]:
        """The directory of a model's small files in the cache, and the tensor files that are not in it.

        Raises HubError, with the id and the way out, if the hub does not give them; CheckpointError or
        ArchitectureError, before any weights are fetched, if the model cannot be converted.
        """
        repo_id, revision = split_id(source, revision)
        revision = self._pins.get(source, revision)
        directory, names = _small_files(repo_id, revision)
        if self._keep_source or is_offline():
            _fetch_weights(repo_id, directory, names)
        elsewhere: Elsewhere = {}
        if not shards.are_complete(directory):  # else the hub need not be reached
            elsewhere = self._by_ranges(source, repo_id, directory, names)
        self.cached_bytes += sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        return directory, elsewhere

    def _by_ranges(self, source: str, repo_id: str, directory: Path, names: Sequence[str]) -> Elsewhere:
        commit = directory.name

        def opened(name: str) -> tuple[HubFile, TensorFile]:
            file = HubFile(repo_id, name, commit, self.line)
            return file, TensorFile(file)

        try:
            missing = [name for name in _there(repo_id, commit, names) if not (directory / name).is_file()]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                pairs = list(pool.map(opened, missing))
        except hub_failures() as error:
            raise explained(f"{repo_id}@{commit}", repo_id, error) from error
        self.header_bytes = self.line.n_bytes
        if pairs:
            self.origins.append(HubModel(source, commit, tuple(file for file, _ in pairs)))
        return {name: file for name, (_, file) in zip(missing, pairs, strict=True)}


def _small_files(repo_id: str, revision: str | None) -> tuple[Path, list[str]]:
    """Download the small files of a model that can be converted: their directory, and names of its tensor files."""
    directory = _snapshot(repo_id, revision, SMALL_FILES)
    shards.check_links(directory)
    config = read_config(directory)
    method = quantization_method(config.raw)
    index = directory / shards.INDEX
    weight_map = shards.parse_index(index) if index.is_file() else {}
    if (made := what_made(unread(config, weight_map))) is not None:
        raise CheckpointError(f"{repo_id} {made}")
    # fine-tuning leaves a method in the config of weights that are not quantized, bitsandbytes above all; names or
    # weights that are here already say more than the config
    harmless = method in (None, "bitsandbytes") or is_read_quantization(config)
    if not harmless and not weight_map and not (directory / shards.SINGLE).is_file():
        raise CheckpointError(f"{repo_id} is quantized already ({method!r:.40}); use the original model")
    return directory, [shards.SINGLE, *(sorted(set(weight_map.values())) or [shards.NUMBERED])]


def _fetch_weights(repo_id: str, directory: Path, names: Sequence[str]) -> None:
    """Download the tensor files of a model."""
    _snapshot(repo_id, directory.name, ("config.json", *names))
    shards.check_links(directory)
    if not any((directory / name).is_file() for name in names) and not any(directory.glob(shards.NUMBERED)):
        if is_offline():
            raise HubError(f"{repo_id}: its weights are not in the cache, and HF_HUB_OFFLINE forbids to fetch them")
        raise _no_weights(repo_id)


def _there(repo_id: str, commit: str, names: Sequence[str]) -> list[str]:
    """The tensor files of a model, by the names and patterns that a download of it asks for."""
    from huggingface_hub import HfApi

    there = HfApi().list_repo_files(repo_id, revision=commit)
    if shards.SINGLE in there:
        return [shards.SINGLE]
    found = [name for name in there if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]
    if not found:
        raise _no_weights(repo_id)
    return found


def _no_weights(repo_id: str) -> CheckpointError:
    return CheckpointError(
        f"{repo_id} has neither {shards.SINGLE} nor {shards.INDEX}; weights in pickle files (.bin, .pth) are "
        "refused because they can run any code: look for a safetensors copy of the model"
    )


def _snapshot(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), tqdm_class=_silent()))
    except hub_failures() as error:
        raise explained(f"{repo_id}@{revision}" if revision else repo_id, repo_id, error) from error


def _silent() -> Any:
    """The class of a progress bar that shows nothing, because a library must not write to the terminal."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
