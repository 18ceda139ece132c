"""The folders in which this system wants programs to keep what they can make again, and what they remember."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_directory() -> Path:
    """The user's folder for caches, as this system has it. Raises RuntimeError for a user without a home."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def state_directory() -> Path | None:
    """The user's folder for state that programs keep, for example the history of typed lines.

    None for a user without a home, as in containers.
    """
    return _user_directory("XDG_STATE_HOME", ".local/state", "LOCALAPPDATA")


def data_directory() -> Path | None:
    """Where ggufmoe keeps what the user wants to keep, above all models: ``$GGUFMOE_HOME``, or the user's data folder.

    None for a user without a home.
    """
    return _home_given() or _user_directory("XDG_DATA_HOME", ".local/share", "LOCALAPPDATA")


def config_file() -> Path | None:
    """The user's configuration, ``config.toml`` in ``$GGUFMOE_HOME`` or in the folder that this system has for such.

    None for a user without a home.
    """
    folder = _home_given() or _user_directory("XDG_CONFIG_HOME", ".config", "APPDATA")
    return None if folder is None else folder / "config.toml"


def _home_given() -> Path | None:
    given = os.environ.get("GGUFMOE_HOME")
    return Path(given).absolute() if given else None


def _user_directory(variable: str, below_home: str, on_windows: str) -> Path | None:
    """ggufmoe's folder in one of the user's: on Linux the one that ``variable`` names, on Windows ``on_windows``."""
    try:
        if sys.platform == "win32":
            default = Path("AppData", "Roaming" if on_windows == "APPDATA" else "Local")
            base = Path(os.environ.get(on_windows) or Path.home() / default)
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Application Support"
        else:
            given = os.environ.get(variable, "")
            base = Path(given) if os.path.isabs(given) else Path.home() / below_home
    except RuntimeError:
        return None
    return base / "ggufmoe"


def cache_directory() -> Path | None:
    """Where ggufmoe keeps its caches: ``$GGUFMOE_CACHE``, or a folder of the user's; None for a user without a home."""
    if given := os.environ.get("GGUFMOE_CACHE"):
        return Path(given).absolute()
    try:
        return user_cache_directory() / "ggufmoe"
    except RuntimeError:
        return None
