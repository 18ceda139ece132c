"""The rooms of the package: who may import whom, which libraries where, and what importing the package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ggufmoe

PACKAGE = Path(ggufmoe.__file__).parent

GROUND = {"errors", "options", "sizes"}
FLOOR = GROUND | {"native", "ggufheader", "manifest", "positional"}
CONVERT_HALF = FLOOR | {"checkpoint", "merge", "quant", "export"}
RUN_HALF = FLOOR | {"runtime", "server"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "options": {"errors"},
    "sizes": set(),
    "ggufheader": FLOOR,
    "native": FLOOR,
    "manifest": FLOOR,
    "positional": FLOOR,
    "checkpoint": FLOOR,
    "quant": FLOOR,
    "merge": FLOOR | {"checkpoint"},
    "export": FLOOR | {"checkpoint", "quant"},
    "convert": CONVERT_HALF,
    "quantize": CONVERT_HALF | {"convert"},
    "runtime": FLOOR,
    "server": FLOOR | {"runtime"},
    "doctor": FLOOR | {"quant", "runtime"},
    "demo": set(),
    "imatrix": FLOOR | {"quant", "runtime"},
    "cli": CONVERT_HALF | RUN_HALF | {"convert", "quantize", "doctor", "imatrix", "demo"},
    "packaging": set(),
    "__main__": {"cli"},
    "__init__": {"errors", "options", "convert", "quantize", "imatrix", "runtime"},
}
"""Room to the rooms that it may import besides itself; the package itself gives only its version."""

LLAMA_CPP = {"native.py", "runtime/engine.py", "runtime/llamacpp.py"}
NOWHERE = {"torch", "transformers", "mergekit"}
HEAVY = {"numpy", "numba", "llvmlite", "llama_cpp", "gguf", "safetensors"}


@dataclass(frozen=True)
class Import:
    """One import statement: where it stands, and the modules that it may load."""

    file: str
    line: int
    modules: tuple[str, ...]
    in_function: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {', '.join(self.modules)}"


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    file = path.relative_to(PACKAGE).as_posix()
    functions = nodes_inside(tree, lambda node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    types = nodes_inside(tree, is_type_checking)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            modules = tuple(full_names(node))
        else:
            continue
        yield Import(file, node.lineno, modules, node in functions, node in types)


def full_names(node: ast.ImportFrom) -> Iterator[str]:
    """``from ggufmoe import native`` is an import of ``ggufmoe.native``."""
    for alias in node.names:
        submodule = PACKAGE.parent / f"{node.module}".replace(".", "/") / alias.name
        is_module = submodule.is_dir() or submodule.with_suffix(".py").is_file()
        yield f"{node.module}.{alias.name}" if is_module else f"{node.module}"


def nodes_inside(tree: ast.AST, is_holder: object) -> set[ast.AST]:
    assert callable(is_holder)
    return {inner for node in ast.walk(tree) if is_holder(node) for inner in ast.walk(node)}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room_of(module: str) -> str:
    """The room of a module of the package; ``ggufmoe`` alone is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def all_imports() -> list[Import]:
    return [found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_of(path)]


def home(found: Import) -> str:
    return found.file.split("/")[0].removesuffix(".py")


def test_arrows_point_one_way() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        for module in found.modules
        if module.split(".")[0] == "ggufmoe"
        and module != "ggufmoe"
        and room_of(module) not in ALLOWED[home(found)] | {home(found)}
    ]
    assert wrong == []


def test_every_room_is_in_the_table() -> None:
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(ALLOWED)


def test_the_package_itself_gives_only_its_version() -> None:
    attributes = {
        (path.relative_to(PACKAGE).as_posix(), node.attr)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ggufmoe"
    }
    assert {attribute for _, attribute in attributes} <= {"__version__"}, attributes


def test_llama_cpp_is_imported_in_three_files_inside_functions() -> None:
    found = [one for one in all_imports() if any(module.split(".")[0] == "llama_cpp" for module in one.modules)]
    assert found
    assert [str(one) for one in found if one.file not in LLAMA_CPP] == []
    assert [str(one) for one in found if not one.in_function and not one.for_types] == []


def test_torch_and_transformers_are_nowhere() -> None:
    assert [str(one) for one in all_imports() if {module.split(".")[0] for module in one.modules} & NOWHERE] == []


def test_there_is_no_lumber_room() -> None:
    assert {path.stem for path in PACKAGE.rglob("*.py")} & {"utils", "common", "helpers", "util", "misc"} == set()


def test_every_module_says_what_it_owns() -> None:
    silent = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


@pytest.mark.parametrize(
    "code", ["import ggufmoe", "import ggufmoe; ggufmoe.CheckpointError, ggufmoe.ConvertOptions, dir(ggufmoe)"]
)
def test_importing_the_package_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) & (HEAVY | {"yaml", "typer", "jinja2", "huggingface_hub"}) == set()


def test_help_loads_nothing_heavy() -> None:
    code = "from ggufmoe.cli.app import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert loaded_by(code) & HEAVY == set()


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running this code."""
    report = f"{code}\nimport sys\nprint('LOADED', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    line = done.stdout.rsplit("LOADED", 1)[1]
    assert "ggufmoe" in line
    return set(line.split())
