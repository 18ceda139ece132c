"""What transformers makes of chat templates, by ``apply_chat_template`` of a tokenizer. Loads no torch.

usage: templates_reference.py JOBS.json

The file holds ``{"tokens": {...}, "jobs": [{"template", "messages", "variables"}, ...]}``. Prints a list of
``{"text"}`` or ``{"error"}``, in the order of the jobs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast


def main() -> int:
    """Render every job; what a template raises is its result."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **asked["tokens"])

    def rendered(job: dict[str, Any]) -> dict[str, str]:
        try:
            text = tokenizer.apply_chat_template(
                job["messages"], chat_template=job["template"], tokenize=False, **job["variables"]
            )
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"text": text}

    json.dump([rendered(job) for job in asked["jobs"]], sys.stdout)
    assert "torch" not in sys.modules, "rendering a template needs no torch"
    return 0


if __name__ == "__main__":
    sys.exit(main())
