"""PyInstaller's hook for ggufmoe: what is loaded lazily or natively, and so is not seen by reading imports.

The command line and the server are left out: an app that runs them imports ``ggufmoe.cli.app``, which has a hook of its
own.
"""

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, collect_submodules, copy_metadata


def _is_for_apps(module: str) -> bool:
    return module.split(".")[1:2] not in (["cli"], ["server"], ["packaging"], ["__main__"])


hiddenimports = [*collect_submodules("ggufmoe", filter=_is_for_apps), "gguf.constants", "llama_cpp"]
datas = collect_data_files("ggufmoe", excludes=["packaging/*", "server/*"])
binaries = collect_dynamic_libs("llvmlite")
if find_spec("llama_cpp") is not None:  # an app that only converts needs no engine
    datas += copy_metadata("llama-cpp-python")
    binaries += collect_dynamic_libs("llama_cpp")
