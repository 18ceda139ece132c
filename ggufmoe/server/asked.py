"""Requests as clients send them: every field that is honoured, its type and its bounds, and what it means for sampling.

Fields of sampling that OpenAI does not have are those of ``SamplingOptions`` by name. Any other field is an error.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ggufmoe.errors import OptionError
from ggufmoe.options import SamplingOptions
from ggufmoe.server.apierror import invalid
from ggufmoe.server.asked_messages import AskedMessage, AskedObject, AskedTool, NamedTool, ResponseFormat
from ggufmoe.server.bodies import unknown_field
from ggufmoe.server.told_routing import RoutingKind

_MAX_CHOICES = 64
_MAX_STOPS = 16
_MAX_TEXTS = 2048
"""Of one request for embeddings, as OpenAI takes them."""
_NOT_BY_NAME = frozenset({"n_predict", "grammar_file", "json_schema_file", "logit_bias", "logprobs"})
"""Fields of ``SamplingOptions`` that clients cannot set by that name: they have another one, or name a file."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), Field(max_length=_MAX_STOPS)
]


class StreamOptions(AskedObject):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SamplingFields(BaseModel):
    """What all kinds of answers take: the model, how tokens are drawn, and fields that change nothing."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool = False
    stop: StopTexts = []
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    routing: bool | Literal["mean", "layers"] = False
    # these change nothing in an answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def routing_kind(self) -> RoutingKind | None:
        """What the answer tells of the experts of each token; None: nothing."""
        if isinstance(self.routing, bool):
            return "mean" if self.routing else None
        return self.routing

    def check(self) -> None:
        """Raise ApiError for fields that are unknown or contradict each other."""
        for name in self.model_extra or {}:
            if name not in _sampling_names():
                raise unknown_field(name, [*type(self).model_fields, *_sampling_names()])

    def sampling(self, logprobs: int | None, n_predict: int | None, schema: str | None = None) -> SamplingOptions:
        """How tokens are drawn. Raises ApiError that names the field."""
        named = ("seed", "temperature", "top_p", "presence_penalty", "frequency_penalty")
        given: dict[str, Any] = {name: getattr(self, name) for name in named}
        given |= {"logprobs": logprobs, "n_predict": -1 if n_predict is None else n_predict}
        given["logit_bias"] = tuple(self._bias(token, bias) for token, bias in self.logit_bias.items())
        given |= {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if schema is not None:
            if given.keys() & {"grammar", "json_schema"}:
                raise invalid("give one of response_format, tool_choice, grammar and json_schema", "response_format")
            given["json_schema"] = schema
        try:
            return SamplingOptions(**given)
        except OptionError as error:
            raise _named(error) from error

    def _bias(self, token: str, bias: float) -> str:
        if not re.fullmatch(r"\d{1,9}", token):
            raise invalid(f"logit_bias: a key must be a token's id, not {token[:40]!r}", "logit_bias")
        return f"{token}-inf" if bias == -100 else f"{token}{bias:+.6f}"


class GenerationFields(SamplingFields):
    """What both kinds of completions take."""

    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=_MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=-1)
    store: Literal[False] = False

    def check(self) -> None:
        """Raise ApiError for fields that are unknown or contradict each other."""
        super().check()
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is for requests with stream: true", "stream_options")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def _sampling_names() -> list[str]:
    """The fields of ``SamplingOptions`` that a request may set by name."""
    known = SamplingFields.model_fields
    return [spec.name for spec in fields(SamplingOptions) if spec.name not in _NOT_BY_NAME and spec.name not in known]


def _named(error: OptionError) -> Exception:
    """``error`` with the name of the request's field in place of the flag's."""
    message = str(error)
    for spec in fields(SamplingOptions):
        flags = spec.metadata["flags"]
        name = max(flags, key=len, default=spec.name)
        if message.startswith((f"{name} ", f"{spec.name} ")):
            return invalid(spec.name + message[message.index(" ") :], spec.name, "invalid_value")
    return invalid(message)


class ChatCompletionRequest(GenerationFields):
    """The body of ``/v1/chat/completions``."""

    messages: list[AskedMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=-1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[AskedTool] = Field(default=[], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    modalities: list[Literal["text"]] | None = None

    def check(self) -> None:
        """Raise ApiError for fields that are unknown or contradict each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise invalid("two tools have one name", "tools")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice asks for a call, and there are no tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise invalid(f"there is no tool {self.tool_choice.function.name!r}", "tool_choice")
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise invalid("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        if 0 in limits:
            raise invalid("max_completion_tokens must be at least 1", "max_completion_tokens")

    @property
    def n_predict(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that holds the answer, None for a text. Raises ApiError."""
        try:
            return None if self.response_format is None else self.response_format.schema_text
        except ValueError as error:
            raise invalid(str(error), "response_format") from error


def _as_prompts(prompt: Any) -> Any:
    """A prompt as a list of prompts: a text, tokens, or a list of either. Raises ValueError for anything else."""
    is_single = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int)
    prompts = [prompt] if is_single else prompt
    for one in prompts if isinstance(prompts, list) else ():
        is_tokens = isinstance(one, list) and all(type(token) is int and token >= 0 for token in one)
        if not (isinstance(one, str) or is_tokens):
            raise ValueError("a prompt is a text or a list of token ids, which are whole numbers from 0 on")
    return prompts


TokenIds = list[Annotated[int, Field(ge=0)]]


class CompletionRequest(GenerationFields):
    """The body of ``/v1/completions``."""

    prompt: Annotated[list[str | TokenIds], BeforeValidator(_as_prompts), Field(min_length=1, max_length=_MAX_CHOICES)]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None
    suffix: Literal[""] = ""

    def check(self) -> None:
        """Raise ApiError for fields that are unknown or contradict each other."""
        super().check()
        if self.best_of not in (None, self.n):
            raise invalid("best_of must be n: this server does not choose among answers", "best_of")


class EmbeddingsRequest(AskedObject):
    """The body of ``/v1/embeddings``."""

    input: Annotated[list[str | TokenIds], BeforeValidator(_as_prompts), Field(min_length=1, max_length=_MAX_TEXTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class TokenizeRequest(AskedObject):
    """The body of ``/tokenize``."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(AskedObject):
    """The body of ``/detokenize``."""

    tokens: TokenIds
