"""PyInstaller's hook for the command line, whose verbs are loaded when they are called."""

from PyInstaller.utils.hooks import collect_submodules

hiddenimports = [*collect_submodules("ggufmoe.cli"), *collect_submodules("ggufmoe.server")]
