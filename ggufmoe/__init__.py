"""Mixture-of-Experts models from recipe to laptop: merge, quantize to GGUF and chat, in one pass.

The public names are bound when they are first used, so that importing the package loads nothing heavy.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ggufmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from ggufmoe.best.best_file import BestFile
    from ggufmoe.best.best_file import best_file as best_file
    from ggufmoe.best.measured_files import Measured
    from ggufmoe.best.memory_budget import MemorySums
    from ggufmoe.convert import convert as convert
    from ggufmoe.convert import merge as merge
    from ggufmoe.engine import Engine
    from ggufmoe.errors import (
        ArchitectureError,
        Cancelled,
        CheckpointError,
        ContextFullError,
        DecodeError,
        EngineError,
        EngineLostError,
        EngineMissingError,
        GGUFError,
        GgufmoeError,
        HubError,
        ImatrixError,
        InputError,
        ModelLoadError,
        NonFiniteError,
        NoSpaceError,
        OptionError,
        OutputError,
        OutputExistsError,
        RecipeError,
        ResumeError,
        SafetensorsError,
        TemplateError,
        TensorMismatchError,
        TokenizerError,
        WorkerError,
        WorkerLostError,
    )
    from ggufmoe.evaluation.divergence import Comparison, Distribution, Divergence, kl_divergence, kl_divergences
    from ggufmoe.evaluation.imatrix import ImatrixResult, LayerCoverage
    from ggufmoe.evaluation.imatrix import imatrix as imatrix
    from ggufmoe.evaluation.perplexity import Estimate, Perplexity, perplexity
    from ggufmoe.evaluation.speed_of_types import type_speeds as type_speeds
    from ggufmoe.options import (
        ContextOptions,
        ConvertOptions,
        EvaluationOptions,
        ImatrixOptions,
        MergeOptions,
        OffloadOptions,
        QuantizeOptions,
        RefitOptions,
        RoutingOptions,
        SamplingOptions,
        SensitivityOptions,
        SizedOptions,
        TemplateOptions,
        WorkerOptions,
    )
    from ggufmoe.quant.type_speeds import TypeSpeeds
    from ggufmoe.quantize import quantize as quantize
    from ggufmoe.refit import refit as refit
    from ggufmoe.routing import RoutedToken, RoutingTrace, RoutingTracer, trace_routing
    from ggufmoe.runtime.chat import Chat
    from ggufmoe.runtime.chatformat import ChatFormat
    from ggufmoe.runtime.events import Reasoning
    from ggufmoe.runtime.llamacpp import LlamaCpp as LlamaCpp
    from ggufmoe.runtime.messages import Message, Tool, ToolCall
    from ggufmoe.sensitivity import SensitivityResult
    from ggufmoe.sensitivity import sensitivity as sensitivity
    from ggufmoe.store.obtain import obtain as obtain
    from ggufmoe.work import CancelFlag, Progress

__all__ = [
    "ArchitectureError",
    "BestFile",
    "CancelFlag",
    "Cancelled",
    "Chat",
    "ChatFormat",
    "CheckpointError",
    "Comparison",
    "ContextFullError",
    "ContextOptions",
    "ConvertOptions",
    "DecodeError",
    "Distribution",
    "Divergence",
    "Engine",
    "EngineError",
    "EngineLostError",
    "EngineMissingError",
    "Estimate",
    "EvaluationOptions",
    "GGUFError",
    "GgufmoeError",
    "HubError",
    "ImatrixError",
    "ImatrixOptions",
    "ImatrixResult",
    "InputError",
    "LayerCoverage",
    "LlamaCpp",
    "Measured",
    "MemorySums",
    "MergeOptions",
    "Message",
    "ModelLoadError",
    "NoSpaceError",
    "NonFiniteError",
    "OffloadOptions",
    "OptionError",
    "OutputError",
    "OutputExistsError",
    "Perplexity",
    "Progress",
    "QuantizeOptions",
    "Reasoning",
    "RecipeError",
    "RefitOptions",
    "ResumeError",
    "RoutedToken",
    "RoutingOptions",
    "RoutingTrace",
    "RoutingTracer",
    "SafetensorsError",
    "SamplingOptions",
    "SensitivityOptions",
    "SensitivityResult",
    "SizedOptions",
    "TemplateError",
    "TemplateOptions",
    "TensorMismatchError",
    "TokenizerError",
    "Tool",
    "ToolCall",
    "TypeSpeeds",
    "WorkerError",
    "WorkerLostError",
    "WorkerOptions",
    "__version__",
    "best_file",
    "convert",
    "imatrix",
    "kl_divergence",
    "kl_divergences",
    "merge",
    "obtain",
    "perplexity",
    "quantize",
    "refit",
    "sensitivity",
    "trace_routing",
    "type_speeds",
]

# what is logged is for programs that ask for it; without a handler anywhere Python would print warnings
logging.getLogger("ggufmoe").addHandler(logging.NullHandler())

_HOMES = {
    "BestFile": "ggufmoe.best.best_file",
    "CancelFlag": "ggufmoe.work",
    "Chat": "ggufmoe.runtime.chat",
    "ChatFormat": "ggufmoe.runtime.chatformat",
    "Comparison": "ggufmoe.evaluation.divergence",
    "ContextOptions": "ggufmoe.options",
    "ConvertOptions": "ggufmoe.options",
    "Distribution": "ggufmoe.evaluation.divergence",
    "Divergence": "ggufmoe.evaluation.divergence",
    "Engine": "ggufmoe.engine",
    "Estimate": "ggufmoe.evaluation.perplexity",
    "EvaluationOptions": "ggufmoe.options",
    "ImatrixOptions": "ggufmoe.options",
    "ImatrixResult": "ggufmoe.evaluation.imatrix",
    "LayerCoverage": "ggufmoe.evaluation.imatrix",
    "LlamaCpp": "ggufmoe.runtime.llamacpp",
    "Measured": "ggufmoe.best.measured_files",
    "MemorySums": "ggufmoe.best.memory_budget",
    "MergeOptions": "ggufmoe.options",
    "Message": "ggufmoe.runtime.messages",
    "OffloadOptions": "ggufmoe.options",
    "Perplexity": "ggufmoe.evaluation.perplexity",
    "Progress": "ggufmoe.work",
    "QuantizeOptions": "ggufmoe.options",
    "Reasoning": "ggufmoe.runtime.events",
    "RefitOptions": "ggufmoe.options",
    "RoutedToken": "ggufmoe.routing",
    "RoutingOptions": "ggufmoe.options",
    "RoutingTrace": "ggufmoe.routing",
    "RoutingTracer": "ggufmoe.routing",
    "SamplingOptions": "ggufmoe.options",
    "SensitivityOptions": "ggufmoe.options",
    "SensitivityResult": "ggufmoe.sensitivity",
    "SizedOptions": "ggufmoe.options",
    "TemplateOptions": "ggufmoe.options",
    "Tool": "ggufmoe.runtime.messages",
    "ToolCall": "ggufmoe.runtime.messages",
    "TypeSpeeds": "ggufmoe.quant.type_speeds",
    "WorkerOptions": "ggufmoe.options",
    "best_file": "ggufmoe.best.best_file",
    "convert": "ggufmoe.convert",
    "imatrix": "ggufmoe.evaluation.imatrix",
    "kl_divergence": "ggufmoe.evaluation.divergence",
    "kl_divergences": "ggufmoe.evaluation.divergence",
    "merge": "ggufmoe.convert",
    "obtain": "ggufmoe.store.obtain",
    "perplexity": "ggufmoe.evaluation.perplexity",
    "quantize": "ggufmoe.quantize",
    "refit": "ggufmoe.refit",
    "sensitivity": "ggufmoe.sensitivity",
    "trace_routing": "ggufmoe.routing",
    "type_speeds": "ggufmoe.evaluation.speed_of_types",
}
"""Where each public name lives; those that are not here live in ``ggufmoe.errors``."""


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that this function gives

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES.get(name, "ggufmoe.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A package one of whose functions is called like the module that it lives in.

    The import system binds a submodule to its package; for a public name that would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
