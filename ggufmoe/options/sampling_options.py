"""Options of generation: how the next token is drawn, and how a question becomes a prompt."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.limits import MAX_INT32, MAX_PENALTY_TOKENS, MAX_SEED

_MORE = "Sampling options, more"


_MAX_LOGPROBS = 1000
_BIAS = re.compile(r"(\d{1,9})([+-](?:inf|\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; None stands for the value that the model's file suggests, else for the default named
    in the help.

    Raises OptionError for values out of range.
    """

    temperature: float | None = option(
        None,
        "--temp",
        "--temperature",
        help="Randomness of the choice; 0: always the most likely token. [default: the model's, else 0.7]",
        metavar="T",
        between=(0, 100),
    )
    top_k: int | None = option(
        None,
        "--top-k",
        help="Keep only the K most likely tokens; 0: all. [default: the model's, else 50]",
        metavar="K",
        between=(0, MAX_INT32),
    )
    top_p: float | None = option(
        None,
        "--top-p",
        help="Keep the most likely tokens that sum to P; 1: all. [default: the model's, else 0.95]",
        metavar="P",
        between=(0, 1),
    )
    min_p: float | None = option(
        None,
        "--min-p",
        help="Drop tokens less likely than P times the most likely one. [default: the model's, else 0]",
        metavar="P",
        between=(0, 1),
    )
    repeat_penalty: float | None = option(
        None,
        "--repeat-penalty",
        help="Penalty on tokens that came before; 1: none. [default: the model's, else 1]",
        metavar="X",
        between=(0.01, 100),
    )
    seed: int | None = option(
        None,
        "--seed",
        help="The same seed gives the same answer on the same devices; -1: random. [default: -1]",
        metavar="N",
        between=(-1, MAX_SEED),
    )
    n_predict: int = option(
        256,
        "-n",
        "--n-predict",
        "--predict",
        help="Generate at most N tokens; -1: until the context is full.",
        metavar="N",
        between=(-1, MAX_INT32),
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
        help="Number of last tokens that the penalties look at. [default: the model's, else 64]",
        metavar="N",
        panel=_MORE,
        between=(0, MAX_PENALTY_TOKENS),
    )
    presence_penalty: float = option(
        0.0,
        "--presence-penalty",
        help="Penalty on tokens that came before, however often.",
        metavar="X",
        panel=_MORE,
        between=(-100, 100),
    )
    frequency_penalty: float = option(
        0.0,
        "--frequency-penalty",
        help="Penalty on tokens that came before, for each time.",
        metavar="X",
        panel=_MORE,
        between=(-100, 100),
    )
    dry_multiplier: float = option(
        0.0,
        "--dry-multiplier",
        help="Strength of the penalty on repeated sequences (DRY); 0: off.",
        metavar="X",
        panel=_MORE,
        between=(0, 100),
    )
    dry_base: float = option(
        1.75,
        "--dry-base",
        help="How fast DRY's penalty grows with their length.",
        metavar="X",
        panel=_MORE,
        between=(1, 100),
    )
    dry_allowed_length: int = option(
        2,
        "--dry-allowed-length",
        help="Longest sequence that may be repeated without a penalty.",
        metavar="N",
        panel=_MORE,
        between=(0, MAX_INT32),
    )
    dry_penalty_last_n: int = option(
        64,
        "--dry-penalty-last-n",
        help="Number of last tokens in which DRY looks for repetitions.",
        metavar="N",
        panel=_MORE,
        between=(0, MAX_PENALTY_TOKENS),
    )
    dry_sequence_breakers: tuple[str, ...] = option(
        (),
        "--dry-sequence-breaker",
        help="String that ends a sequence for DRY, in place of newline, colon, quote and star; none: no string does.",
        metavar="STRING",
        panel=_MORE,
    )
    xtc_probability: float | None = option(
        None,
        "--xtc-probability",
        help="Probability that XTC drops all likely tokens except the least likely of them; 0: off. [default: 0]",
        metavar="P",
        panel=_MORE,
        between=(0, 1),
    )
    xtc_threshold: float | None = option(
        None,
        "--xtc-threshold",
        help="XTC counts tokens of at least this probability as likely. [default: 0.1]",
        metavar="P",
        panel=_MORE,
        between=(0, 1),
    )
    mirostat: int | None = option(
        None,
        "--mirostat",
        help="1 or 2: Mirostat; only temperature, grammar and logit biases apply with it.",
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
        None,
        "--mirostat-ent",
        help="Mirostat's target surprise. [default: 5]",
        metavar="X",
        panel=_MORE,
        between=(0, 100),
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
        None, "--grammar", help="Generate only text that this grammar (GBNF) accepts.", metavar="GBNF", panel=_MORE
    )
    grammar_file: Path | None = option(
        None, "--grammar-file", help="Read the grammar from a file.", metavar="FILE", panel=_MORE
    )
    json_schema: str | None = option(
        None, "-j", "--json-schema", help="Generate only JSON that this schema accepts.", metavar="SCHEMA", panel=_MORE
    )
    json_schema_file: Path | None = option(
        None, "-jf", "--json-schema-file", help="Read the schema from a file.", metavar="FILE", panel=_MORE
    )
    logprobs: int | None = option(
        None,
        help="Report each token's log-probability and those of the N most likely tokens; 0: only its own.",
        between=(0, _MAX_LOGPROBS),
    )

    def __post_init__(self) -> None:
        check_values(self)
        forms = (self.grammar, self.grammar_file, self.json_schema, self.json_schema_file)
        message = "give one of --grammar, --grammar-file, --json-schema and --json-schema-file, not several"
        check(sum(form is not None for form in forms) <= 1, message)
        _ = self.biases

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, what is added to its logit) of each ``logit_bias``."""
        matches = [_BIAS.fullmatch(given) for given in self.logit_bias]
        for given, match in zip(self.logit_bias, matches, strict=True):
            check(
                match is not None, f"--logit-bias: expected a token id and a signed number, as 15043+1, not {given!r}"
            )
        return tuple((int(match[1]), float(match[2])) for match in matches if match)


@dataclass(frozen=True)
class PromptOptions:
    """How a question becomes a prompt."""

    system_prompt: str | None = option(
        None, "-sys", "--system-prompt", help="System message, which precedes the conversation.", metavar="TEXT"
    )
    chat_template: str | None = option(
        None,
        "--chat-template",
        help="Chat template: a name stored in the model, chatml, llama3, mistral, or a file; default: the model's own.",
        metavar="NAME|FILE",
    )

    def __post_init__(self) -> None:
        check_values(self)


_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class TemplateOptions:
    """Variables of the chat template: how much a model reasons, and others that its template reads.

    Raises OptionError for a value out of range; a variable that the template of a model never reads is refused by
    ``Chat`` and ``ChatFormat``.
    """

    think: Literal["auto", "on", "off"] = option(
        "auto",
        "--think",
        help="Have the model reason before it answers, or not (enable_thinking); auto: as its template does by itself.",
        panel="Prompt options",
    )
    reasoning_effort: Literal["auto", "low", "medium", "high"] = option(
        "auto", "--reasoning-effort", help="How much to reason, for models such as gpt-oss.", panel="Prompt options"
    )
    template_var: tuple[str, ...] = option(
        (),
        "--template-var",
        help="Give the chat template a variable: JSON, or else text; may be repeated.",
        metavar="NAME=VALUE",
        panel="Prompt options",
    )

    def __post_init__(self) -> None:
        check_values(self)
        for given in self.template_var:
            check(_VARIABLE.fullmatch(given) is not None, f"--template-var: expected NAME=VALUE, not {given!r}")

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of ``template_var`` by name."""
        pairs = (given.partition("=") for given in self.template_var)
        return {name: _json_or_text(typed) for name, _, typed in pairs}


def _json_or_text(typed: str) -> Any:
    try:
        return json.loads(typed)
    except (ValueError, RecursionError):
        return typed


@dataclass(frozen=True)
class StopOptions:
    """Texts that end an answer."""

    stop: tuple[str, ...] = option(
        (),
        "--stop",
        help="End the answer before this text, which is not printed; may be repeated. \\n stands for a new line.",
        metavar="TEXT",
        panel="Prompt options",
    )

    def __post_init__(self) -> None:
        check_values(self)
        check(all(self.stop), "--stop: an empty text would end every answer at once")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts, with new lines where ``\\n`` was typed."""
        return tuple(text.replace("\\n", "\n") for text in self.stop)
