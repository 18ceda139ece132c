"""What freezing an app needs to know of ggufmoe: hooks for PyInstaller, which finds them through an entry point.

The hook files run inside PyInstaller alone; nothing here is imported by the rest of the package.
"""

from __future__ import annotations

from pathlib import Path


def hook_directories() -> list[str]:
    """The directories of our PyInstaller hooks (entry point ``hook-dirs`` of the group ``pyinstaller40``)."""
    return [str(Path(__file__).parent)]
