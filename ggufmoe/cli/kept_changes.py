"""Changes what is kept in the configuration file: one option, one option of a preset, or a whole preset.

Values are checked as the flags are. ``toml_edit`` changes the text, ``kept_options`` reads the file.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from ggufmoe.cli.kept_options import KEPT_GROUPS, PRESETS, config_content, config_text, kept_name, kept_option
from ggufmoe.cli.params import is_repeated, typed_value
from ggufmoe.cli.toml_edit import LayoutError, Value, with_value, without_value
from ggufmoe.errors import InputError, OptionError, OutputError
from ggufmoe.files import possible_path, replacing
from ggufmoe.folders import config_file
from ggufmoe.writing.lock import output_lock

MODEL = "model"
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
"""As typer reads the environment."""
_PRESET_NAME = re.compile(r"[\w-]+")
_LOCK_PAUSE_S = 0.02
"""Between two looks whether another process has finished its change, which takes milliseconds."""


def keep(key: str, typed: Sequence[str]) -> tuple[Path, Value]:
    """Give an option (``temp``), or one of a preset (``@writer.temp``), the value that was typed; several for a list.

    Returns the file and the value. Raises OptionError for an unknown key and a value that the option refuses,
    InputError for a file that cannot be changed, OutputError for one that cannot be written.
    """
    preset, name = split_key(key)
    if name is None:
        raise OptionError(f"{key} is a preset; name an option of it, for example {key}.temp")
    value = checked_model(typed) if preset and name == MODEL else checked_value(kept_option(name), typed)
    return change([(preset, name, value)]), value


def change(values: Sequence[tuple[str | None, str, Value]]) -> Path:
    """Write values, each of a preset or of none, into the file; its path. The same errors as ``keep``."""

    def edited(text: str, content: Mapping[str, Any]) -> str:
        for preset, name, value in values:
            table: tuple[str, ...] = () if preset is None else (PRESETS, preset)
            there = _spellings(content, table, name)
            for spelling in there[1:]:
                text = without_value(text, (*table, spelling))
            called = there[0] if there else name if preset and name == MODEL else kept_name(kept_option(name))
            text = with_value(text, (*table, called), value)
        return text

    return _rewrite(edited)


def forget(key: str) -> Path:
    """Take an option, one of a preset, or a preset (``@writer``) out of the file; its path.

    A key of the file that is no option can be named as well. Raises InputError if it is not there.
    """
    preset, name = split_key(key)
    table: tuple[str, ...] = () if preset is None else (PRESETS, preset)

    def edited(text: str, content: Mapping[str, Any]) -> str:
        if name is None and _at(content, table) is not None:
            return without_value(text, table)
        there = [] if name is None else _spellings(content, table, name)
        if not there:
            raise InputError(f"{key} is not in {config_path()}; `ggufmoe config` shows what is")
        for spelling in there:
            text = without_value(text, (*table, spelling))
        return text

    return _rewrite(edited)


def split_key(key: str) -> tuple[str | None, str | None]:
    """``@writer.temp`` as preset and option; either may be absent. Raises OptionError for what is no key."""
    if not key.startswith("@"):
        return None, key
    preset, _, name = key[1:].partition(".")
    if not _PRESET_NAME.fullmatch(preset):
        raise OptionError(f"{key}: a preset's name has letters, digits, - and _, as in @writer")
    return preset, name or None


def checked_value(one: Field[Any], typed: Sequence[str]) -> Value:
    """The value of an option as the file has it. Raises OptionError if it is none."""
    group: Any = next(group for group in KEPT_GROUPS if any(own is one for own in fields(group)))
    hint, name = get_type_hints(group)[one.name], kept_name(one)
    if is_repeated(hint):
        group(**{one.name: tuple(typed)})
        return list(typed)
    if len(typed) != 1:
        raise OptionError(f"{name} takes one value; one of several words stands in quotation marks")
    (text,) = typed
    if hint is bool:
        if text.lower() not in _SWITCH:
            raise OptionError(f"{name} must be true or false, not {text}")
        return _SWITCH[text.lower()]
    try:
        value = typed_value(hint, one, text)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error
    held = getattr(group(**{one.name: value}), one.name)
    if isinstance(held, Path):
        return os.path.abspath(held)  # what was typed is meant from the folder of today
    is_number = isinstance(value, (int, float)) and (one.metadata["parse"] is None or text.isdecimal())
    return value if is_number else text


def checked_model(typed: Sequence[str]) -> str:
    """The model of a preset; a path as it is from the root. Raises OptionError for several words."""
    if len(typed) != 1 or not typed[0].strip() or typed[0].startswith("@"):
        raise OptionError(f"{MODEL} takes one MODEL: a file, a stored model, a directory, a recipe or org/name")
    path = possible_path(typed[0])
    return os.path.abspath(path) if path.exists() else typed[0]


def _at(content: Mapping[str, Any], table: tuple[str, ...]) -> Any:
    found: Any = content
    for name in table:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _spellings(content: Mapping[str, Any], table: tuple[str, ...], name: str) -> list[str]:
    """The keys of a table that mean the option of that name: ``t``, ``temp`` and ``temperature`` are one."""
    there = _at(content, table)
    keys = [key for key in there if not isinstance(there[key], dict)] if isinstance(there, Mapping) else []
    return [key for key in keys if _meant(key) == _meant(name)]


def _meant(key: str) -> str:
    try:
        return kept_option(key).name
    except OptionError:
        return key


def _rewrite(edit: Callable[[str, Mapping[str, Any]], str]) -> Path:
    path = config_path()
    _make_folder(path)
    with output_lock(path, wait=lambda _: time.sleep(_LOCK_PAUSE_S)):
        text = config_text(path)
        content = config_content(path, text)
        try:
            edited = edit(text, content)
            data = edited.encode()
        except UnicodeEncodeError as error:
            raise InputError("what was typed holds a character that no text file may have") from error
        except LayoutError as error:
            raise InputError(f"{path} has it in a layout that no command changes; edit it by hand") from error
        if edited != text:
            write_config(path, data)
    return path


def config_path() -> Path:
    """Where the configuration is, or would be. Raises InputError for a user without a home."""
    path = config_file()
    if path is None:
        raise InputError("this user has no home directory for a configuration; name a folder in GGUFMOE_HOME")
    return path


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: the configuration cannot be written: {error.strerror or error}") from error


def write_config(path: Path, data: bytes) -> None:
    """Replace the configuration, whole or not at all; who may read it stays. Raises OutputError."""
    mode = 0o600  # it may hold the key of a server
    _make_folder(path)
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
    with replacing(path, "the configuration") as file:
        if sys.platform != "win32":
            os.fchmod(file.fileno(), mode)
        file.write(data)
