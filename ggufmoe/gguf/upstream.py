"""The constants of the ``gguf`` package: metadata keys, numbers of types, names of architectures and tensors.

Only ``gguf.constants`` is loaded: the package's ``__init__`` imports numpy, yaml, sentencepiece and, where it is
installed, mistral_common, which takes 110 ms of processor time and more (gguf 0.19.0) instead of 10, and every command
that reads a header needs the constants.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any


def _constants() -> Any:
    """The module ``gguf.constants``. Raises ModuleNotFoundError where the package is not installed."""
    if "gguf.constants" in sys.modules:
        return sys.modules["gguf.constants"]
    package = find_spec("gguf")
    folders = None if package is None else package.submodule_search_locations
    spec = PathFinder.find_spec("constants", folders) if folders else None
    if spec is None or spec.loader is None or not Path(spec.origin or "").is_file():
        # in an archive, as those of frozen apps, the package has to be imported as a whole
        return importlib.import_module("gguf.constants")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_module = _constants()
Keys = _module.Keys
"""Metadata keys by section, for example ``Keys.LLM.BLOCK_COUNT``: ``{arch}.block_count``."""
GGML_QUANT_SIZES = _module.GGML_QUANT_SIZES
GGMLQuantizationType = _module.GGMLQuantizationType
GGUFValueType = _module.GGUFValueType
ExpertGatingFuncType = _module.ExpertGatingFuncType
LlamaFileType = _module.LlamaFileType
TokenType = _module.TokenType
LLAMA: str = _module.MODEL_ARCH_NAMES[_module.MODEL_ARCH.LLAMA]
"""The architecture of Llama, Mistral and Mixtral models."""
MODEL_ARCH = _module.MODEL_ARCH
MODEL_ARCH_NAMES = _module.MODEL_ARCH_NAMES
"""Names of architectures, for example ``qwen3moe``, by ``MODEL_ARCH``."""
MODEL_TENSOR = _module.MODEL_TENSOR
TENSOR_NAMES = _module.TENSOR_NAMES
"""Names of tensors, for example ``blk.{bid}.attn_q``, by ``MODEL_TENSOR``."""
DEFAULT_ALIGNMENT: int = _module.GGUF_DEFAULT_ALIGNMENT
QUANTIZATION_VERSION: int = _module.GGML_QUANT_VERSION
