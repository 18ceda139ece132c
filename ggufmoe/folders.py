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
    try:
        if sys.platform == "win32":
            base = user_cache_directory()
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Application Support"
        else:
            base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:
        return None
    return base / "ggufmoe"


def data_directory() -> Path | None:
    """Where ggufmoe keeps what the user wants to keep, above all models: ``$GGUFMOE_HOME``, or the user's data folder.

    None for a user without a home.
    """
    if given := os.environ.get("GGUFMOE_HOME"):
        return Path(given).absolute()
    try:
        if sys.platform == "win32":
            base = user_cache_directory()
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Application Support"
        else:
            share = os.environ.get("XDG_DATA_HOME", "")
            base = Path(share) if os.path.isabs(share) else Path.home() / ".local" / "share"
    except RuntimeError:
        return None
    return base / "ggufmoe"


def config_file() -> Path | None:
    """The user's configuration, ``config.toml`` in ``$GGUFMOE_HOME`` or in the folder that this system has for such.

    None for a user without a home.
    """
    if given := os.environ.get("GGUFMOE_HOME"):
        return Path(given).absolute() / "config.toml"
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Application Support"
        else:
            given = os.environ.get("XDG_CONFIG_HOME", "")
            base = Path(given) if os.path.isabs(given) else Path.home() / ".config"
    except RuntimeError:
        return None
    return base / "ggufmoe" / "config.toml"


def cache_directory() -> Path | None:
    """Where ggufmoe keeps its caches: ``$GGUFMOE_CACHE``, or a folder of the user's; None for a user without a home."""
    if given := os.environ.get("GGUFMOE_CACHE"):
        return Path(given).absolute()
    try:
        return user_cache_directory() / "ggufmoe"
    except RuntimeError:
        return None
