"""The public names: complete, typed, and bound when they are first used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe import errors

ROOT = Path(ggufmoe.__file__).parent


def names_for_type_checkers() -> set[str]:
    """What the ``if TYPE_CHECKING`` block of the package imports."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_see_what_is_exported() -> None:
    assert names_for_type_checkers() | {"__version__"} == set(ggufmoe.__all__)


def test_every_exception_is_exported() -> None:
    assert {name for name, _ in inspect.getmembers(errors, inspect.isclass)} <= set(ggufmoe.__all__)


def test_all_is_sorted_and_has_no_doubles() -> None:
    assert sorted(set(ggufmoe.__all__)) == sorted(ggufmoe.__all__)
    assert set(ggufmoe.__all__) <= set(dir(ggufmoe))


@pytest.mark.parametrize("name", ggufmoe.__all__)
def test_every_name_can_be_had(name: str) -> None:
    value = getattr(ggufmoe, name)
    assert value is getattr(ggufmoe, name)
    if name != "__version__":
        assert value.__name__ == name
        assert inspect.isclass(value) or inspect.isfunction(value)
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ggufmoe' has no attribute 'quantise'"):
        _ = ggufmoe.quantise  # type: ignore[attr-defined]


def test_a_function_is_not_hidden_by_the_module_it_lives_in() -> None:
    code = (
        "import ggufmoe, ggufmoe.convert\n"
        "from ggufmoe import convert\n"
        "import sys, types\n"
        "assert isinstance(convert, types.FunctionType)\n"
        "assert convert is ggufmoe.convert is sys.modules['ggufmoe.convert'].convert\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert inspect.ismodule(importlib.import_module("ggufmoe.convert"))


def test_the_version_is_the_project_s() -> None:
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == ggufmoe.__version__  # type: ignore[index]
