"""What the experts of a merged model are called: the names of the models that its recipe made them of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.hyper import Hyper, TypedMetadata
from ggufmoe.gguf.own_keys import RECIPE

_MAX_CHARS = 24
_MAX_RECIPE_CHARS = 1 << 20


def expert_names(metadata: Mapping[str, GGUFValue]) -> tuple[str, ...]:
    """A short name for each expert, all different; ``expert N`` where the file carries no recipe that names them."""
    numbered = (f"expert {expert}" for expert in range(min(Hyper.of(metadata).n_expert, 1 << 16)))
    return recipe_names(metadata) or tuple(numbered)


def recipe_names(metadata: Mapping[str, GGUFValue]) -> tuple[str, ...]:
    """A short name for each expert by the recipe in the file, all different; empty if there is none."""
    recipe = TypedMetadata(metadata).text(RECIPE)
    sources = _sources(recipe) if recipe is not None and len(recipe) <= _MAX_RECIPE_CHARS else []
    names = [_short(source) for source in sources]
    if len(names) != Hyper.of(metadata).n_expert or not all(names):
        return ()
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


def _sources(recipe: str) -> list[str]:
    """``source_model`` of each expert of a recipe; empty where the text is none."""
    import yaml

    try:
        content: Any = yaml.safe_load(recipe)
    except (yaml.YAMLError, RecursionError, ValueError):
        return []
    experts = content.get("experts") if isinstance(content, dict) else None
    sources = [one.get("source_model") for one in experts if isinstance(one, dict)] if isinstance(experts, list) else []
    return [source for source in sources if isinstance(source, str)]


def _short(source: str) -> str:
    """The last part of a path or hub id, without a revision and what cannot be printed."""
    last = re.split(r"[/\\]", source.rstrip("/\\"))[-1].split("@")[0]
    name = "".join(char for char in last if char.isprintable()).strip()
    return name if len(name) <= _MAX_CHARS else name[: _MAX_CHARS - 1] + "…"
