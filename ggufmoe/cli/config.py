"""``ggufmoe config``: options that are kept, where each comes from, and how they are changed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ggufmoe.cli.console import make_console, note, printable
from ggufmoe.cli.helptext import CONTEXT_SETTINGS, PlainCommand, PlainGroup
from ggufmoe.cli.kept_changes import (
    MODEL,
    change,
    checked_model,
    checked_value,
    config_path,
    forget,
    keep,
    split_key,
    write_config,
)
from ggufmoe.cli.kept_options import (
    KEPT_GROUPS,
    PRESETS,
    Config,
    Kept,
    kept_fields,
    kept_name,
    kept_option,
    read_config,
    variable,
)
from ggufmoe.cli.params import USAGE_ERROR, default_shown, model_names, with_options
from ggufmoe.cli.toml_edit import Value, toml_literal
from ggufmoe.errors import InputError, OptionError
from ggufmoe.options import (
    ContextOptions,
    ModelOptions,
    OffloadOptions,
    PromptOptions,
    SamplingOptions,
    ServerOptions,
    StopOptions,
    TemplateOptions,
)

_EXAMPLE = """\
temp = 0.7
ctx-size = 8192

[preset.writer]
model = "org/name"
system-prompt = "You write short stories."
temp = 1.0
"""

config_app = typer.Typer(
    cls=PlainGroup,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings=CONTEXT_SETTINGS,
)


def _keys(incomplete: str) -> list[str]:
    """The keys that begin with what has been typed, for the completion of a shell."""
    return [name for one in kept_fields() if (name := kept_name(one)).startswith(incomplete)]


def _kept_keys(incomplete: str) -> list[str]:
    """The keys and presets in the file that begin with what has been typed."""
    try:
        config = read_config()
    except InputError:
        return []
    names = {one.name: kept_name(one) for one in kept_fields()}
    found = [names[name] for name in config.values]
    for preset, values in config.presets.items():
        found += [f"@{preset}", *(f"@{preset}.{names.get(name, name)}" for name in values)]
    return [key for key in found if key.startswith(incomplete)]


@config_app.callback()
def config_command(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Show the options that have their default, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List all options that can be kept.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print an example of the file.")] = False,
) -> None:
    """Show the options that are kept, and where each comes from; its commands change them.

    The file is config.toml in $GGUFMOE_HOME or in the user's folder for configurations. Its keys are the names of
    flags, without dashes; `ggufmoe chat @NAME` takes the model and the options of [preset.NAME]. A flag counts before
    an environment variable, that before a preset, and that before the rest of the file.
    """
    if context.invoked_subcommand is not None:
        return
    if example:
        print(_EXAMPLE, end="")
        return
    if keys:
        for one in sorted(kept_fields(), key=kept_name):
            note(f"{kept_name(one):24}  {variable(one)}: {one.metadata['help']}", indent=26)
        return
    config = read_config()
    found = [one for one in _in_effect(config) if everything or one.origin != "default"]
    if as_json:
        _print_json(config, found)
        return
    is_there = config.path is not None and config.path.exists()
    note(f"{config.path}" if is_there else f"{config.path} does not exist; `ggufmoe config set temp 0.7` makes it")
    if found or config.presets:
        _show(config, found)


@config_app.command(
    "set",
    cls=PlainCommand,
    epilog='ggufmoe config set temp 0.7\nggufmoe config set stop "###" END',
    context_settings={"ignore_unknown_options": True},  # which -1 would be
)
def set_command(
    key: Annotated[
        str,
        typer.Argument(
            help="Name of a flag without its dashes; @NAME.KEY is that of a preset.",
            metavar="KEY",
            autocompletion=_keys,
        ),
    ],
    values: Annotated[
        list[str], typer.Argument(help="Its value; several where the flag may be repeated.", metavar="VALUE...")
    ],
) -> None:
    """Keep the value of an option; comments and the order of the file stay."""
    path, value = keep(key, values)
    note(f"{path}: {key} = {toml_literal(value)}")
    preset, name = split_key(key)
    if preset is None and name is not None:
        _tell_variable(name)


@config_app.command("unset", cls=PlainCommand, epilog="ggufmoe config unset temp\nggufmoe config unset @writer")
def unset_command(
    keys: Annotated[
        list[str],
        typer.Argument(
            help="Names of flags; @NAME.KEY is that of a preset, @NAME a whole preset.",
            metavar="KEY...",
            autocompletion=_kept_keys,
        ),
    ],
) -> None:
    """Take options out of the file, or whole presets."""
    for key in keys:
        note(f"{forget(key)}: {key} is no longer there")


class _TypedCommand(PlainCommand):
    """A command that knows what was typed for its options, before it became values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["typed"] = self.make_parser(ctx).parse_args(args=list(args))[0]
        return super().parse_args(ctx, args)


@config_app.command(
    "preset",
    cls=_TypedCommand,
    epilog='ggufmoe config preset writer org/name -sys "You write stories." --temp 1\nggufmoe chat @writer',
)
@with_options(*KEPT_GROUPS)
def preset_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the preset; `ggufmoe chat @NAME` uses it.", metavar="NAME")],
    model: Annotated[
        str | None, typer.Argument(help="Its model, if it has none yet.", metavar="MODEL", autocompletion=model_names)
    ] = None,
    *,
    wanted: ModelOptions,
    asking: PromptOptions,
    variables: TemplateOptions,
    stop: StopOptions,
    sampling: SamplingOptions,
    window: ContextOptions,
    offload: OffloadOptions,
    server: ServerOptions,
) -> None:
    """Keep a model, and options for it, under a name.

    Options of a preset that is there already are added to it or changed. `ggufmoe config unset @NAME` deletes it.
    """
    del asking, variables, stop, sampling, window, offload, server  # their classes have checked them together
    preset = split_key(f"@{name.removeprefix('@')}.{MODEL}")[0] or ""
    typed: dict[str, Any] = context.meta["typed"]
    if wanted.yes:
        raise USAGE_ERROR("--yes is not kept: a large model is asked for each time")
    given = [(one, typed[one.name]) for one in kept_fields() if one.name in typed]
    values: list[tuple[str | None, str, Value]] = [
        (preset, kept_name(one), checked_value(one, _texts(value))) for one, value in given
    ]
    if model is not None:
        values.insert(0, (preset, MODEL, checked_model([model])))
    elif MODEL not in read_config().presets.get(preset, {}):
        raise USAGE_ERROR(f"@{preset} is new: name its model, for example ggufmoe config preset {preset} org/name")
    if not values:
        raise USAGE_ERROR(f"@{preset} is there; name what to change, for example --temp 1")
    path = change(values)
    note(f"{path}: @{preset} has " + ", ".join(f"{key} = {toml_literal(value)}" for _, key, value in values))


@config_app.command("path", cls=PlainCommand, epilog="ggufmoe config path")
def path_command() -> None:
    """Print where the file is, or would be."""
    print(config_path())


@config_app.command("edit", cls=PlainCommand, epilog="ggufmoe config edit")
def edit_command() -> None:
    """Open the file in the editor that $VISUAL or $EDITOR names, and check it afterwards."""
    path = config_path()
    if not path.exists():
        write_config(path, "".join(f"# {line}\n" if line else "\n" for line in _EXAMPLE.splitlines()).encode())
    named = (os.environ.get(name, "").strip() for name in ("VISUAL", "EDITOR"))
    editor = next(filter(None, named), "notepad" if sys.platform == "win32" else "vi")
    try:
        code = subprocess.run(_editor_command(editor, path, is_windows=sys.platform == "win32")).returncode
    except (OSError, ValueError) as error:
        raise InputError(f"{editor} cannot be started: {error}; name an editor in EDITOR") from error
    if code:
        raise InputError(f"{editor} ended with code {code}")
    for _ in _in_effect(read_config()):
        pass  # a value that its option refuses ends it


def _editor_command(editor: str, path: Path, *, is_windows: bool) -> str | list[str]:
    """What starts an editor: on Windows one line, as a path with spaces stands there in quotation marks."""
    return f'{editor} "{path}"' if is_windows else [*shlex.split(editor), str(path)]


@dataclass(frozen=True)
class _Effective:
    """What an option is where no flag is given, and where that comes from: environment, file or default."""

    name: str
    value: Kept
    origin: str
    variable: str


def _in_effect(config: Config) -> Iterator[_Effective]:
    """All options that can be kept. Raises InputError for a value that its option refuses."""
    for one in kept_fields():
        name = variable(one)
        if given := os.environ.get(name):
            yield _Effective(kept_name(one), _checked(one, given, name), "environment", name)
        elif one.name in config.values:
            yield _Effective(kept_name(one), _checked(one, config.values[one.name], str(config.path)), "file", name)
        else:
            yield _Effective(kept_name(one), default_shown(one), "default", name)
    fields = {one.name: one for one in kept_fields()}
    for preset, values in config.presets.items():
        for key, value in values.items():
            if key != MODEL:
                _checked(fields[key], value, f"{config.path}, [{PRESETS}.{preset}]")


def _checked(one: Field[Any], value: Kept, where: str) -> Kept:
    try:
        checked_value(one, _texts(value))
    except OptionError as error:
        raise InputError(f"{where}: {error}") from error
    return value


def _texts(value: Kept) -> list[str]:
    """A value as it would be typed."""
    if isinstance(value, bool):
        return [str(value).lower()]
    return [value] if isinstance(value, str) else list(value)


def _shown(value: Kept) -> str:
    return ", ".join(_texts(value))


def _print_json(config: Config, found: list[_Effective]) -> None:
    names = {one.name: kept_name(one) for one in kept_fields()}
    presets = {
        preset: {names.get(key, key): value for key, value in values.items()}
        for preset, values in config.presets.items()
    }
    options = [asdict(one) for one in found]
    print(json.dumps({"path": str(config.path), "options": options, "presets": presets}, ensure_ascii=False))


def _show(config: Config, found: list[_Effective]) -> None:
    from rich import box
    from rich.table import Table

    names = {one.name: kept_name(one) for one in kept_fields()}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    for heading in ("option", "value", "from"):
        table.add_column(heading, overflow="fold")
    for one in found:
        origin = one.variable if one.origin == "environment" else one.origin
        table.add_row(one.name, printable(_shown(one.value), 500), origin)
    for preset, values in config.presets.items():
        for key, value in values.items():
            table.add_row(f"@{preset}.{names.get(key, key)}", printable(_shown(value), 500), "file")
    make_console().print(table)


def _tell_variable(name: str) -> None:
    """Say that an environment variable counts before what was written."""
    called = variable(kept_option(name))
    if os.environ.get(called):
        note(f"{called} in the environment counts before it")
