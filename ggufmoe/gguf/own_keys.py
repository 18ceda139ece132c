"""Metadata keys of ggufmoe's own: what GGUF has no key for, written by the convert half and read by the run half.

llama.cpp ignores keys that it does not know, so a file with these runs there as well.
"""

from __future__ import annotations

EOS_TOKEN_IDS = "ggufmoe.eos_token_ids"
"""UINT32 array: every token that ends a text. Written where there are more than the eos, eot and eom keys can name."""

SLIDING_WINDOW = "ggufmoe.sliding_window"
"""UINT32: the attention window that the model was trained with and that llama.cpp does not apply to it, in tokens."""

RECIPE = "ggufmoe.recipe"
"""STRING: the text of the recipe that a merged model was made by."""

GATE_MODE = "ggufmoe.gate_mode"
"""STRING: how a merged model's router rows were made, in the recipe's words."""

REFIT = "ggufmoe.refit"
"""STRING, a JSON object: how the router was replaced in the GGUF file, where it was: ``version`` of ggufmoe, and
``texts`` (for each expert the names of its files), ``text_tokens`` and ``seed``, or ``router``, the name of the model
that it was taken from; ``sha256`` of the tokens, or of the rows."""

VERSION = "ggufmoe.version"
"""STRING: the version of ggufmoe that merged the model."""

MIX = "ggufmoe.mix"
"""STRING, a JSON object: how the types of a file of a given size were chosen. ``name`` is what the file is called, by
its bits; ``predicted_kl`` and ``standard`` (``name``, ``bytes``, ``predicted_kl`` of the best standard mix that is no
larger) are predictions, ``types`` the option, ``sensitivity`` what was measured, ``version`` that of ggufmoe."""
