"""``/v1/embeddings``: texts or tokens as vectors, in OpenAI's objects."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from ggufmoe.gguf.hyper import Hyper
from ggufmoe.runtime.enginelike import EngineLike
from ggufmoe.server.apierror import invalid
from ggufmoe.server.asked import EmbeddingsRequest
from ggufmoe.server.text_completions import checked_tokens
from ggufmoe.work import CancelFlag


def embeddings(engine: EngineLike, asked: EmbeddingsRequest, model: str, cancel: CancelFlag) -> dict[str, Any]:
    """The response to ``asked``; clients know the model as ``model``. Raises ApiError and errors of ggufmoe.

    Raises Cancelled when ``cancel`` is set meanwhile.
    """
    n_embd = Hyper.of(engine.header.metadata).n_embd
    if asked.dimensions not in (None, n_embd):
        message = f"the embeddings of this model have {n_embd} dimensions, and cannot be shortened"
        raise invalid(message, "dimensions", "invalid_value")
    if not all(asked.input):
        raise invalid("a text of the input is empty: it has no embedding", "input")
    reading = partial(checked_tokens, engine, param="input", cancel=cancel, parse_special=False, may_cut=False)
    texts = [reading(text) for text in asked.input]
    rows = engine.embed(texts, cancel=cancel)
    in_base64 = asked.encoding_format == "base64"
    n_tokens = sum(map(len, texts))
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if in_base64 else row.tolist(),
            }
            for index, row in enumerate(rows)
        ],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
