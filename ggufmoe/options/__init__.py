"""Option objects: one frozen definition gives the API's argument, the command line's flag.

One module a subject; all public names can be imported from here. Nothing is read from the environment.
"""

from ggufmoe.options.context_options import (
    AUTO_PARALLEL,
    MIN_CHUNK_TOKENS,
    CacheType,
    ChatContextOptions,
    ComputeOptions,
    ContextOptions,
    EvaluationKeywords,
    EvaluationOptions,
    ImatrixKeywords,
    ImatrixOptions,
    OverflowPolicy,
    ServeContextOptions,
)
from ggufmoe.options.convert_options import (
    ConvertKeywords,
    ConvertOptions,
    ExportKeywords,
    ExportOptions,
    MergeKeywords,
    MergeOptions,
    QuantizeKeywords,
    QuantizeOptions,
    Quantizer,
    SizeTarget,
    TypeSet,
)
from ggufmoe.options.fields import bounds, option, options_of
from ggufmoe.options.limits import MAX_SEED, MAX_SEQUENCES
from ggufmoe.options.model_options import ModelOptions
from ggufmoe.options.offload_options import ALL_LAYERS, AUTO_LAYERS, LoadMode, OffloadOptions
from ggufmoe.options.refit_options import RefitKeywords, RefitOptions
from ggufmoe.options.routing_options import RoutingKeywords, RoutingOptions
from ggufmoe.options.sampling_options import PromptOptions, SamplingOptions, StopOptions, TemplateOptions
from ggufmoe.options.sensitivity_options import SensitivityKeywords, SensitivityOptions
from ggufmoe.options.server_options import ServerOptions
from ggufmoe.options.sized_options import AUTO_FIT, SizedOptions
from ggufmoe.options.worker_options import WorkerOptions

__all__ = [
    "ALL_LAYERS",
    "AUTO_FIT",
    "AUTO_LAYERS",
    "AUTO_PARALLEL",
    "MAX_SEED",
    "MAX_SEQUENCES",
    "MIN_CHUNK_TOKENS",
    "CacheType",
    "ChatContextOptions",
    "ComputeOptions",
    "ContextOptions",
    "ConvertKeywords",
    "ConvertOptions",
    "EvaluationKeywords",
    "EvaluationOptions",
    "ExportKeywords",
    "ExportOptions",
    "ImatrixKeywords",
    "ImatrixOptions",
    "LoadMode",
    "MergeKeywords",
    "MergeOptions",
    "ModelOptions",
    "OffloadOptions",
    "OverflowPolicy",
    "PromptOptions",
    "QuantizeKeywords",
    "QuantizeOptions",
    "Quantizer",
    "RefitKeywords",
    "RefitOptions",
    "RoutingKeywords",
    "RoutingOptions",
    "SamplingOptions",
    "SensitivityKeywords",
    "SensitivityOptions",
    "ServeContextOptions",
    "ServerOptions",
    "SizeTarget",
    "SizedOptions",
    "StopOptions",
    "TemplateOptions",
    "TypeSet",
    "WorkerOptions",
    "bounds",
    "option",
    "options_of",
]
