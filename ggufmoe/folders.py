"""The folders in which this system wants programs to keep what they can make again."""

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


def cache_directory() -> Path | None:
    """Where ggufmoe keeps its caches: ``$GGUFMOE_CACHE``, or a folder of the user's; None for a user without a home."""
    if given := os.environ.get("GGUFMOE_CACHE"):
        return Path(given).absolute()
    try:
        return user_cache_directory() / "ggufmoe"
    except RuntimeError:
        return None
