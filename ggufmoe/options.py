"""Option objects: one frozen definition gives the API's argument, the command line's flag and the server's field.

Each field carries its flags and help in its metadata; ``cli`` builds its parameters from them. Nothing here is read
from the environment.
"""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ggufmoe.errors import OptionError

_MAX_INT32 = 2**31 - 1
"""llama.cpp counts tokens and layers in 32 bits; a larger number would come out as another one."""
_MAX_THREADS = 512
"""GGML_MAX_N_THREADS of ggml.h."""


def option(
    default: Any,
    *flags: str,
    help: str,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    panel: str | None = None,
    between: tuple[float, float] | None = None,
) -> Any:
    """A dataclass field that is also a command-line option; without flags it exists only in the API.

    ``parse`` makes the field's value of what was typed, where its type alone does not say how; it raises OptionError.
    ``panel`` is the part of the help that it stands in, if not that of its class. ``between`` has the least and the
    largest number that ``_check_values`` lets pass.
    """
    metadata: Mapping[str, Any] = {
        "flags": flags,
        "help": help,
        "metavar": metavar,
        "parse": parse,
        "panel": panel,
        "between": between,
    }
    return field(default=default, metadata=metadata)


def _identical_experts() -> Any:
    return option(
        False, "--allow-identical-experts", help="Take a recipe whose experts or prompts are all the same, to train it."
    )


def _worker_threads() -> Any:
    return option(
        None, "-t", "--threads", help="Worker threads; all cores by default.", metavar="N", between=(1, _MAX_THREADS)
    )


def _router_report() -> Any:
    return option(
        None, "--router-report", help="Write what the recipe's router will do, layer by layer, as JSON.", metavar="FILE"
    )


@dataclass(frozen=True)
class ExportOptions:
    """How a GGUF file is made, whatever it is made from. Raises OptionError for unknown words."""

    quant: str = option("Q4_K_M", "-q", "--quant", help="File type, as llama-quantize names it.", metavar="TYPE")
    imatrix: Path | None = option(
        None, "--imatrix", help="Importance matrix (GGUF, or the older .dat).", metavar="FILE"
    )
    tensor_types: tuple[str, ...] = option(
        (), "--tensor-type", help="Type of the tensors whose name matches a regular expression.", metavar="PATTERN=TYPE"
    )
    output_tensor_type: str | None = option(None, "--output-tensor-type", help="Type of output.weight.", metavar="TYPE")
    token_embedding_type: str | None = option(
        None, "--token-embedding-type", help="Type of token_embd.weight.", metavar="TYPE"
    )
    pure: bool = option(False, "--pure", help="One type for all tensors, without the mix.")
    threads: int | None = _worker_threads()
    split_max_size: str | None = option(
        None, "--split-max-size", help="Write shards of at most this size, for example 4G.", metavar="SIZE"
    )
    resume: bool = option(False, "--resume", help="Go on with the partial file of an interrupted run.")
    force: bool = option(False, "--force", help="Replace an existing output.")
    manifest: bool = option(False, "--manifest", help="Write OUT.manifest.json beside it, with a hash of each tensor.")
    quantizer: Literal["auto", "fast", "ggml"] = option(
        "auto", "--quantizer", help="ggml: only llama.cpp's routines; fast: only ours, or none at all. Same bytes."
    )

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass(frozen=True)
class ConvertOptions(ExportOptions):
    """How a checkpoint becomes a GGUF file."""

    allow_identical_experts: bool = _identical_experts()
    router_report: Path | None = _router_report()


@dataclass(frozen=True)
class QuantizeOptions(ExportOptions):
    """How a GGUF file becomes another one."""

    allow_requantize: bool = option(
        False, "--allow-requantize", help="Quantize what is quantized already; it loses more than from the original."
    )


@dataclass(frozen=True)
class MergeOptions:
    """How a recipe becomes a merged checkpoint."""

    layout: Literal["classic", "fused"] = option(
        "classic", "--layout", help="classic is read by every tool, fused by transformers 5."
    )
    max_shard_size: str = option("5G", "--max-shard-size", help="Largest safetensors file.", metavar="SIZE")
    threads: int | None = _worker_threads()
    resume: bool = option(False, "--resume", help="Go on with the partial directory of an interrupted run.")
    force: bool = option(False, "--force", help="Replace an existing checkpoint.")
    allow_identical_experts: bool = _identical_experts()
    router_report: Path | None = _router_report()

    def __post_init__(self) -> None:
        _check_values(self)


MAX_SEQUENCES = 256
"""LLAMA_MAX_SEQ of llama-cparams.h."""
MAX_SEED = 2**32 - 2
"""The largest seed: the number above stands for a seed by chance in llama.cpp (LLAMA_DEFAULT_SEED)."""

_MAX_WORKERS = 16
"""GGML_RPC_MAX_SERVERS of ggml-rpc.h."""
_MAX_PORT = 65535
_CTX_STEP = 256
"""llama.cpp rounds the part of the context that each text has up to a multiple of this."""
MIN_CHUNK_TOKENS = 8
"""Fewer leave nothing to score in the second half of a chunk."""

LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]
OverflowPolicy = Literal["error", "shift", "truncate-middle"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


@dataclass(frozen=True)
class ContextOptions:
    """How much text a model holds in mind, and how it is computed. Raises OptionError for impossible numbers."""

    n_ctx: int | None = option(
        None,
        "-c",
        "--ctx-size",
        help="Context in tokens, rounded up to a multiple of 256; 0: all that the model was trained for. "
        "Left out: that, but at most 4096.",
        metavar="N",
        between=(0, _MAX_INT32),
    )
    n_batch: int = option(
        2048, "-b", "--batch-size", help="Tokens given to llama.cpp at once.", metavar="N", between=(1, _MAX_INT32)
    )
    n_ubatch: int = option(
        512, "-ub", "--ubatch-size", help="Tokens computed at once.", metavar="N", between=(1, _MAX_INT32)
    )
    n_threads: int | None = option(
        None,
        "-t",
        "--threads",
        help="Threads; one for each physical core by default.",
        metavar="N",
        between=(1, _MAX_THREADS),
    )
    flash_attn: Literal["on", "off", "auto"] = option("auto", "-fa", "--flash-attn", help="Use flash attention.")
    cache_type_k: CacheType = option("f16", "-ctk", "--cache-type-k", help="Type of the keys in the KV cache.")
    cache_type_v: CacheType = option("f16", "-ctv", "--cache-type-v", help="Type of the values in the KV cache.")
    overflow: OverflowPolicy = option(
        "error",
        "--overflow",
        help="When the context is full: end; drop the oldest tokens (shift); or those in the middle.",
    )
    context_shift: bool = option(False, "--context-shift/--no-context-shift", help="The same as --overflow shift.")
    n_keep: int = option(
        0,
        "--keep",
        help="Tokens at the beginning that are never dropped; BOS never is. -1: the prompt.",
        metavar="N",
        between=(-1, _MAX_INT32),
    )
    cache_ram: int = option(
        1024,
        "-cram",
        "--cache-ram",
        help="Main memory for the caches of conversations that others took turns with, in MiB; 0: none.",
        metavar="MiB",
        between=(0, _MAX_INT32),
    )
    n_seq_max: int = option(
        1, help="Texts that share the context, each with an equal part of it.", between=(1, MAX_SEQUENCES)
    )

    def __post_init__(self) -> None:
        if self.context_shift and self.overflow == "truncate-middle":
            raise OptionError("--context-shift and --overflow truncate-middle contradict each other")
        _check_values(self)

    @property
    def overflow_policy(self) -> OverflowPolicy:
        """What becomes of a text that is longer than the context."""
        return "shift" if self.context_shift else self.overflow


@dataclass(frozen=True)
class EvaluationOptions(ContextOptions):
    """How a text is cut into chunks and computed, as llama.cpp's tools for perplexity and importances do it.

    Raises OptionError for impossible numbers.
    """

    n_ctx: int = option(
        512, "-c", "--ctx-size", help="Tokens of a chunk.", metavar="N", between=(MIN_CHUNK_TOKENS, _MAX_INT32)
    )
    # what conversations need has no flags here
    overflow: OverflowPolicy = option("error", help="A chunk never overflows.")
    context_shift: bool = option(False, help="A chunk never overflows.")
    n_keep: int = option(0, help="A chunk never overflows.", between=(-1, _MAX_INT32))
    cache_ram: int = option(0, help="Nothing is kept of a chunk.", between=(0, _MAX_INT32))
    chunks: int = option(-1, "--chunks", help="At most so many chunks; -1: all that the text fills.", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.chunks == -1 or self.chunks > 0, f"--chunks takes -1 or at least 1, not {self.chunks}")

    @property
    def context(self) -> ContextOptions:
        """The context to compute in: as many chunks side by side as fit a batch."""
        n_seq = min(max(1, self.n_batch // self.n_ctx), MAX_SEQUENCES)
        n_batch = min(self.n_batch, n_seq * self.n_ctx)
        names = {field.name for field in fields(ContextOptions)}
        given = {name: value for name, value in vars(self).items() if name in names}
        n_ctx = n_seq * -(-self.n_ctx // _CTX_STEP) * _CTX_STEP
        return ContextOptions(**given | {"n_ctx": n_ctx, "n_batch": n_batch, "n_seq_max": n_seq})


@dataclass(frozen=True)
class ImatrixOptions(EvaluationOptions):
    """How an importance matrix is made."""

    process_output: bool = option(False, "--process-output", help="Measure output.weight as well.")
    force: bool = option(False, "--force", help="Replace an existing output.")


AUTO_LAYERS = -1
"""As many layers on the GPU as fit (``--fit``), else all of them."""
ALL_LAYERS = -2
"""All layers on the GPU, whether they fit or not."""


def _layers(typed: str) -> int:
    words = {"auto": AUTO_LAYERS, "all": ALL_LAYERS}
    try:
        return words[typed] if typed in words else int(typed)
    except ValueError as error:
        raise OptionError(f"expected a number, auto or all, not {typed!r}") from error


@dataclass(frozen=True)
class OffloadOptions:
    """Where a model's weights go. Raises OptionError for unknown words and impossible numbers."""

    n_gpu_layers: int = option(
        AUTO_LAYERS,
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        help="The last N layers go to the GPU, the output being one; all; or auto: as many as fit. [default: auto]",
        metavar="N",
        parse=_layers,
        between=(ALL_LAYERS, _MAX_INT32),
    )
    load_mode: LoadMode = option("auto", "-lm", "--load-mode", help="How the file comes into memory.")
    repack: bool = option(
        True,
        "--repack/--no-repack",
        " /-nr",
        help="Rearrange weights in a second buffer for faster arithmetic on the CPU (costs memory).",
    )
    cpu_moe: bool = option(False, "-cmoe", "--cpu-moe", help="Keep the experts of all layers in the CPU's memory.")
    n_cpu_moe: int | None = option(
        None,
        "-ncmoe",
        "--n-cpu-moe",
        help="Keep the experts of the first N layers in the CPU's memory.",
        metavar="N",
        between=(0, _MAX_INT32),
    )
    override_tensor: tuple[str, ...] = option(
        (),
        "-ot",
        "--override-tensor",
        help="Put the tensors whose name matches a regular expression into a buffer, for example CPU or CUDA0.",
        metavar="PATTERN=BUFFER",
    )
    tensor_split: str | None = option(
        None, "-ts", "--tensor-split", help="Shares of the layers for each GPU, for example 3,1.", metavar="N0,N1,..."
    )
    main_gpu: int = option(
        0, "-mg", "--main-gpu", help="The GPU that --split-mode none uses.", metavar="INDEX", between=(0, _MAX_INT32)
    )
    split_mode: Literal["none", "layer", "row", "tensor"] = option(
        "layer", "-sm", "--split-mode", help="How several GPUs share a model: one alone, by layers, rows or tensors."
    )
    device: str | None = option(
        None, "-dev", "--device", help="The devices to use, by name; none: only the CPU.", metavar="DEV1,DEV2,..."
    )
    kv_offload: bool = option(
        True, "--kv-offload/--no-kv-offload", "-kvo/-nkvo", help="Keep the KV cache beside the layers it belongs to."
    )
    no_host: bool = option(
        False, "--no-host", help="Do not pin the CPU's share of the weights for a GPU; it can then be repacked."
    )
    fit: Literal["on", "off"] = option(
        "on", "-fit", "--fit", help="Choose what was not given so that the model fits the memory of the GPUs."
    )
    fit_target: int = option(
        1024,
        "-fitt",
        "--fit-target",
        help="Memory that --fit leaves free on each GPU, in MiB.",
        metavar="MiB",
        between=(0, _MAX_INT32),
    )
    n_expert_used: int | None = option(
        None,
        "--n-expert-used",
        help="Experts for each token; fewer than the model was made for are faster and worse.",
        metavar="N",
        between=(1, _MAX_INT32),
    )

    rpc: str | None = option(
        None,
        "--rpc",
        help="Workers on other machines ('ggufmoe worker'), which become the devices RPC0, RPC1, ...",
        metavar="HOST:PORT,...",
    )
    rpc_timeout: int = option(
        30,
        "--rpc-timeout",
        help="Seconds without a sign of life after which a worker is given up; ten times that for loading and prompts.",
        metavar="S",
        between=(1, _MAX_INT32),
    )

    def __post_init__(self) -> None:
        _check_values(self)
        if self.cpu_moe and self.n_cpu_moe is not None:
            raise OptionError("--cpu-moe keeps all experts in the CPU's memory: leave out --n-cpu-moe")
        _ = (self.overrides, self.split_shares, self.workers)

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Pattern and buffer of each ``override_tensor``; several may stand in one, with commas between them."""
        return tuple(pair for given in self.override_tensor for pair in _override_pairs(given))

    @property
    def split_shares(self) -> tuple[float, ...] | None:
        """``tensor_split`` as numbers, which llama.cpp lets commas or slashes separate."""
        if self.tensor_split is None:
            return None
        message = f"--tensor-split: expected numbers such as 3,1, not {self.tensor_split!r}"
        try:
            shares = tuple(float(share) for share in self.tensor_split.replace("/", ",").split(","))
        except ValueError as error:
            raise OptionError(message) from error
        _check(all(0 <= share <= _MAX_INT32 for share in shares) and sum(shares) > 0, message)
        return shares

    @property
    def workers(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each worker that ``rpc`` names, in its order."""
        if self.rpc is None:
            return ()
        workers = tuple(_host_and_port(endpoint.strip()) for endpoint in self.rpc.split(","))
        _check(len(set(workers)) == len(workers), f"--rpc {self.rpc}: names a worker twice")
        _check(len(workers) <= _MAX_WORKERS, f"--rpc: llama.cpp takes {_MAX_WORKERS} workers, not {len(workers)}")
        return workers


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    _check(
        ":" not in host and not endpoint.startswith("["),
        f"--rpc {endpoint}: llama.cpp's RPC knows only IPv4: give the worker's IPv4 address, or a name that has one",
    )
    is_port = port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= _MAX_PORT
    _check(
        bool(host) and is_port, f"--rpc {endpoint or repr(endpoint)}: expected HOST:PORT, for example 10.0.0.2:50052"
    )
    return host, int(port)


def _override_pairs(given: str) -> list[tuple[str, str]]:
    pairs, pattern = [], ""
    for piece in given.split(","):
        # a piece without = is part of a pattern that holds a comma
        before, equals, buffer = piece.rpartition("=")
        if not equals:
            pattern += piece + ","
            continue
        _check(bool(before) and bool(buffer), f"--override-tensor: expected PATTERN=BUFFER, not {given!r}")
        pairs.append((pattern + before, buffer))
        pattern = ""
    _check(not pattern, f"--override-tensor: expected PATTERN=BUFFER, not {given!r}")
    return pairs


_MORE = "Sampling options, more"
_MAX_LAST_N = 2**20
"""llama.cpp takes memory for so many tokens at once; where there is not enough it ends the process."""
_MAX_LOGPROBS = 1000
_BIAS = re.compile(r"(\d{1,9})([+-](?:inf|\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker serves to other machines, and where; the flags are those of llama.cpp's server.

    Raises OptionError for impossible numbers.
    """

    host: str = option(
        "127.0.0.1", "-H", "--host", help="Address to listen at; other machines need another one.", metavar="HOST"
    )
    port: int = option(50052, "-p", "--port", help="Port to listen at.", metavar="PORT", between=(1, _MAX_PORT))
    n_threads: int | None = option(
        None,
        "-t",
        "--threads",
        help="Threads of the CPU; one for each physical core by default.",
        metavar="N",
        between=(1, _MAX_THREADS),
    )
    device: str | None = option(
        None,
        "-d",
        "--device",
        help="Devices to serve, by name; by default all GPUs, or the CPU where there is none.",
        metavar="DEV1,DEV2,...",
    )
    cache: bool = option(False, "-c", "--cache", help="Keep large tensors on disk, so that loading again is faster.")

    def __post_init__(self) -> None:
        _check_values(self)
        _check(bool(self.host), "the address to listen at is empty")


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; None stands for the model's own value, else the default named in the help.

    Raises OptionError for numbers that are no probabilities, counts or penalties.
    """

    temperature: float | None = option(
        None,
        "--temp",
        "--temperature",
        help="0: always the likeliest token. [default: the model's, else 0.7]",
        metavar="T",
        between=(0, 100),
    )
    top_k: int | None = option(
        None,
        "--top-k",
        help="Only the K likeliest tokens; 0: all. [default: the model's, else 50]",
        metavar="K",
        between=(0, _MAX_INT32),
    )
    top_p: float | None = option(
        None,
        "--top-p",
        help="Only the likeliest that sum to P; 1: all. [default: the model's, else 0.95]",
        metavar="P",
        between=(0, 1),
    )
    min_p: float | None = option(
        None,
        "--min-p",
        help="Only those of P times the likeliest's probability. [default: the model's, else 0]",
        metavar="P",
        between=(0, 1),
    )
    repeat_penalty: float | None = option(
        None,
        "--repeat-penalty",
        help="Against the last tokens; 1: none. [default: the model's, else 1]",
        metavar="X",
        between=(0.01, 100),
    )
    seed: int | None = option(
        None,
        "--seed",
        help="Same seed, same answer on the same devices; -1: by chance. [default: -1]",
        metavar="N",
        between=(-1, MAX_SEED),
    )
    n_predict: int = option(
        256,
        "-n",
        "--n-predict",
        "--predict",
        help="At most so many new tokens; -1: until the context is full.",
        metavar="N",
        between=(-1, _MAX_INT32),
    )
    typical_p: float | None = option(
        None,
        "--typical",
        "--typical-p",
        help="Locally typical sampling; 1: off. [default: 1]",
        metavar="P",
        panel=_MORE,
        between=(0, 1),
    )
    repeat_last_n: int | None = option(
        None,
        "--repeat-last-n",
        help="So many last tokens count for the penalties. [default: the model's, else 64]",
        metavar="N",
        panel=_MORE,
        between=(0, _MAX_LAST_N),
    )
    presence_penalty: float = option(
        0.0,
        "--presence-penalty",
        help="Against tokens that came before.",
        metavar="X",
        panel=_MORE,
        between=(-100, 100),
    )
    frequency_penalty: float = option(
        0.0,
        "--frequency-penalty",
        help="Against tokens, as often as they came.",
        metavar="X",
        panel=_MORE,
        between=(-100, 100),
    )
    dry_multiplier: float = option(
        0.0,
        "--dry-multiplier",
        help="Against repeating sequences (DRY); 0: off.",
        metavar="X",
        panel=_MORE,
        between=(0, 100),
    )
    dry_base: float = option(
        1.75, "--dry-base", help="How fast DRY grows with their length.", metavar="X", panel=_MORE, between=(1, 100)
    )
    dry_allowed_length: int = option(
        2,
        "--dry-allowed-length",
        help="Sequences so long may be repeated.",
        metavar="N",
        panel=_MORE,
        between=(0, _MAX_INT32),
    )
    dry_penalty_last_n: int = option(
        64,
        "--dry-penalty-last-n",
        help="Tokens that DRY looks back.",
        metavar="N",
        panel=_MORE,
        between=(0, _MAX_LAST_N),
    )
    dry_sequence_breakers: tuple[str, ...] = option(
        (),
        "--dry-sequence-breaker",
        help="Where DRY's sequences end, in place of newline, colon, quote and star; none: nowhere.",
        metavar="STRING",
        panel=_MORE,
    )
    xtc_probability: float | None = option(
        None,
        "--xtc-probability",
        help="How often all but the last of the likely tokens are left out (XTC); 0: never. [default: 0]",
        metavar="P",
        panel=_MORE,
        between=(0, 1),
    )
    xtc_threshold: float | None = option(
        None, "--xtc-threshold", help="What is likely for XTC. [default: 0.1]", metavar="P", panel=_MORE, between=(0, 1)
    )
    mirostat: int | None = option(
        None,
        "--mirostat",
        help="1 or 2: hold the surprise constant; of the others only temperature, grammar and biases count then.",
        metavar="N",
        panel=_MORE,
        between=(0, 2),
    )
    mirostat_lr: float | None = option(
        None,
        "--mirostat-lr",
        help="Mirostat's learning rate. [default: 0.1]",
        metavar="X",
        panel=_MORE,
        between=(0, 100),
    )
    mirostat_ent: float | None = option(
        None, "--mirostat-ent", help="Mirostat's surprise. [default: 5]", metavar="X", panel=_MORE, between=(0, 100)
    )
    logit_bias: tuple[str, ...] = option(
        (),
        "-l",
        "--logit-bias",
        help="Add to a token's logit, for example 15043+1 or 15043-inf.",
        metavar="ID(+/-)BIAS",
        panel=_MORE,
    )
    grammar: str | None = option(
        None, "--grammar", help="Only text that this grammar (GBNF) allows.", metavar="GBNF", panel=_MORE
    )
    grammar_file: Path | None = option(
        None, "--grammar-file", help="A file with such a grammar.", metavar="FILE", panel=_MORE
    )
    json_schema: str | None = option(
        None, "-j", "--json-schema", help="Only JSON that follows this schema.", metavar="SCHEMA", panel=_MORE
    )
    json_schema_file: Path | None = option(
        None, "-jf", "--json-schema-file", help="A file with such a schema.", metavar="FILE", panel=_MORE
    )
    logprobs: int | None = option(
        None,
        help="Give each token's logprob, and those of so many of the likeliest ones; 0: only its own.",
        between=(0, _MAX_LOGPROBS),
    )

    def __post_init__(self) -> None:
        _check_values(self)
        forms = (self.grammar, self.grammar_file, self.json_schema, self.json_schema_file)
        message = "give one of --grammar, --grammar-file, --json-schema and --json-schema-file, not several"
        _check(sum(form is not None for form in forms) <= 1, message)
        _ = self.biases

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, what is added to its logit) of each ``logit_bias``."""
        matches = [_BIAS.fullmatch(given) for given in self.logit_bias]
        for given, match in zip(self.logit_bias, matches, strict=True):
            _check(
                match is not None, f"--logit-bias: expected a token id and a signed number, as 15043+1, not {given!r}"
            )
        return tuple((int(match[1]), float(match[2])) for match in matches if match)


@dataclass(frozen=True)
class PromptOptions:
    """How a question becomes a prompt."""

    system_prompt: str | None = option(
        None, "-sys", "--system-prompt", help="What the model is told before the conversation.", metavar="TEXT"
    )
    chat_template: str | None = option(
        None,
        "--chat-template",
        help="A template of the file by name, chatml, llama3, mistral, or a file with one; else the model's own.",
        metavar="NAME|FILE",
    )

    def __post_init__(self) -> None:
        _check_values(self)


_Options = TypeVar("_Options")


def given_or_default(options: _Options | None, kind: type[_Options]) -> _Options:
    """The options, or their defaults. Raises TypeError for what are no such options, for example a dict."""
    if options is not None and not isinstance(options, kind):
        raise TypeError(f"expected {kind.__name__}(...), not {options!r}")
    return kind() if options is None else options


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


def bounds(kind: type, name: str) -> tuple[float, float]:
    """The least and the largest number that a field of these options may hold."""
    between: tuple[float, float] = next(spec for spec in fields(kind) if spec.name == name).metadata["between"]
    return between


_HELD: Mapping[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    Path: ((str, os.PathLike), "a path"),
    tuple: ((tuple, list), "a tuple of texts"),
}
"""What a field with each annotation may hold, numbers of numpy too, and what that is called."""


def _check_values(options: Any) -> None:
    """Every field holds what its annotation says, and every number lies where its option says."""
    kinds, words = _kinds(options.__class__), _words(options.__class__)
    for spec in fields(options):
        value, between = getattr(options, spec.name), spec.metadata.get("between")
        if spec.name in kinds:
            annotation, may_be_none = kinds[spec.name]
            held, called = _HELD[annotation]
            # a bool is an int, but no number that anybody means
            fits = isinstance(value, held) and (annotation is bool or not isinstance(value, bool))
            if annotation is tuple:
                fits = fits and all(isinstance(text, str) for text in value)
            _check(fits or (value is None and may_be_none), f"{spec.name} must be {called}, not {value!r}")
        name = max(spec.metadata.get("flags", ()), key=len, default=spec.name)
        if between is not None and value is not None:
            low, high = between
            wanted = f"at least {low}" if high == _MAX_INT32 and value < low else f"between {low} and {high}"
            _check(low <= value <= high, f"{name} must be {wanted}, not {value}")
        if spec.name in words:
            _check(value in words[spec.name], f"{name} must be one of {', '.join(words[spec.name])}, not {value}")


@cache
def _kinds(kind: type) -> dict[str, tuple[Any, bool]]:
    """The annotation of each field but those of words, and whether None will do as well."""
    parts = {name: _parts(hint) for name, hint in get_type_hints(kind).items()}
    return {name: (part[0], type(None) in part) for name, part in parts.items() if part[0] in _HELD}


def _parts(hint: Any) -> tuple[Any, ...]:
    """``(int, NoneType)`` of ``int | None``, ``(tuple,)`` of ``tuple[str, ...]``."""
    origin = get_origin(hint)
    return get_args(hint) if origin in (Union, UnionType) else (origin or hint,)


@cache
def _words(kind: type) -> dict[str, tuple[str, ...]]:
    """The words that each Literal field may hold."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
