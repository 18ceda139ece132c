"""The exceptions that ggufmoe raises on purpose.

Each message is one line: what was expected, what was found, in which file or tensor, and what to do next.

    GgufmoeError                     exit code 1
    ├── InputError
    │   ├── CheckpointError          a Hugging Face checkpoint cannot be used
    │   │   ├── SafetensorsError     a safetensors file breaks its specification
    │   │   ├── ArchitectureError    the model family is not supported
    │   │   ├── TensorMismatchError  tensors are missing, left over or wrongly shaped
    │   │   ├── NonFiniteError       a weight is NaN or infinite
    │   │   └── HubError             the Hugging Face Hub did not give the files
    │   ├── TokenizerError           the tokenizer is missing, unknown or does not fit the model
    │   ├── RecipeError              a merge recipe cannot be followed
    │   ├── GGUFError                a GGUF file is corrupt or not supported
    │   ├── ImatrixError             an importance matrix is unreadable, missing or does not fit
    │   └── TemplateError            a chat template fails, runs too long or tries to leave its sandbox
    ├── OptionError                  exit code 2: options that contradict each other or the model
    ├── OutputError
    │   ├── OutputExistsError        the output is there already, or is one of the inputs
    │   ├── NoSpaceError             the disk cannot hold the output
    │   └── ResumeError              a partial file does not belong to this plan
    ├── EngineError
    │   ├── EngineMissingError       llama-cpp-python is absent or not the pinned one
    │   ├── ModelLoadError           llama.cpp refused the model
    │   ├── ContextFullError         the context has no room for the prompt or the answer
    │   ├── DecodeError              llama.cpp failed while computing
    │   ├── EngineLostError          llama.cpp aborted while it loaded or computed; load the model again
    │   └── WorkerError              a worker on another machine cannot be used
    │       └── WorkerLostError      a worker was lost while it was in use
    └── Cancelled                    exit code 130: the caller asked to stop
"""

import copy


class GgufmoeError(Exception):
    """Base of all errors that ggufmoe raises on purpose."""

    exit_code = 1


class InputError(GgufmoeError):
    """Something that was given to ggufmoe cannot be used."""


class CheckpointError(InputError):
    """A Hugging Face checkpoint cannot be used."""


class SafetensorsError(CheckpointError):
    """A safetensors file or its index breaks the specification."""


class ArchitectureError(CheckpointError):
    """The model family is not one that ggufmoe supports."""


class TensorMismatchError(CheckpointError):
    """Tensors are missing, left over or wrongly shaped; the message names up to eight of each kind."""


class NonFiniteError(CheckpointError):
    """A weight is NaN or infinite, in the source or after quantization."""


class HubError(CheckpointError):
    """The Hugging Face Hub did not give the files."""


class TokenizerError(InputError):
    """The tokenizer is missing, unknown or does not fit the model."""


class RecipeError(InputError):
    """A merge recipe cannot be followed."""


class GGUFError(InputError):
    """A GGUF file is corrupt or not supported."""


class ImatrixError(InputError):
    """An importance matrix is unreadable, missing or does not fit the model."""


class TemplateError(InputError):
    """A chat template fails, runs too long or tries to leave its sandbox."""


class OptionError(GgufmoeError):
    """Options contradict each other or do not fit the model."""

    exit_code = 2


class OutputError(GgufmoeError):
    """The output cannot be written."""


class OutputExistsError(OutputError):
    """The output is there already, or is one of the inputs."""


class NoSpaceError(OutputError):
    """The disk cannot hold the output."""


class ResumeError(OutputError):
    """A partial file does not belong to this plan."""


class EngineError(GgufmoeError):
    """llama.cpp could not complete a request."""


class EngineMissingError(EngineError):
    """llama-cpp-python is absent, cannot be loaded, or lacks a function or type that ggufmoe needs."""


class ModelLoadError(EngineError):
    """llama.cpp refused the model."""


class ContextFullError(EngineError):
    """The context has no room for the prompt or the answer."""


class DecodeError(EngineError):
    """llama.cpp failed while computing."""


class EngineLostError(EngineError):
    """llama.cpp aborted while it loaded or computed. The engine and its memory are lost; other engines keep working."""


class WorkerError(EngineError):
    """A worker on another machine cannot be reached, is busy, or speaks another version of the protocol."""


class WorkerLostError(WorkerError):
    """The connection to a worker was lost while it loaded or computed a model."""


class Cancelled(GgufmoeError):
    """The caller asked to stop."""

    exit_code = 130


def own_copy(error: BaseException) -> BaseException:
    """A copy of ``error`` for one of several threads that raise it: raising an exception adds to its traceback.

    ``error`` itself if its class cannot be copied.
    """
    try:
        copied = copy.copy(error)
    except Exception:  # a class may take other arguments than it keeps
        return error
    copied.__cause__ = error.__cause__
    copied.__suppress_context__ = error.__suppress_context__
    return copied.with_traceback(error.__traceback__)


def one_line(what: object, max_chars: int | None = 200) -> str:
    """``str(what)`` on one line, without control characters, cut to ``max_chars`` (None: not cut).

    For an exception without a message, the name of its class.
    """
    text = " ".join("".join(char if char.isprintable() else " " for char in str(what)).split())
    if not text and isinstance(what, BaseException):
        text = type(what).__name__
    return text[:max_chars]
