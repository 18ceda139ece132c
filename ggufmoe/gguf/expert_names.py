"""What a merged model's file says of its making: what its experts are called, and where its router comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.hyper import Hyper, TypedMetadata
from ggufmoe.gguf.own_keys import GATE_MODE, RECIPE

_MAX_CHARS = 24
_MAX_RECIPE_CHARS = 1 << 20


def expert_names(metadata: Mapping[str, GGUFValue]) -> tuple[str, ...]:
    """A short name for each expert, all different; ``expert N`` where the file carries no recipe that names them."""
    numbered = (f"expert {expert}" for expert in range(min(Hyper.of(metadata).n_expert, 1 << 16)))
    return recipe_names(metadata) or tuple(numbered)


def recipe_names(metadata: Mapping[str, GGUFValue]) -> tuple[str, ...]:
    """A short name for each expert by the recipe in the file, all different; empty if there is none."""
    names = [_short(source) for source in _sources(_recipe(metadata))]
    if len(names) != Hyper.of(metadata).n_expert or not all(names):
        return ()
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


_ORIGINS = {
    "fitted": "fitted on texts",
    "router": "taken from another model",
    "random": "random",
    "uniform_random": "random",
}


def router_origin(metadata: Mapping[str, GGUFValue]) -> str | None:
    """How the router was made, for people; None where the file does not say."""
    mode = TypedMetadata(metadata).text(GATE_MODE)
    return None if mode is None else _ORIGINS.get(mode, f"guessed from prompts ({mode})")


def base_experts(metadata: Mapping[str, GGUFValue]) -> tuple[int, ...] | None:
    """The numbers of the experts that are the base of a merged model; None where the file carries no recipe."""
    recipe = _recipe(metadata)
    sources = _sources(recipe)
    base = recipe.get("base_model")
    return tuple(number for number, source in enumerate(sources) if source == base) if sources else None


def _recipe(metadata: Mapping[str, GGUFValue]) -> Mapping[Any, Any]:
    """The recipe in the file; empty where there is none."""
    import yaml

    text = TypedMetadata(metadata).text(RECIPE)
    try:
        content: Any = yaml.safe_load(text) if text is not None and len(text) <= _MAX_RECIPE_CHARS else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _sources(recipe: Mapping[Any, Any]) -> list[str]:
    """``source_model`` of each expert of a recipe."""
    experts = recipe.get("experts")
    sources = [one.get("source_model") for one in experts if isinstance(one, dict)] if isinstance(experts, list) else []
    return [source for source in sources if isinstance(source, str)]


def _short(source: str) -> str:
    """The last part of a path or hub id, without a revision and what cannot be printed."""
    last = re.split(r"[/\\]", source.rstrip("/\\"))[-1].split("@")[0]
    name = "".join(char for char in last if char.isprintable()).strip()
    return name if len(name) <= _MAX_CHARS else name[: _MAX_CHARS - 1] + "…"
