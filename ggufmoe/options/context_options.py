"""Options of computing: the context of a conversation, and the chunks of an evaluation or an importance matrix."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypedDict

from ggufmoe.errors import OptionError
from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.limits import MAX_INT32, MAX_SEQUENCES, MAX_THREADS, rounded_context

MIN_CHUNK_TOKENS = 8
"""A shorter chunk has no token to score in its second half."""


AUTO_PARALLEL = 4
"""Answers that are computed in one batch where ``n_parallel`` is 0."""
_PARALLEL_HELP = (
    "Number of answers that are computed in one batch. They share the context: together they may have as many tokens "
    "as --ctx-size says, and if they need more, the one that was asked for last waits. "
    f"0: {AUTO_PARALLEL}, or as many as the model and --batch-size allow."
)

OverflowPolicy = Literal["error", "shift", "truncate-middle"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


@dataclass(frozen=True)
class ComputeOptions:
    """How llama.cpp computes a text: the part that conversations and evaluations share. Raises OptionError."""

    n_ctx: int | None = option(
        None,
        "-c",
        "--ctx-size",
        help="Context size in tokens, rounded up to a multiple of 256; 0: the size that the model was trained with. "
        "Default: that size, but at most 4096.",
        metavar="N",
        between=(0, MAX_INT32),
    )
    n_batch: int = option(
        2048,
        "-b",
        "--batch-size",
        help="Logical batch: most tokens passed to llama.cpp in one call.",
        metavar="N",
        between=(1, MAX_INT32),
    )
    n_ubatch: int = option(
        512,
        "-ub",
        "--ubatch-size",
        help="Physical batch: most tokens computed in one step.",
        metavar="N",
        between=(1, MAX_INT32),
    )
    n_threads: int | None = option(
        None,
        "-t",
        "--threads",
        help="Number of threads; default: one for each physical core.",
        metavar="N",
        between=(1, MAX_THREADS),
    )
    flash_attn: Literal["on", "off", "auto"] = option("auto", "-fa", "--flash-attn", help="Use flash attention.")
    cache_type_k: CacheType = option("f16", "-ctk", "--cache-type-k", help="Type of the keys in the KV cache.")
    cache_type_v: CacheType = option("f16", "-ctv", "--cache-type-v", help="Type of the values in the KV cache.")
    swa_full: bool = option(
        False,
        "--swa-full",
        help="Keep all tokens also in layers that attend to a sliding window only: takes more memory, and any earlier "
        "part of a text can be continued without computing it again.",
    )

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class ContextOptions(ComputeOptions):
    """The context of a model: how many tokens it holds, how they are computed, what happens when it is full.

    Raises OptionError for values out of range.
    """

    overflow: OverflowPolicy = option(
        "error",
        "--overflow",
        help="When the context is full: end the answer (error), drop the oldest tokens (shift) or those in the middle.",
    )
    context_shift: bool | None = option(
        None, "--context-shift/--no-context-shift", help="The same as --overflow shift, or --overflow error."
    )
    n_keep: int = option(
        0,
        "--keep",
        help="Number of tokens at the beginning that are never dropped (BOS never is); -1: the prompt.",
        metavar="N",
        between=(-1, MAX_INT32),
    )
    cache_ram: int = option(
        1024,
        "-cram",
        "--cache-ram",
        help="Main memory for KV cache copies of other conversations, in MiB, and as much again for checkpoints; "
        "0: none.",
        metavar="MiB",
        between=(0, MAX_INT32),
    )
    prompt_cache: Path | None = option(
        None,
        "--prompt-cache",
        help="Keep the KV cache of long texts in this directory (made if it is missing) and begin with what is there: "
        "prompts and conversations need not be computed again after a restart.",
        metavar="DIR",
    )
    prompt_cache_size: int = option(
        2048,
        "--prompt-cache-size",
        help="Most MiB that --prompt-cache may take; the texts that were not used for longest are deleted.",
        metavar="MiB",
        between=(1, MAX_INT32),
    )
    n_seq_max: int = option(
        1, help="Number of texts that share the context, each with an equal part of it.", between=(1, MAX_SEQUENCES)
    )

    n_parallel: int = option(
        1,
        "-np",
        "--parallel",
        help=_PARALLEL_HELP,
        metavar="N",
        between=(0, MAX_SEQUENCES),
    )

    def __post_init__(self) -> None:
        if self.context_shift and self.overflow == "truncate-middle":
            raise OptionError("--context-shift and --overflow truncate-middle contradict each other")
        super().__post_init__()
        check(self.n_parallel == 1 or self.n_seq_max == 1, "n_parallel must be 1 where n_seq_max is above 1")
        few = f"--parallel {self.n_parallel} needs a --batch-size of as many tokens, not {self.n_batch}"
        check(self.n_parallel <= self.n_batch, few)

    @property
    def overflow_policy(self) -> OverflowPolicy:
        """What happens to a text that is longer than the context."""
        return "shift" if self.context_shift else self.overflow


@dataclass(frozen=True)
class ChatContextOptions(ContextOptions):
    """The context of a conversation in the terminal, which goes on when the context is full."""

    overflow: OverflowPolicy = option(
        "shift",
        "--overflow",
        help="When the context is full: leave out the oldest turns (shift) or those after the first (truncate-middle), "
        "or end the answer (error).",
    )

    @property
    def overflow_policy(self) -> OverflowPolicy:
        """What happens to a conversation that is longer than the context."""
        return "error" if self.context_shift is False else super().overflow_policy


@dataclass(frozen=True)
class ServeContextOptions(ContextOptions):
    """The context of a server, which computes several answers at once."""

    n_parallel: int = option(0, "-np", "--parallel", help=_PARALLEL_HELP, metavar="N", between=(0, MAX_SEQUENCES))


@dataclass(frozen=True)
class EvaluationOptions(ComputeOptions):
    """How a text is cut into chunks and computed, as llama.cpp's perplexity and imatrix tools do it.

    Raises OptionError for values out of range.
    """

    n_ctx: int = option(
        512,
        "-c",
        "--ctx-size",
        help="Tokens in each chunk of the text.",
        metavar="N",
        between=(MIN_CHUNK_TOKENS, MAX_INT32),
    )
    chunks: int = option(-1, "--chunks", help="Evaluate at most N chunks; -1: all that the text fills.", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.chunks == -1 or self.chunks > 0, f"--chunks takes -1 or at least 1, not {self.chunks}")

    @property
    def context(self) -> ContextOptions:
        """The context to compute in: as many chunks side by side as fit into a batch. No chunk is kept."""
        n_seq = min(max(1, self.n_batch // self.n_ctx), MAX_SEQUENCES)
        shared = {field.name: getattr(self, field.name) for field in fields(ComputeOptions)}
        chunks_side_by_side = {
            "n_ctx": rounded_context(n_seq * self.n_ctx, n_seq),
            "n_batch": min(self.n_batch, n_seq * self.n_ctx),
            "n_seq_max": n_seq,
            "cache_ram": 0,
        }
        return ContextOptions(**shared | chunks_side_by_side)


class EvaluationKeywords(TypedDict, total=False):
    """The fields of ``EvaluationOptions`` as keywords."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    flash_attn: Literal["on", "off", "auto"]
    cache_type_k: CacheType
    cache_type_v: CacheType
    swa_full: bool
    chunks: int


@dataclass(frozen=True)
class ImatrixOptions(EvaluationOptions):
    """How an importance matrix is made."""

    process_output: bool = option(False, "--process-output", help="Measure output.weight as well.")
    force: bool = option(False, "--force", help="Replace an existing output.")


class ImatrixKeywords(EvaluationKeywords, total=False):
    """The fields of ``ImatrixOptions`` as keywords."""

    process_output: bool
    force: bool
