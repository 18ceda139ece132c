"""The rooms of the package: who may import whom, no circles, which libraries where, what importing the package loads.

``docs/ARCHITECTURE.md`` shows the same table to people; a test below compares the two.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import ggufmoe

PACKAGE = Path(ggufmoe.__file__).parent
MAP = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")

# Each room may import itself, and the rooms of its line.
_GROUND = frozenset({"version", "errors", "sizes", "files", "folders"})
_BASE = _GROUND | {"work", "options", "gguf", "native"}
_MODELS = _BASE | {"weights", "hub", "families", "checkpoint", "quant", "writing"}
_CONVERT = _MODELS | {"merge", "export"}
_RUN = _BASE | {"placement", "runtime", "remote", "engine"}
ALLOWED: Mapping[str, frozenset[str]] = {
    "version": frozenset(),
    "errors": frozenset(),
    "sizes": frozenset(),
    "files": frozenset({"errors"}),
    "folders": frozenset(),
    "work": _GROUND,
    "options": _GROUND | {"work"},
    "gguf": _GROUND | {"work", "options"},
    "native": _GROUND | {"work", "gguf"},
    "weights": _BASE,
    "hub": _BASE | {"weights"},
    "families": _BASE | {"weights"},
    "checkpoint": _BASE | {"weights", "hub", "families"},
    "templates": _BASE,
    "quant": _BASE,
    "writing": _BASE | {"weights", "quant"},
    "merge": _MODELS | {"templates"},
    "export": _MODELS,
    "sizing": _CONVERT | {"templates"},
    "convert": _CONVERT | {"sizing"},
    "quantize": _CONVERT | {"convert"},
    "refit": _CONVERT | {"convert", "templates", "runtime"},
    "sensitivity": _CONVERT | {"templates", "runtime", "evaluation", "sizing"},
    "placement": _BASE,
    "store": _CONVERT | {"convert", "placement"},
    "best": _CONVERT | _RUN | {"sizing", "convert", "quantize", "store", "evaluation"},
    "runtime": _BASE | {"templates", "placement"},
    "remote": _BASE | {"placement", "runtime"},
    "engine": _BASE | {"placement", "runtime", "remote"},
    "routing": _RUN,
    "server": _RUN | {"routing"},
    "inspection": _BASE | {"placement"},
    "evaluation": _RUN | {"inspection", "quant", "templates"},
    "demo": frozenset(),
    "doctor": _RUN | {"evaluation", "quant"},
    "cli": _CONVERT
    | _RUN
    | {
        "templates",
        "sizing",
        "best",
        "convert",
        "quantize",
        "refit",
        "sensitivity",
        "store",
        "routing",
        "server",
        "inspection",
    }
    | {"evaluation", "demo", "doctor"},
    "packaging": frozenset(),
    "__main__": frozenset({"cli"}),
    "__init__": _BASE
    | {
        "quant",
        "best",
        "convert",
        "quantize",
        "refit",
        "sensitivity",
        "store",
        "runtime",
        "engine",
        "routing",
        "evaluation",
    },
}

LLAMA_CPP_ROOMS = {"native", "runtime"}
NOWHERE = {"torch", "transformers", "mergekit"}
HEAVY = {"numpy", "numba", "llvmlite", "llama_cpp", "gguf", "safetensors"}


@dataclass(frozen=True)
class Import:
    """One import statement: the module it stands in, and the modules that it may load."""

    importer: str
    line: int
    modules: tuple[str, ...]
    in_function: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {', '.join(self.modules)}"


def all_modules(package: Path) -> dict[str, Path]:
    """Dotted name and file of every module below ``package``; a package stands for its ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package.parent).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = _inside(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            loaded = tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            # `from ggufmoe.native import library` loads ggufmoe.native.library
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            loaded = tuple(full if full in modules else f"{node.module}" for full in names)
        else:
            continue
        yield Import(name, node.lineno, loaded, node in functions, node in types)


def _inside(tree: ast.AST, kinds: tuple[type[ast.AST], ...]) -> set[ast.AST]:
    return {inner for node in ast.walk(tree) if isinstance(node, kinds) for inner in ast.walk(node)}


@functools.cache
def all_imports(package: Path) -> list[Import]:
    modules = all_modules(package)
    return [found for name, path in modules.items() for found in imports_of(name, path, modules)]


def room_of(module: str) -> str:
    """The room of a module of the package; ``ggufmoe`` alone is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def wrong_arrows(imports: list[Import]) -> list[str]:
    """The imports between rooms that ALLOWED does not name."""
    return [
        str(found)
        for found in imports
        for module in found.modules
        if module.split(".")[0] == PACKAGE.name
        and room_of(module) not in ALLOWED.get(room_of(found.importer), frozenset()) | {room_of(found.importer)}
    ]


def circles(imports: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, function-level and TYPE_CHECKING imports included (Tarjan 1972)."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        targets = {module for module in found.modules if module.split(".")[0] == PACKAGE.name}
        graph.setdefault(found.importer, set()).update(targets - {found.importer})
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in sorted(graph.get(module, ())):
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return groups


def test_arrows_point_one_way() -> None:
    assert wrong_arrows(all_imports(PACKAGE)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(all_imports(PACKAGE)) == []


def test_the_two_tests_above_can_fail(tmp_path: Path) -> None:
    house = tmp_path / PACKAGE.name
    for room in ("gguf", "runtime"):
        (house / room).mkdir(parents=True)
        (house / room / "__init__.py").touch()
    (house / "gguf" / "header.py").write_text("def read() -> None:\n    from ggufmoe.runtime import chat\n")
    (house / "runtime" / "chat.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ggufmoe.gguf.header\n"
    )
    imports = all_imports(house)
    assert wrong_arrows(imports) == ["ggufmoe.gguf.header:2 imports ggufmoe.runtime.chat"]
    assert circles(imports) == [["ggufmoe.gguf.header", "ggufmoe.runtime.chat"]]


def test_the_table_names_every_room() -> None:
    rooms = {room_of(module) for module in all_modules(PACKAGE)}
    assert rooms == set(ALLOWED)


def test_the_map_shows_this_table() -> None:
    short = {"*ground*": _GROUND, "*base*": _BASE, "nothing": frozenset()}
    rows = re.findall(r"^\| (\w+) \| .* \| (.*) \|$", MAP.split("## How one")[0], re.MULTILINE)[1:]
    shown = {
        room: frozenset[str]().union(*(short.get(word, frozenset({word})) for word in words.split(", ")))
        for room, words in rows
    }
    assert shown == ALLOWED


def test_the_map_names_files_that_exist() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", MAP)
    assert len(named) > 30
    missing = [name for name in named if not (PACKAGE / name).exists() and not (PACKAGE.parent / name).exists()]
    assert missing == []


def test_llama_cpp_is_imported_in_two_rooms_inside_functions() -> None:
    found = [one for one in all_imports(PACKAGE) if any(name.split(".")[0] == "llama_cpp" for name in one.modules)]
    assert found
    assert [str(one) for one in found if room_of(one.importer) not in LLAMA_CPP_ROOMS] == []
    assert [str(one) for one in found if not one.in_function and not one.for_types] == []


def test_torch_and_transformers_are_nowhere() -> None:
    wrong = [str(one) for one in all_imports(PACKAGE) if {name.split(".")[0] for name in one.modules} & NOWHERE]
    assert wrong == []


def test_there_is_no_lumber_room() -> None:
    assert {path.stem for path in PACKAGE.rglob("*.py")} & {"utils", "common", "helpers", "util", "misc"} == set()


def test_no_two_modules_have_one_name() -> None:
    """But for verbs: ``cli/convert.py`` is the command line's side of ``convert.py``."""
    stems = [name.rpartition(".")[2] for name in all_modules(PACKAGE) if room_of(name) not in ("cli", "packaging")]
    assert {stem for stem in stems if stems.count(stem) > 1} == set()


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for name, path in all_modules(PACKAGE).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_every_module_says_what_it_owns() -> None:
    silent = [
        name
        for name, path in all_modules(PACKAGE).items()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
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
