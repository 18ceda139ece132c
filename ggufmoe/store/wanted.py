"""What a MODEL means: a GGUF file, a stored model, or something that has to be made first, and what that costs.

A MODEL is the path of a GGUF file, the name of a stored model, a checkpoint directory, a recipe, or a name on the hub:
``org/name``, ``org/name:Q4_K_M`` or ``org/name/file.gguf``, with ``@revision`` after ``org/name``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ggufmoe.errors import HubError, InputError, OptionError
from ggufmoe.files import StrPath, possible_path
from ggufmoe.gguf.header import parse_header
from ggufmoe.gguf.model import ModelHeader, Shard
from ggufmoe.hub.hub_gguf import read_hub_header
from ggufmoe.hub.hub_models import HubGGUF, HubListing, HubName, list_repository
from ggufmoe.options.convert_options import size_target
from ggufmoe.store.model_store import ModelStore

if TYPE_CHECKING:
    from ggufmoe.writing.plan import WritePlan

DEFAULT_QUANT = "Q4_K_M"
_RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class ModelPlan:
    """How a model gets into the store that is not there yet: by a conversion, or by a download.

    ``request`` is what was asked for, in one line; ``source`` what is read; ``name`` what the model is to be called.
    """

    request: str
    source: str
    quant: str
    """The file type that the conversion is asked for."""
    file_type: str
    """What the model is in the end."""
    name: str
    written_bytes: int
    read_bytes: int
    """Bytes of tensor files on this machine that are read."""
    network_bytes: int
    """Bytes that come over the network."""
    hub_model: HubGGUF | None = None
    """The GGUF files to download; None for a conversion."""
    conversion: WritePlan | None = None
    """What the conversion would write; its source is closed."""


def locate(model: StrPath, quant: str | None, store: ModelStore, *, by_request: bool = True) -> Path | None:
    """The GGUF file of a MODEL, if nothing has to be made for it; the hub is not asked.

    With ``by_request`` that is also the model that was made for the same request before. Raises InputError for what
    can be no MODEL.
    """
    path = possible_path(model)
    is_recipe = path.suffix.lower() in _RECIPES
    if path.exists() and not path.is_dir() and not is_recipe:
        return path
    if not path.exists() and (stored := store.find(os.fspath(model))) is not None:
        store.used(stored)
        return stored.path
    request = request_of(model, quant)
    if request is None:
        if path.suffix.lower() == ".gguf":
            return path  # whoever opens it says what is wrong
        raise _no_model(model, store)
    found = store.find_request(request) if by_request else None
    if found is not None:
        store.used(found)
    return None if found is None else found.path


def request_of(model: StrPath, quant: str | None) -> str | None:
    """A MODEL and a file type in one line that is the same for the same wish; None for what names nothing to make."""
    path = possible_path(model)
    if path.is_dir() or (path.is_file() and path.suffix.lower() in _RECIPES):
        return f"{path.resolve()} -q {quant or DEFAULT_QUANT}"
    name = hub_name(model)
    if name is None:
        return None
    return str(name) if quant is None or name.quant or name.file else f"{name} -q {quant}"


def plan_model(model: StrPath, quant: str | None, store: ModelStore) -> ModelPlan:
    """What has to be done for a MODEL that ``locate`` has not found. Reads headers, and asks the hub.

    Raises HubError, and the errors of ``plan_convert``.
    """
    request = request_of(model, quant)
    assert request is not None, "locate refuses what names nothing"
    name = hub_name(model)
    if name is None:
        return _plan_conversion(request, str(possible_path(model).resolve()), quant, store)
    listing = list_repository(name.repo_id, name.revision)
    found = _gguf_of(listing, name, quant)
    if found is None:
        return _plan_conversion(request, str(name), quant, store)
    stem = Path(found.stem).name
    return ModelPlan(
        request, found.name, found.quant, found.quant, stem, found.n_bytes, 0, found.n_bytes, hub_model=found
    )


def header_of(plan: ModelPlan) -> ModelHeader:
    """The header of the model that a plan makes, before it is made. Raises HubError and GGUFError."""
    if plan.hub_model is not None:
        return read_hub_header(plan.hub_model)
    assert plan.conversion is not None, "a plan is that of a download or of a conversion"
    return planned_model(plan.conversion)


def planned_model(plan: WritePlan) -> ModelHeader:
    """The header of the model that a conversion would write, as a reader of the finished file sees it."""
    (file,) = plan.files
    return ModelHeader((Shard(file.path, parse_header(file.header, Path(file.path), file.n_bytes)),))


def hub_name(model: StrPath) -> HubName | None:
    """The name on the hub that a MODEL is, if it has the form of one and is no path."""
    if not isinstance(model, str) or os.path.exists(model):
        return None
    name = HubName.parse(model)
    is_path = name is not None and name.file is None and model.lower().endswith((".gguf", *_RECIPES))
    if is_path or model.startswith(("./", "../")):
        return None
    return None if name is not None and name.file and os.path.isdir(name.repo_id) else name


def _gguf_of(listing: HubListing, name: HubName, quant: str | None) -> HubGGUF | None:
    """The GGUF model that is downloaded; None where the repository's checkpoint is converted.

    A GGUF model of the wanted type is preferred, because less comes over the network.
    """
    wanted = name
    if quant is not None and not (name.quant or name.file):
        is_file = quant.lower().endswith(".gguf")  # as -q auto names it where quants are not unique
        wanted = replace(name, file=quant) if is_file else replace(name, quant=quant)
    if name.quant or name.file or not listing.has_checkpoint:
        return listing.choose(wanted)
    try:
        return listing.choose(wanted)
    except HubError:
        return None


def _plan_conversion(request: str, source: str, quant: str | None, store: ModelStore) -> ModelPlan:
    from ggufmoe.convert import plan_convert
    from ggufmoe.export.naming import model_name

    file_type = quant or DEFAULT_QUANT
    if size_target(file_type, None, None) is not None:
        raise OptionError(
            f"-q {file_type} needs a text to measure on what an error in each weight costs; make the file with "
            f"`ggufmoe convert {source} -q {file_type} --sensitivity-text FILE`, and give that"
        )
    name = model_name(source, file_type)
    plan = plan_convert(source, store.directory / f"{name}.gguf", file_type)
    here = sum(path.stat().st_size for path in plan.input_paths if path.suffix == ".safetensors")
    network = plan.network.n_bytes if plan.network else 0
    return ModelPlan(request, source, file_type, plan.file_type, name, plan.n_bytes, here, network, conversion=plan)


def _no_model(model: StrPath, store: ModelStore) -> InputError:
    import difflib

    near = difflib.get_close_matches(os.fspath(model), [stored.name for stored in store.models()], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `ggufmoe list` shows the stored ones"
    return InputError(
        f"{model} is neither a file, a stored model, a checkpoint directory nor a name on the hub (org/name){hint}"
    )
