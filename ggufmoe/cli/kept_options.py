"""Options that are kept: in the configuration file, in presets of it, and in environment variables.

An option counts as given on the command line, else in the environment, else in the preset (``ggufmoe chat @writer``),
else in the file. Names are those of the flags; ``params`` says which options can be kept, by giving them a variable.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ggufmoe.errors import InputError, OptionError, one_line
from ggufmoe.folders import config_file
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
from ggufmoe.options.fields import option_named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEPT_GROUPS = (
    ModelOptions,
    PromptOptions,
    TemplateOptions,
    StopOptions,
    SamplingOptions,
    ContextOptions,
    OffloadOptions,
    ServerOptions,
)
_NEVER = ("yes",)
PRESETS = "preset"
"""The table of presets in the file."""
_MAX_BYTES = 1 << 20
_OF_CHATS = frozenset(one.name for group in (PromptOptions, TemplateOptions) for one in fields(group))
"""What is of no use to ``run --raw``, which takes no such flag either."""

Kept = str | bool | Sequence[str]
"""A value as it would be typed; a sequence for a flag that may be repeated."""


@dataclass(frozen=True)
class Config:
    """The configuration file: values of options by the names of their fields, and presets of such values."""

    path: Path | None
    values: Mapping[str, Kept] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Kept]] = field(default_factory=dict)
    """By name; ``model`` is among their values."""

    def preset(self, name: str) -> Mapping[str, Kept]:
        """The values of a preset. Raises InputError, which lists the presets, if there is none of that name."""
        if name not in self.presets:
            there = f"`ggufmoe config preset {name} MODEL` makes one"
            if self.presets:
                there = f"there is {', '.join('@' + one for one in self.presets)}"
            raise InputError(f"@{name}: there is no [{PRESETS}.{name}] in {self.path}; {there}")
        return self.presets[name]


def kept_fields() -> Iterator[Field[Any]]:
    """The options that can be kept."""
    for group in KEPT_GROUPS:
        yield from (one for one in fields(group) if one.metadata["flags"] and one.name not in _NEVER)


def kept_name(one: Field[Any]) -> str:
    """What a kept option is called in the file: its longest flag that is not a negation, without dashes."""
    flags: list[str] = [flag.split("/")[0].strip() for flag in one.metadata["flags"]]
    return max(flags, key=len).lstrip("-")


def variable(one: Field[Any]) -> str:
    """The environment variable of a kept option, for example GGUFMOE_CTX_SIZE."""
    return f"GGUFMOE_{kept_name(one).upper().replace('-', '_')}"


def kept_option(name: str) -> Field[Any]:
    """The option that can be kept under a name of one of its flags. Raises OptionError that names a similar one."""
    return option_named(KEPT_GROUPS, name, without=_NEVER)


def config_text(path: Path) -> str:
    """The text of a configuration file; empty where there is none. Raises InputError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, which no configuration is")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not TOML: it is not UTF-8") from error


def config_content(path: Path, text: str) -> dict[str, Any]:
    """What the text of a configuration file says, unchecked. Raises InputError for what is not TOML."""
    try:
        content: dict[str, Any] = tomllib.loads(text)
        return content
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {one_line(error)}") from error


def read_config() -> Config:
    """The user's configuration; empty where there is no file. Raises InputError, which names file and key."""
    path = config_file()
    if path is None:
        return Config(path)
    content = config_content(path, config_text(path))
    presets = content.pop(PRESETS, {})
    if not isinstance(presets, dict) or not all(isinstance(one, dict) for one in presets.values()):
        raise InputError(f"{path}: {PRESETS} must hold tables, as in [{PRESETS}.writer]")
    return Config(
        path,
        _values(path, content),
        {name: _values(f"{path}, [{PRESETS}.{name}]", one, of_preset=True) for name, one in presets.items()},
    )


def _values(where: Path | str, content: Mapping[str, Any], *, of_preset: bool = False) -> dict[str, Kept]:
    values = {}
    for key, value in content.items():
        if of_preset and key == "model":
            name = "model"
        else:
            try:
                name = kept_option(key).name
            except OptionError as error:
                raise InputError(f"{where}: {error}") from error
        values[name] = _kept(where, key, value)
    return values


def _kept(where: Path | str, key: str, value: Any) -> Kept:
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, (str, int, float)) for one in value):
        return [str(one) for one in value]
    raise InputError(f"{where}: {key} must be a text, a number, true, false, or a list of texts")


def apply_kept(context: Any) -> None:
    """Fill the parameters of a command that was parsed with what is kept, where the command line is silent.

    ``context`` is the command's. Raises InputError for a file, a preset or a value that cannot be used.
    """
    parameters = {one.name: one for one in context.command.params if getattr(one, "envvar", None)}
    model = context.params.get("model")
    is_preset = isinstance(model, str) and model.startswith("@")
    if not parameters and not is_preset:
        return
    config = read_config()
    values: dict[str, tuple[str, Kept]] = {name: (str(config.path), value) for name, value in config.values.items()}
    if is_preset:
        table = f"[{PRESETS}.{str(model)[1:]}]"
        preset = config.preset(str(model)[1:])
        if not isinstance(preset.get("model"), str):
            raise InputError(f"{config.path}: {table} has no model; add for example model = 'org/name'")
        context.params["model"] = preset["model"]
        values |= {name: (f"{config.path}, {table}", value) for name, value in preset.items()}
    for name, parameter in parameters.items():
        source = context.get_parameter_source(name).name
        if context.params.get("raw") and name in _OF_CHATS:
            if source == "ENVIRONMENT":
                context.params[name] = parameter.get_default(context)
        elif source == "DEFAULT" and name in values:
            context.params[name] = _converted(context, parameter, *values[name])


def _converted(context: Any, parameter: Any, where: str, value: Kept) -> Any:
    if parameter.multiple and isinstance(value, str):
        value = [value]
    try:
        return parameter.process_value(context, value)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        raise InputError(f"{where}: {one_line(message(), None)}") from error
