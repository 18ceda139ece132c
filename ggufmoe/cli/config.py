"""``ggufmoe config``: options that are kept, and where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated

import typer

from ggufmoe.cli.console import note, printable
from ggufmoe.cli.kept_options import Config, Kept, kept_fields, kept_name, read_config, variable

_EXAMPLE = """\
temp = 0.7
ctx-size = 8192

[preset.writer]
model = "org/name"
system-prompt = "You write short stories."
temp = 1.0
"""


def config_command(
    keys: Annotated[bool, typer.Option("--keys", help="List all options that can be kept.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print an example of the file.")] = False,
) -> None:
    """Show which options are kept: in the configuration file, in its presets, and in environment variables.

    The file is config.toml in $GGUFMOE_HOME or in the user's folder for configurations. Its keys are the names of
    flags, without dashes; `ggufmoe chat @NAME` takes the model and the options of [preset.NAME]. A flag counts before
    an environment variable, that before a preset, and that before the rest of the file.
    """
    if example:
        print(_EXAMPLE, end="")
        return
    if keys:
        for one in sorted(kept_fields(), key=kept_name):
            note(f"{kept_name(one):24}  {variable(one)}: {one.metadata['help']}", indent=26)
        return
    config = read_config()
    is_there = config.path is not None and config.path.exists()
    note(f"{config.path}" if is_there else f"{config.path} does not exist; `ggufmoe config --example` shows one")
    for line in _lines(config):
        print(printable(line, 1000))


def _lines(config: Config) -> Iterator[str]:
    names = {one.name: kept_name(one) for one in kept_fields()}
    for one in kept_fields():
        if given := os.environ.get(variable(one)):
            yield f"{kept_name(one)} = {_shown(given)}  (environment, {variable(one)})"
        elif one.name in config.values:
            yield f"{kept_name(one)} = {_shown(config.values[one.name])}"
    for name, preset in config.presets.items():
        yield f"@{name}: " + ", ".join(f"{names.get(key, key)} = {_shown(value)}" for key, value in preset.items())


def _shown(value: Kept) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else ", ".join(value)
