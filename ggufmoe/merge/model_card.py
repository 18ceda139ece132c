"""The model card of a merge: the README.md that Hugging Face shows, with the front matter that it reads."""

from __future__ import annotations

from typing import Any

import yaml

from ggufmoe.checkpoint.source import Provenance
from ggufmoe.gguf.own_keys import RECIPE
from ggufmoe.merge.recipe import Recipe


def model_card(recipe: Recipe, provenance: Provenance) -> str:
    """The README.md of a merged checkpoint: where it comes from, the recipe, how to use it."""
    rows = f"`{recipe.gate_mode.value}`" + (" from the prompts below" if recipe.gate_mode.needs_prompts else "")
    sources = "\n".join(
        f"* [{base.name}]({base.repo_url})" if base.repo_url else f"* `{base.name}`" for base in provenance.base_models
    )
    also = f", and a shared expert of `{recipe.shared.source_model}` that answers every token" if recipe.shared else ""
    return f"""---
{yaml.safe_dump(_front_matter(provenance), sort_keys=False, allow_unicode=True)}---

# {provenance.name}

A Mixture of Experts made with ggufmoe from:

{sources}

Attention, embeddings and norms are those of `{recipe.base_model}`. Each layer has {len(recipe.experts)} experts,
of which {recipe.experts_per_token} answer each token{also}. The router was not trained: its rows were made by gate mode
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
