"""``ggufmoe run``: one answer on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from ggufmoe.cli.console import note, piped_text
from ggufmoe.cli.jobs import interruptible
from ggufmoe.cli.params import USAGE_ERROR, ModelName, ShowReasoning, with_options
from ggufmoe.cli.terminal import load_engine, make_chat, speeds, stream_answer, why_ended
from ggufmoe.cli.wanted_model import model_file
from ggufmoe.errors import Cancelled, InputError
from ggufmoe.options import (
    ContextOptions,
    ModelOptions,
    OffloadOptions,
    PromptOptions,
    SamplingOptions,
    StopOptions,
    TemplateOptions,
    option,
)
from ggufmoe.runtime.events import ChatEvent, Finished, Reasoning
from ggufmoe.work import CancelFlag


@dataclass(frozen=True)
class RunOptions:
    """How the prompt is used and the answer is printed."""

    raw: bool = option(False, "--raw", help="Continue the text as it is, without a template; it is printed first.")
    json: bool = option(False, "--json", help="Print one JSON object at the end instead of the text.")
    quiet: bool = option(False, "--quiet", help="Leave out why the answer ended, and the speeds.")


@with_options(
    RunOptions,
    ModelOptions,
    PromptOptions,
    TemplateOptions,
    StopOptions,
    SamplingOptions,
    ContextOptions,
    OffloadOptions,
)
def run_command(
    model: ModelName,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from stdin, as does a pipe without a prompt.")
    ] = None,
    *,
    run: RunOptions,
    wanted: ModelOptions,
    show_reasoning: ShowReasoning = None,
    asking: PromptOptions,
    variables: TemplateOptions,
    stop: StopOptions,
    sampling: SamplingOptions,
    context: ContextOptions,
    offload: OffloadOptions,
) -> None:
    """Print one answer of a model."""
    if run.raw and (asking, variables) != (PromptOptions(), TemplateOptions()):
        raise USAGE_ERROR("--raw takes the text as it is: leave out --system-prompt, --chat-template and its variables")
    if prompt is None and sys.stdin.isatty():
        raise USAGE_ERROR("there is no prompt: say something, as in 'ggufmoe run MODEL \"Hello\"', or use chat")
    text = piped_text() if prompt in (None, "-") else prompt
    if not (text.strip() or run.raw):
        raise InputError("the prompt is empty: there is nothing to answer")
    path = model_file(model, wanted, quiet=run.quiet, asking=None if run.raw else asking)
    with load_engine(path, context, offload) as engine:

        def answer(cancel: CancelFlag) -> Iterator[ChatEvent]:
            if run.raw:
                must_fit = engine.overflow == "error"
                tokens = engine.tokenize(text, parse_special=True, must_fit=must_fit, cancel=cancel)
                return engine.generate(tokens, sampling, stop=stop.texts, cancel=cancel)
            return make_chat(engine, asking, variables, sampling).send(text, cancel=cancel, stop=stop.texts)

        if run.json:
            shown = _write_json(interruptible(answer), path, text)
        else:
            shown = stream_answer(answer, before=text if run.raw else "", show_reasoning=show_reasoning)
    if not run.quiet:
        if shown.reason != "cancelled" and (why := why_ended(shown, full="--ctx-size gives more room")):
            note(why)
        note(speeds(shown.timing))
    if shown.reason == "cancelled":
        raise Cancelled("stopped")


def _write_json(events: Iterator[ChatEvent], model: Path, prompt: str) -> Finished:
    *tokens, last = events
    assert isinstance(last, Finished), "events end with Finished"
    result = {
        "model": str(model),
        "prompt": prompt,
        "text": "".join(event.text for event in (*tokens, last)),
        "reasoning": "".join(event.reasoning for event in tokens if isinstance(event, Reasoning)),
        "finish_reason": last.reason,
        "seed": last.seed,
        **asdict(last.timing),
        "prompt_tokens_per_s": last.timing.prompt_tokens_per_s,
        "generated_tokens_per_s": last.timing.generated_tokens_per_s,
    }
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    return last
