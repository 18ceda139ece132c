"""PyInstaller's hook for the command line, whose verbs are loaded when they are called, and for the page of `serve`."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

hiddenimports = [*collect_submodules("ggufmoe.cli"), *collect_submodules("ggufmoe.server")]
datas = collect_data_files("ggufmoe.server")
