"""``ggufmoe perplexity``: how well a model predicts a text, alone or compared with a reference.

Owns what is printed; ``evaluation.perplexity`` and ``evaluation.divergence`` measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import model_names, with_options
from ggufmoe.cli.progress import chunk_display
from ggufmoe.cli.wanted_model import model_file
from ggufmoe.errors import OptionError
from ggufmoe.evaluation.chunks import check_complete
from ggufmoe.evaluation.divergence import SHARES, Comparison, Distribution, Divergence, kl_divergences
from ggufmoe.evaluation.perplexity import Estimate, Perplexity, perplexity
from ggufmoe.options import EvaluationOptions, ModelOptions, OffloadOptions
from ggufmoe.sizes import counted


@with_options(ModelOptions, EvaluationOptions, OffloadOptions)
def perplexity_command(
    model: Annotated[
        list[str],
        typer.Argument(
            help="A GGUF file, a stored model, or whatever `run` takes; several with --against.",
            metavar="MODEL...",
            autocompletion=model_names,
        ),
    ],
    file: Annotated[Path, typer.Option("-f", "--file", help="The text, in UTF-8.", metavar="FILE")],
    *,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Compare with this model, token by token.", metavar="MODEL"),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option("--answers", help="FILE is JSON lines with messages: score the assistant's alone."),
    ] = False,
    logits: Annotated[
        Path | None,
        typer.Option(
            "--logits",
            "--kl-divergence-base",
            help="With --against: keep what the reference predicts in this file, and take it from there if it exists.",
            metavar="FILE",
        ),
    ] = None,
    wanted: ModelOptions,
    options: EvaluationOptions,
    offload: OffloadOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure how well a model predicts a text, or how far it is from another model.

    The definitions are those of llama-perplexity: the second half of each chunk is scored. --against tells what a
    quantization costs: KL divergence, how often the likeliest token is the same, by how much probabilities move. With
    several MODELs their divergences are compared with that of the first, token by token. --answers takes conversations,
    rendered by the model's chat template, one to a chunk.
    Ctrl-C prints the result over the chunks that are done.
    """
    if against is None and (len(model) > 1 or logits is not None):
        raise OptionError("several models and --logits are for a comparison: give --against REFERENCE too")
    if answers and against is not None:
        raise OptionError("--answers scores one model, and --against compares two: use one of them")
    paths = [model_file(each, wanted, quiet=quiet) for each in model]
    result: Perplexity | Divergence | Comparison
    display = partial(chunk_display, at_once=options.context.n_seq_max, quiet=quiet)
    if against is None:
        result = alone = run_job(
            lambda show, cancel: perplexity(
                paths[0],
                text_file=file,
                answers=answers,
                options=options,
                offload=offload,
                on_progress=show,
                cancel=cancel,
            ),
            display("perplexity", lambda found: _shown(found.estimate)),
            gentle=True,
        )
        lines = [f"perplexity  {_shown(alone.estimate)}", _extent(alone)]
    else:
        reference = model_file(against, wanted, quiet=quiet)
        result = beside = run_job(
            lambda show, cancel: kl_divergences(
                paths,
                reference,
                text_file=file,
                logits=logits,
                options=options,
                offload=offload,
                on_progress=show,
                cancel=cancel,
            ),
            display("divergence", lambda found: f"KL divergence {_shown(found.models[0].kl.mean, 5)}"),
            gentle=True,
        )
        lines = list(_comparison_lines(beside))
        if len(beside.models) == 1:
            result, lines = beside.models[0], list(_divergence_lines(beside.models[0]))
    print(json.dumps(result.to_dict()) if as_json else "\n".join(lines))
    check_complete(result)


def _extent(result: Perplexity | Divergence) -> str:
    if isinstance(result, Perplexity) and result.answers:
        where = counted(result.n_chunks, "conversation")
    else:
        where = f"{counted(result.n_chunks, 'chunk')} of {result.n_ctx}"
    return f"{result.n_scored:,} tokens in {where}, {result.seconds:.1f} s"


def _comparison_lines(result: Comparison) -> Iterator[str]:
    """One line for each model: its divergence, and by how much it is above that of the first."""
    width = max(len(each.model.name) for each in result.models)
    yield f"beside {result.models[0].reference.name}"
    yield f"{'':{width}}  {'KL divergence':21}  {'above the first':23}  same likeliest token"
    differences = ("", *(f"{each.value:+.6f} ± {each.uncertainty:.6f}" for each in result.kl_differences))
    for each, difference in zip(result.models, differences, strict=True):
        yield f"{each.model.name:{width}}  {_shown(each.kl.mean, 6):21}  {difference:23}  {_percent(each.same_top)}"
    yield _extent(result.models[0])


def _divergence_lines(result: Divergence) -> Iterator[str]:
    yield f"{result.model.name} beside {result.reference.name}"
    yield f"perplexity            {_shown(result.perplexity)}"
    yield f"  of the reference    {_shown(result.reference_perplexity)}"
    yield f"  ratio               {_shown(result.ratio, 6)}"
    yield f"  logarithm of it     {_shown(result.log_ratio, 6)}"
    yield f"  difference          {_shown(result.difference, 6)}"
    yield f"  correlation         {100 * result.correlation:.2f} %"
    yield f"KL divergence         {_shown(result.kl.mean, 6)}"
    yield from _quantile_lines(result.kl, 1, "")
    yield f"change of p           {_percent(result.delta_p.mean)}"
    yield f"  root mean square    {_percent(result.rms_delta_p)}"
    yield from _quantile_lines(result.delta_p, 100, " %")
    yield f"same likeliest token  {_percent(result.same_top)}"
    yield _extent(result)


def _quantile_lines(distribution: Distribution, scale: float, unit: str) -> Iterator[str]:
    names = {0.0: "minimum", 0.5: "median", 1.0: "maximum"}
    for share in reversed(SHARES):
        name = names.get(share, f"{100 * share:.1f} % quantile")
        yield f"  {name:18}  {scale * distribution.quantiles[share]:.6f}{unit}"


def _shown(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.uncertainty:.{digits + 1 if digits < 5 else digits}f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.3f} ± {100 * estimate.uncertainty:.3f} %"
