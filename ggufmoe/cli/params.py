"""Command-line parameters made from option objects.

Owns the way from a frozen dataclass of ``options`` to typer's parameters, so that a flag is defined once, and the
parameters that several verbs share. Each verb's module says which option objects it takes, and chat changes them by
name while it runs.
"""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ggufmoe.cli.kept_options import KEPT_GROUPS, kept_fields, variable
from ggufmoe.errors import EngineMissingError, InputError, OptionError
from ggufmoe.sizes import parse_line_speed

Command = Callable[..., None]
OptionsT = TypeVar("OptionsT")
# newer typers carry a click of their own; the exceptions are reached through what is public in all of them
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
_MOST_LISTED = 40
"""Characters up to which the values of an option stand beside its name; a longer list would not fit a terminal."""
_DEFAULT = re.compile(r"\[default: (.*)\]")
SHOWN_ERROR: Any = typer.BadParameter.__mro__[2]


def stored_names(incomplete: str) -> list[str]:
    """The stored models whose names begin with what has been typed, for the completion of a shell."""
    from ggufmoe.store.model_store import ModelStore

    try:
        return [model.name for model in ModelStore().models() if model.name.startswith(incomplete)]
    except InputError:  # without a home there is no store
        return []


def model_names(incomplete: str) -> list[str]:
    """Stored models, GGUF files, recipes and folders that begin with what has been typed, for a shell's completion."""
    begun = incomplete.rpartition("/")[2]
    folder = incomplete.removesuffix(begun)
    there = sorted(path for path in Path(folder or ".").glob("*") if path.name.startswith(begun))
    paths = [f"{folder}{path.name}{'/' if path.is_dir() else ''}" for path in there]
    return [*stored_names(incomplete), *(path for path in paths if path.endswith(("/", ".gguf", ".yaml", ".yml")))]


ModelName = Annotated[
    str,
    typer.Argument(
        help="A GGUF file, a stored model, a checkpoint directory, a recipe.yaml, or a name on the hub (org/name).",
        autocompletion=model_names,
    ),
]
StoredName = Annotated[
    str, typer.Argument(help="Name of a stored model, as `ggufmoe list` shows it.", autocompletion=stored_names)
]
GGUFOutput = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="The GGUF file to write; default: NAME-TYPE.gguf in the current folder.",
        metavar="OUT.gguf",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
EndWithJSON = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
ShowReasoning = Annotated[
    bool | None,
    typer.Option(
        "--show-reasoning/--hide-reasoning",
        help="Print what the model thinks before it answers: dimmed on a terminal (default), on stderr where stdout is "
        "a file or a pipe (default there: not at all).",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]


def _number(kind: type, what: str) -> Callable[[str], Any]:
    """A parser whose error quotes what was typed, which that of typer's own parser does not."""

    def parse(typed: str) -> Any:
        try:
            return kind(typed)
        except ValueError as error:
            raise OptionError(f"expected {what}, not {typed!r}") from error

    return parse


_INTEGER, _FLOAT = _number(int, "a whole number"), _number(float, "a number")
_NUMBERS: dict[Any, Callable[[str], Any]] = {
    int: _INTEGER,
    int | None: _INTEGER,
    float: _FLOAT,
    float | None: _FLOAT,
}


def file_types(incomplete: str) -> list[str]:
    """The file types that begin with what has been typed, for the completion of a shell."""
    from ggufmoe.quant.filetypes import FileType

    return _begun(incomplete, FileType.__members__)


def _tensor_types(incomplete: str) -> list[str]:
    from ggufmoe.quant.filetypes import WRITABLE_TYPES

    return _begun(incomplete, sorted(writable.name for writable in WRITABLE_TYPES))


def _begun(incomplete: str, names: Iterable[str]) -> list[str]:
    """The names that begin with what has been typed, in capitals or small letters as it is."""
    found = [name for name in names if name.startswith(incomplete.upper())]
    return found if incomplete == incomplete.upper() else [name.lower() for name in found]


def _devices(incomplete: str) -> list[str]:
    """Names of devices; those before the last comma of a list stay."""
    from ggufmoe.placement.devices import find_devices

    before, comma, last = incomplete.rpartition(",")
    try:
        names = [place.name for place in find_devices().places]
    except EngineMissingError:
        names = []
    given = before.split(",")
    choices = names if comma else [*names, "none"]
    return [before + comma + name for name in choices if name not in given and name.startswith(last)]


_COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "quant": file_types,
    "output_tensor_type": _tensor_types,
    "token_embedding_type": _tensor_types,
    "device": _devices,
}
"""By the name of an option's field: the values that begin with what has been typed."""


def with_options(*groups: type) -> Callable[[Command], Command]:
    """Decorate a command so that each parameter annotated with one of ``groups`` becomes flags.

    The command receives ready objects; typer sees one keyword parameter for each field that has flags::

        @with_options(ContextOptions, SamplingOptions)
        def run_command(model: Path, *, context: ContextOptions, sampling: SamplingOptions) -> None: ...

    Field types may be str, int, float, bool, Path, any of these or None, a Literal, and tuple[X, ...] for a flag that
    may be repeated. An OptionError from the constructor of a group is wrong usage (exit code 2). Raises TypeError when
    two fields have one name, or when no parameter is annotated with one of the groups.
    """

    def decorate(command: Command) -> Command:
        hints = {name: _annotated(hint) for name, hint in typing.get_type_hints(command, include_extras=True).items()}
        holders = {name: hint for name, hint in hints.items() if hint in groups}
        if len(holders) != len(groups):
            raise TypeError(f"{command.__name__} must have exactly one parameter for each of {groups}")
        plain = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in holders
        ]
        flags = [parameter for group in holders.values() for parameter in _parameters(group)]
        _check_names([parameter.name for parameter in (*plain, *flags)])

        @functools.wraps(command)
        def with_objects(**values: Any) -> None:
            objects = {name: _build(group, values) for name, group in holders.items()}
            command(**{parameter.name: values[parameter.name] for parameter in plain}, **objects)

        return _with_signature(with_objects, [*(p.replace(kind=p.KEYWORD_ONLY) for p in plain), *flags])

    return decorate


def _annotated(hint: Any) -> Any:
    """``Annotated[X, ...]`` of ``Optional[Annotated[X, ...]]``, which Python 3.10 makes where the default is None."""
    inner = [one for one in typing.get_args(hint) if typing.get_origin(one) is Annotated]
    return inner[0] if inner and typing.get_origin(hint) is typing.Union else hint


def _with_signature(command: Command, parameters: list[inspect.Parameter]) -> Command:
    # typer reads __signature__ or __annotations__, depending on its version; functools.wraps left the originals there
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__  # type: ignore[attr-defined]
    return command


def _check_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TypeError(f"more than one parameter is called {', '.join(twice)}")


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group)
    panel = re.sub(r"(?<!^)(?=[A-Z])", " ", group.__name__).capitalize()
    kept = {field.name for field in kept_fields()} if issubclass(group, KEPT_GROUPS) else set()
    return [
        _parameter(field, hints[field.name], panel, is_kept=field.name in kept)
        for field in fields(group)
        if field.metadata["flags"]
    ]


def _parameter(field: Field[Any], hint: Any, panel: str, *, is_kept: bool) -> inspect.Parameter:
    metadata = field.metadata
    kind = _repeated(hint)
    shown = field.default is not None and kind is None and metadata["parse"] is None
    text, metavar = metadata["help"], metadata["metavar"]
    words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if metavar is None and len("|".join(words)) > _MOST_LISTED:
        text, metavar = f"{text} One of {', '.join(words)}.", "WORD"
    flag = typer.Option(
        *metadata["flags"],
        help=text,
        metavar=metavar,
        parser=_parser(metadata["parse"] or _NUMBERS.get(hint)),
        show_default=shown,
        autocompletion=_COMPLETIONS.get(field.name),
        rich_help_panel=metadata["panel"] or panel,
        envvar=variable(field) if is_kept else None,
        show_envvar=False,
    )
    typed: Any = hint if kind is None else types.GenericAlias(list, (kind,)) | None
    annotation = Annotated[typed, flag]
    default = None if kind is not None or field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parser(parse: Callable[[str], Any] | None) -> Callable[[Any], Any] | None:
    """``parse`` for typer, which also hands over the default; an OptionError becomes wrong usage."""
    if parse is None:
        return None

    def parsed(typed: Any) -> Any:
        try:
            return parse(typed) if isinstance(typed, str) else typed
        except OptionError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


def _line_speed(typed: str) -> float:
    mbit = parse_line_speed(typed)
    if mbit is None:
        raise OptionError(f"{typed!r} is not the speed of a line; give Mbit/s, for example 100 or 2.5Gbit")
    return mbit


LineSpeed = Annotated[
    float | None,
    typer.Option(
        "--line-speed",
        help="With --dry-run: the speed of your line, for how long the network takes (default: 50 and 500 Mbit/s).",
        metavar="MBIT",
        parser=_parser(_line_speed),
    ),
]


def _repeated(hint: Any) -> Any:
    """X for tuple[X, ...], else None."""
    return typing.get_args(hint)[0] if is_repeated(hint) else None


def is_repeated(hint: Any) -> bool:
    """Whether a field with this annotation has a flag that may be repeated."""
    return typing.get_origin(hint) is tuple


def _build(group: type, values: dict[str, Any]) -> Any:
    given = {field.name: values[field.name] for field in fields(group) if field.name in values}
    hints = typing.get_type_hints(group)
    given = {name: tuple(value or ()) if _repeated(hints[name]) else value for name, value in given.items()}
    try:
        return group(**given)
    except OptionError as error:  # it names the flag itself
        raise USAGE_ERROR(str(error)) from error


def with_typed(options: OptionsT, field: Field[Any], typed: str) -> OptionsT:
    """``options`` with one option changed to what was typed; ``default`` gives its default. Raises OptionError."""
    if typed == "default":
        return replace(options, **{field.name: field.default})  # type: ignore[type-var]
    hint = typing.get_type_hints(type(options))[field.name]
    if _repeated(hint) is not None:
        try:
            value: Any = tuple(shlex.split(typed))
        except ValueError as error:
            raise OptionError(f"{typed}: a quotation mark is not closed") from error
    else:
        value = typed_value(hint, field, typed)
    return replace(options, **{field.name: value})  # type: ignore[type-var]


def typed_value(hint: Any, field: Field[Any], typed: str) -> Any:
    """What was typed for a field that takes one value, as its class takes it. Raises OptionError."""
    return (field.metadata["parse"] or _NUMBERS.get(hint) or str)(typed)


def default_shown(field: Field[Any]) -> str:
    """The default of an option; of one that is decided elsewhere, what its help says."""
    if field.default is None:
        stated = _DEFAULT.search(field.metadata["help"])
        return f"default ({stated[1]})" if stated else "none"
    return value_shown(field.default)


def value_shown(value: Any) -> str:
    """The value of an option in words that could be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, tuple) else str(value)
