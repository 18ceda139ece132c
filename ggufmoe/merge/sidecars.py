"""What stands beside the weights of a merged checkpoint: config, tokenizer, chat template, model card and record.

Owns their content only; the weights are laid out by ``checkpoint.save`` and all of it is written by ``convert.merge``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ggufmoe.checkpoint.jsonfile import read_capped, read_object
from ggufmoe.checkpoint.provenance import RECORD, record_json
from ggufmoe.checkpoint.source import Provenance
from ggufmoe.gguf.own_keys import RECIPE
from ggufmoe.merge.merged import MergedModel

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_FOLDER = "additional_chat_templates"
_MAX_TOKENIZER_BYTES = 256 << 20


def sidecar_files(model: MergedModel, index: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Every file but the weights, by its name in the directory; ``index`` is that of the shards, if there are several.

    Raises CheckpointError if a file of the tokenizer's directory cannot be read.
    """
    files = {"config.json": _json(dict(model.config.raw)), **_generation_config(model), **_tokenizer(model)}
    if index is not None:
        files["model.safetensors.index.json"] = _json(index)
    files["README.md"] = _model_card(model).encode()
    files[RECORD] = record_json(model.provenance)
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _generation_config(model: MergedModel) -> dict[str, bytes]:
    """The tokenizer's own where there is one, else the ids that every generation needs, all ends of a text included."""
    path = model.tokenizer_dir / "generation_config.json"
    if path.is_file():
        return {path.name: read_capped(path)}
    ends = model.config.raw.get("eos_token_id")
    eos = ends if isinstance(ends, list) else model.config.eos_token_id
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": eos}
    known = {key: value for key, value in ids.items() if value is not None}
    return {path.name: _json(known)} if known else {}


def _tokenizer(model: MergedModel) -> dict[str, bytes]:
    directory = model.tokenizer_dir
    files = _present(directory, _TOKENIZER_FILES)
    if model.chat_template is None:
        extra = tuple(f"{_TEMPLATE_FOLDER}/{path.name}" for path in (directory / _TEMPLATE_FOLDER).glob("*.jinja"))
        return files | _present(directory, _TEMPLATE_FILES + extra)
    if "tokenizer_config.json" not in files:
        return files | {"chat_template.jinja": model.chat_template.encode()}
    settings = read_object(directory / "tokenizer_config.json") | {"chat_template": model.chat_template}
    return files | {"tokenizer_config.json": _json(settings)}


def _present(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: read_capped(directory / name, _MAX_TOKENIZER_BYTES) for name in names if (directory / name).is_file()}


def _model_card(model: MergedModel) -> str:
    """A card like those that merges are published with: where it comes from, the recipe, how to use it."""
    recipe, provenance = model.recipe, model.provenance
    rows = f"`{recipe.gate_mode.value}`" + (" from the prompts below" if recipe.gate_mode.needs_prompts else "")
    sources = "\n".join(f"* {_link(base)}" for base in map(asdict, provenance.base_models))
    return f"""---
{yaml.safe_dump(_front_matter(provenance), sort_keys=False, allow_unicode=True)}---

# {provenance.name}

A Mixture of Experts made with ggufmoe from:

{sources}

Attention, embeddings and norms are those of `{recipe.base_model}`. Each layer has {len(recipe.experts)} experts,
of which {recipe.experts_per_token} answer each token. The router was not trained: its rows were made by gate mode
{rows}.

## Recipe

```yaml
{provenance.extra[RECIPE].strip()}
```

## Usage

```sh
ggufmoe convert . -o model.gguf -q Q4_K_M
ggufmoe chat model.gguf
```
"""


def _front_matter(provenance: Provenance) -> dict[str, Any]:
    ids = [base.repo_url.removeprefix("https://huggingface.co/") for base in provenance.base_models if base.repo_url]
    known = {
        "license": provenance.license,
        "license_name": provenance.license_name,
        "license_link": provenance.license_link,
        "language": list(provenance.languages),
        "base_model": ids,
        "tags": list(provenance.tags),
    }
    return {key: value for key, value in known.items() if value}


def _link(base: dict[str, Any]) -> str:
    return f"[{base['name']}]({base['repo_url']})" if base["repo_url"] else f"`{base['name']}`"
