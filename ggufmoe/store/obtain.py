"""Gets a model into the store: converts or downloads it, once, though several processes ask for it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ggufmoe.errors import Cancelled, HubError, OutputError, ResumeError
from ggufmoe.files import StrPath
from ggufmoe.hub.hub_models import HubEntry, HubGGUF
from ggufmoe.store.download import download, hash_files
from ggufmoe.store.model_store import ModelStore, StoredModel
from ggufmoe.store.records import ModelRecord, StoredFile, input_states, now
from ggufmoe.store.wanted import ModelPlan, locate, plan_model
from ggufmoe.work import CancelFlag, OnProgress, Progress, is_set

_POLL_S = 0.2
_RESUME = "go on with --resume"
_AGAIN = "the same command goes on with it"


def obtain(
    model: StrPath,
    quant: str | None = None,
    *,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Path:
    """The GGUF file of a model, which is converted or downloaded into the store if it is not there yet.

    ``model`` is the path of a GGUF file, the name of a stored model, a checkpoint directory, a recipe, or a name on the
    hub (``org/name``, ``org/name:Q4_K_M``, ``org/name/file.gguf``). ``quant`` is the file type, by default Q4_K_M, or
    what a repository has. An interrupted call is continued by the next one. The store is the folder ``models`` in
    ``$GGUFMOE_HOME`` or in the user's data folder.

    Raises InputError for what is no model, HubError, the errors of ``convert``, and Cancelled.
    """
    store = ModelStore()
    found = locate(model, quant, store)
    if found is not None:
        return found
    return make_model(plan_model(model, quant, store), store, on_progress=on_progress, cancel=cancel)


def make_model(
    plan: ModelPlan,
    store: ModelStore,
    *,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Path:
    """Carry out a plan; returns the file to load. What another process makes meanwhile is waited for and taken."""

    def wait(owner: str) -> None:
        if is_set(cancel):
            raise Cancelled("stopped")
        if on_progress is not None:
            on_progress(Progress("waiting", 0, 1, "parts", f"{owner} makes this model"))
        time.sleep(_POLL_S)

    record = ModelRecord(plan.source, plan.file_type, (plan.request,))
    name = store.claim(plan.name, record, wait)
    with store.making(name, wait):
        made = store.find(name)
        if made is None or made.record is None or not made.record.is_current:
            with _own_words():
                made = _make(plan, name, store, on_progress, cancel)
        store.used(made, plan.request)
    return made.path


def _make(
    plan: ModelPlan, name: str, store: ModelStore, on_progress: OnProgress | None, cancel: CancelFlag | None
) -> StoredModel:
    make = _convert if plan.hub_model is None else _download
    record = make(plan, name, store, on_progress, cancel)
    replace(record, made=now()).write(store.record_path(name))
    found = store.find(name)
    if found is None:
        raise OutputError(f"{store.directory / name} was deleted while it was made; ask for it again")
    return found


def _convert(
    plan: ModelPlan, name: str, store: ModelStore, on_progress: OnProgress | None, cancel: CancelFlag | None
) -> ModelRecord:
    from huggingface_hub import constants

    from ggufmoe.convert import convert
    from ggufmoe.options import ConvertOptions

    output, options = store.directory / f"{name}.gguf", ConvertOptions(quant=plan.quant, resume=True, force=True)
    try:
        result = convert(plan.source, output, options=options, on_progress=on_progress, cancel=cancel)
    except ResumeError:  # the source has changed since
        afresh = replace(options, resume=False)
        result = convert(plan.source, output, options=afresh, on_progress=on_progress, cancel=cancel)
    cache = Path(constants.HF_HUB_CACHE).resolve()  # what is there never changes, and may be deleted
    return ModelRecord(
        plan.source,
        plan.file_type,
        (plan.request,),
        files=_stored_files(result.paths, hash_files(result.paths, on_progress=on_progress, cancel=cancel)),
        commits=result.plan.commits,
        inputs=input_states(result.plan.input_paths, outside=(cache,)),
        options={"quant": plan.quant},
    )


def _download(
    plan: ModelPlan, name: str, store: ModelStore, on_progress: OnProgress | None, cancel: CancelFlag | None
) -> ModelRecord:
    model = plan.hub_model
    assert model is not None, "the plan is that of a download"
    n_files = len(model.entries)
    parts = [""] if n_files == 1 else [f"-{number:05d}-of-{n_files:05d}" for number in range(1, n_files + 1)]
    targets = [store.directory / f"{name}{part}.gguf" for part in parts]
    for entry, target in zip(model.entries, targets, strict=True):
        _link_cached(model, entry, target)
    hashes = download(model, targets, on_progress=on_progress, cancel=cancel)
    return ModelRecord(
        plan.source,
        plan.file_type,
        (plan.request,),
        files=_stored_files(targets, hashes),
        commits={model.repo_id: model.commit},
    )


def _link_cached(model: HubGGUF, entry: HubEntry, target: Path) -> None:
    """Give a file that the hub's cache has a second name in the store, where the file system can do that."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.repo_id, entry.name, revision=model.commit)
    if isinstance(cached, str):
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(cached), target)


def _stored_files(paths: Sequence[Path], hashes: Sequence[str]) -> tuple[StoredFile, ...]:
    return tuple(StoredFile(path.name, path.stat().st_size, digest) for path, digest in zip(paths, hashes, strict=True))


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """In messages of the block, say that the next call goes on by itself, where they speak of --resume."""
    try:
        yield
    except (OutputError, HubError, Cancelled) as error:
        if isinstance(error, Cancelled) and _RESUME not in str(error):
            raise Cancelled(f"stopped; what is there is kept, and {_AGAIN}") from error
        if _RESUME not in str(error):
            raise
        raise type(error)(str(error).replace(_RESUME, _AGAIN)) from error
