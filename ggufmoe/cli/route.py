"""``ggufmoe route``: which experts every token went to, in the terminal and as HTML, PNG and JSON."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from ggufmoe.cli.console import note, piped_text
from ggufmoe.cli.params import ModelName, with_options
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.cli.route_view import RouteView
from ggufmoe.cli.terminal import load_engine
from ggufmoe.cli.wanted_model import model_file
from ggufmoe.engine import Engine
from ggufmoe.errors import InputError, OptionError
from ggufmoe.files import check_output_file, decode_text, replacing
from ggufmoe.gguf.expert_names import router_origin
from ggufmoe.gguf.hyper import Hyper
from ggufmoe.options import ContextOptions, ModelOptions, OffloadOptions, option
from ggufmoe.routing import RoutingTrace, trace_routing
from ggufmoe.routing.page import routing_page
from ggufmoe.routing.plot import write_picture
from ggufmoe.routing.report import shares_report, trace_report
from ggufmoe.routing.statistics import LabelledShares, share_by_label, summarize
from ggufmoe.runtime.chat import Chat
from ggufmoe.runtime.messages import Message
from ggufmoe.sizes import counted
from ggufmoe.work import Progress

_MAX_PROMPTS_BYTES = 64 << 20


@dataclass(frozen=True)
class RouteOptions:
    """What is traced, and how it is shown."""

    prompts: Path | None = option(
        None, "--prompts", help='Compare by label: lines of {"label": ..., "prompt": ...}.', metavar="FILE.jsonl"
    )
    generate: int = option(0, "--generate", help="Also generate N tokens, always the most likely one.", metavar="N")
    against: str | None = option(
        None, "--against", help="Show the prompt in another model of the same experts too.", metavar="MODEL"
    )
    chat: bool = option(False, "--chat", help="Put each prompt into the model's chat template.")
    layer: int | None = option(None, "--layer", help="Colour by one layer, not by the mean of all.", metavar="L")
    capacity_factor: float = option(
        1.0, "--capacity-factor", help="Capacity of each expert as a multiple of its even share.", metavar="X"
    )
    html: Path | None = option(None, "--html", help="Write a self-contained HTML page.", metavar="FILE")
    png: Path | None = option(None, "--png", help="Write a picture (needs matplotlib).", metavar="FILE")
    json: Path | None = option(
        None, "--json", help="Write all numbers as JSON; -: to stdout, and nothing else.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.generate < 0:
            raise OptionError(f"--generate takes 0 or more tokens, not {self.generate}")
        if not self.capacity_factor > 0:
            raise OptionError(f"--capacity-factor must be greater than 0, not {self.capacity_factor}")


Labelled = list[tuple[str, str]]
"""(label, prompt) pairs."""


@with_options(RouteOptions, ModelOptions, ContextOptions, OffloadOptions)
def route_command(
    model: ModelName,
    route: RouteOptions,
    wanted: ModelOptions,
    context: ContextOptions,
    offload: OffloadOptions,
    prompt: Annotated[str | None, typer.Argument(help="Text to route; - reads it from stdin.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", help="Compare two prompts, side by side on a wide terminal.", metavar="A B"),
    ] = None,
) -> None:
    """Show which experts every token went to."""
    prompts = _prompts(prompt, compare, route)
    _check_outputs(model, route)
    path = model_file(model, wanted)
    if route.against is None:
        with load_engine(path, context, offload) as engine:
            traced = _traced(engine, path, prompts, route, compared=prompt is None)
    else:
        both = (path, model_file(route.against, wanted))
        traced = _both(*(_alone(one, prompts, route, context, offload) for one in both))
    if str(route.json) != "-":
        _show(traced, route)
    _write_files(traced, route)


@dataclass(frozen=True)
class _Traced:
    paths: tuple[Path, ...]
    """The model's file, or the two that are compared."""
    texts: tuple[tuple[str, RoutingTrace], ...]
    """(label, trace) pairs."""
    own: tuple[tuple[str, RoutingTrace], ...]
    """The same without BOS, which all texts share."""
    is_compared: bool
    facts: tuple[tuple[str, str], ...]
    """What the header says about the experts, beyond their number."""

    @property
    def title(self) -> str:
        return " and ".join(path.name for path in self.paths)

    @cached_property
    def shares(self) -> LabelledShares | None:
        """The shares of each label, if texts are compared; without BOS."""
        return share_by_label(self.own) if self.is_compared else None


def _prompts(prompt: str | None, compare: tuple[str, str] | None, route: RouteOptions) -> Labelled:
    if route.against is not None and prompt is None:
        raise typer.BadParameter("--against shows one PROMPT in two files: leave out --compare and --prompts")
    if route.against is not None and route.png is not None:
        raise typer.BadParameter("--png draws one file: use --html to compare")
    if sum(given is not None for given in (prompt, compare, route.prompts)) != 1:
        raise typer.BadParameter("give one of: a PROMPT, --compare with two prompts, --prompts with a file")
    if route.prompts is not None:
        if route.png is not None:
            raise typer.BadParameter("--png draws one prompt: use --html for many")
        return _read_prompts(route.prompts)
    if compare is not None:
        if route.png is not None:
            raise typer.BadParameter("--png draws one prompt: use --html to compare")
        return [("A", compare[0]), ("B", compare[1])]
    text = piped_text() if prompt == "-" else prompt or ""
    if not text.strip():
        raise InputError("the prompt is empty: there is nothing to route")
    return [("prompt", text)]


def _read_prompts(path: Path) -> Labelled:
    """The labelled prompts of a JSONL file. Raises InputError, which names the line."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PROMPTS_BYTES + 1)  # a device may be without end
        if len(data) > _MAX_PROMPTS_BYTES:
            raise InputError(f"{path}: more than {_MAX_PROMPTS_BYTES >> 20} MiB of prompts; take a part of them")
        lines = decode_text(data).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = [_labelled(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{path}: there is no prompt in it")
    return found


def _labelled(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("label", "prompt")):
        raise InputError(f'{path}:{number}: expected {{"label": "...", "prompt": "..."}}')
    return row["label"], row["prompt"]


def _check_outputs(model: str, route: RouteOptions) -> None:
    """Raise OutputError if a file could not be written, before anything is computed."""
    if route.png is not None and route.png.suffix.lower() != ".png":
        raise OptionError(f"--png writes a PNG: give {route.png} the ending .png")
    for path in (route.html, route.png, route.json):
        if path is not None and str(path) != "-":
            inputs = [Path(given) for given in (model, route.prompts, route.against) if given is not None]
            check_output_file(path, inputs, replace=True)


def _traced(engine: Engine, model: Path, prompts: Labelled, route: RouteOptions, *, compared: bool) -> _Traced:
    texts = tuple(_all_traces(engine, prompts, route))
    bos = engine.bos_token
    own = tuple((label, trace.part(int(trace.token_ids[0] == bos and trace.n_token > 1))) for label, trace in texts)
    metadata = engine.header.metadata
    facts = Hyper.of(metadata).expert_facts()
    if (origin := router_origin(metadata)) is not None:
        facts.append(("router" if route.against is None else f"router of {model.name}", origin))
    return _Traced((model,), texts, own, compared, tuple(facts))


def _alone(
    path: Path, prompts: Labelled, route: RouteOptions, context: ContextOptions, offload: OffloadOptions
) -> _Traced:
    """The one prompt in one of two files that are compared, labelled by the file's name."""
    with load_engine(path, context, offload) as engine:
        return _traced(engine, path, [(path.name, text) for _, text in prompts], route, compared=False)


def _both(one: _Traced, other: _Traced) -> _Traced:
    """Two files side by side. Raises InputError where their experts are not as many."""
    (name, first), (other_name, second) = one.texts[0], other.texts[0]
    if (first.n_expert, first.layers) != (second.n_expert, second.layers):
        one_size, other_size = (
            f"{counted(trace.n_expert, 'expert')} in {counted(trace.n_layer, 'layer')}" for trace in (first, second)
        )
        raise InputError(f"{one.paths[0]} has {one_size}, {other.paths[0]} {other_size}: they cannot be compared")
    if name == other_name:
        one, other = _labelled_by_path(one), _labelled_by_path(other)
    facts = tuple(dict.fromkeys((*one.facts, *other.facts)))
    return _Traced((*one.paths, *other.paths), (*one.texts, *other.texts), (*one.own, *other.own), True, facts)


def _labelled_by_path(traced: _Traced) -> _Traced:
    label = str(traced.paths[0])
    return replace(traced, texts=((label, traced.texts[0][1]),), own=((label, traced.own[0][1]),))


def _all_traces(engine: Engine, prompts: Labelled, route: RouteOptions) -> Iterator[tuple[str, RoutingTrace]]:
    with ProgressLine("route", phase="prompts", waiting="reading the prompt") as line:
        for i, (label, text) in enumerate(prompts):
            if len(prompts) > 1:
                line.update(Progress("prompts", i, len(prompts), "runs", label))
            yield label, _trace(engine, text, route, None if len(prompts) > 1 else line)


def _trace(engine: Engine, text: str, route: RouteOptions, line: ProgressLine | None) -> RoutingTrace:
    def show(progress: Progress) -> None:
        if line is not None and progress.phase == "generate":  # the line itself says how long the rest takes
            line.update(progress)

    prompt: Any = Chat(engine).prompt((Message("user", text),), must_fit=True) if route.chat else text
    trace = trace_routing(engine, prompt, generate=route.generate, on_progress=show)
    if route.layer is not None:
        trace.row_of(route.layer)
    return trace


def _show(traced: _Traced, route: RouteOptions) -> None:
    view = RouteView(sys.stdout)
    first = traced.texts[0][1]
    view.model(traced.title, first, traced.facts)
    if traced.shares is None:
        view.text(first, route.layer)
        view.summary(first, summarize(first, route.capacity_factor), route.layer)
        return
    if route.prompts is None:
        view.texts(traced.texts, route.layer)
    view.comparison(traced.shares, first)


def _write_files(traced: _Traced, route: RouteOptions) -> None:
    if route.json is not None:
        _write_json(route.json, traced, route.capacity_factor)
    if route.html is not None:
        titles = ["Text"] if traced.shares is None else _titles([label for label, _ in traced.texts])
        texts = [(title, trace) for title, (_, trace) in zip(titles, traced.texts, strict=True)]
        page = routing_page(
            traced.title, texts, shares=traced.shares, capacity_factor=route.capacity_factor, facts=traced.facts
        )
        _write(route.html, page)
    if route.png is not None:
        write_picture(route.png, traced.title, traced.texts[0][1], route.layer)
        note(f"wrote {route.png}")


def _titles(labels: list[str]) -> list[str]:
    """The label of each prompt, numbered where several prompts have the same label."""
    seen: dict[str, int] = {}
    titles = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        titles.append(f"{label}, {seen[label]}" if labels.count(label) > 1 else label)
    return titles


def _write_json(path: Path, traced: _Traced, capacity_factor: float) -> None:
    texts = [
        {"label": label, **trace_report(trace, summarize(trace, capacity_factor))} for label, trace in traced.texts
    ]
    content: dict[str, Any] = {"model": str(traced.paths[0]), "texts": texts}
    if traced.paths[1:]:
        content["against"] = str(traced.paths[1])
    if traced.shares is not None:
        content["comparison"] = shares_report(traced.shares)
    written = json.dumps(content, ensure_ascii=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(written)
    else:
        _write(path, written)


def _write(path: Path, content: str) -> None:
    with replacing(path, "the report") as file:
        file.write(content.encode())
    note(f"wrote {path}")
