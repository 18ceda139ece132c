"""Downloads the files that a conversion needs from the Hugging Face Hub into huggingface_hub's cache.

Small files come first, so that no weights are downloaded of a model that is not supported. Token, endpoint, cache and
offline mode are huggingface_hub's own (``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from ggufmoe.checkpoint import shards
from ggufmoe.checkpoint.config import quantization_method, read_config
from ggufmoe.checkpoint.foreign_weights import what_made
from ggufmoe.checkpoint.layouts import is_read_quantization, unread
from ggufmoe.errors import CheckpointError, HubError, one_line

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]*[\w])(@(?P<revision>[^@\s]+))?", re.ASCII)

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


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a hub id, ``org/name`` or ``org/name@revision``."""
    return _HUB_ID.fullmatch(source) is not None


def split_id(source: str, revision: str | None) -> tuple[str, str | None]:
    """Split a hub id into repository and revision (None if not given).

    Raises HubError if ``source`` is not a hub id, or names another revision than ``revision``.
    """
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise HubError(f"{source!r} is not a hub id; expected org/name or org/name@revision")
    if revision is not None and match["revision"] not in (None, revision):
        raise HubError(f"{source} names a revision already; it cannot be {revision} too")
    return match["repo"], revision or match["revision"]


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download the files that a conversion of this model needs; returns their directory in huggingface_hub's cache.

    Raises HubError, with the id and the way out, if the download fails; CheckpointError or ArchitectureError, before
    any weights are downloaded, if the model cannot be converted.
    """
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
    names = [shards.SINGLE, *(sorted(set(weight_map.values())) or [shards.NUMBERED])]
    directory = _snapshot(repo_id, directory.name, ("config.json", *names))
    shards.check_links(directory)
    if not any((directory / name).is_file() for name in names) and not any(directory.glob(shards.NUMBERED)):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{repo_id}: its weights are not in the cache, and HF_HUB_OFFLINE forbids to fetch them")
        raise CheckpointError(
            f"{repo_id} has neither {shards.SINGLE} nor {shards.INDEX}; weights in pickle files (.bin, .pth) are "
            "refused because they can run any code: look for a safetensors copy of the model"
        )
    return directory


def _snapshot(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The bases of HfHubHTTPError are those of the HTTP library that this huggingface_hub uses.
    http_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    failures: tuple[type[Exception], ...] = (OSError, ValueError, EntryNotFoundError, *http_errors)
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), tqdm_class=_silent()))
    except failures as error:
        raise _explained(f"{repo_id}@{revision}" if revision else repo_id, repo_id, error) from error


def _silent() -> Any:
    """The class of a progress bar that shows nothing, because a library must not write to the terminal."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


def _explained(where: str, repo_id: str, error: BaseException) -> HubError:
    from huggingface_hub import constants, errors

    chain = [error]  # huggingface_hub hides a refusal behind 'not found in the cache'
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    page = f"{constants.ENDPOINT}/{repo_id}"
    token = "set a token (HF_TOKEN, or `hf auth login`)"
    if any(isinstance(cause, errors.GatedRepoError) for cause in chain):
        return HubError(f"{where} is gated: accept its licence on {page} and {token}")
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in chain):
        return HubError(f"{where}: there is no such revision; {page} lists branches and tags")
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in chain):
        return HubError(
            f"{where} is neither a local directory nor a public model on {constants.ENDPOINT}; if it is private, "
            f"ask for access on {page} and {token}"
        )
    if constants.HF_HUB_OFFLINE:
        return HubError(f"{where} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it")
    return HubError(
        f"{where} cannot be fetched from {constants.ENDPOINT} and is not in the cache ({one_line(chain[-1])}); "
        "check the connection, or give a directory"
    )
