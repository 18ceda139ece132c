"""The exception tree: as drawn in the docstring, each with an exit code, and each one sentence."""

from __future__ import annotations

import inspect
import re
from typing import Any

from ggufmoe import errors
from ggufmoe.errors import GgufmoeError, one_line

LINE = re.compile(r"^    (?P<lead>[│├└─ ]*)(?P<name>[A-Z]\w+)( |$)", re.MULTILINE)


def drawn() -> dict[str, str | None]:
    """Class name to the name of its base, as the docstring draws them."""
    tree: dict[str, str | None] = {}
    path: list[str] = []
    for match in LINE.finditer(errors.__doc__ or ""):
        depth = len(match["lead"]) // 4
        path[depth:] = [match["name"]]
        tree[match["name"]] = path[depth - 1] if depth else None
    return tree


def classes() -> dict[str, type[GgufmoeError]]:
    """Every class of the module by its name; all are GgufmoeErrors."""
    found: dict[str, Any] = dict(inspect.getmembers(errors, inspect.isclass))
    assert all(issubclass(member, GgufmoeError) for member in found.values())
    return found


def defined() -> dict[str, str | None]:
    bases = {name: member.__base__ for name, member in classes().items()}
    return {name: base.__name__ if base and base is not Exception else None for name, base in bases.items()}


def test_the_tree_is_the_one_in_the_docstring() -> None:
    assert len(drawn()) > 20
    assert drawn() == defined()


def test_every_class_is_explained_in_a_sentence() -> None:
    for name, member in classes().items():
        assert re.fullmatch(r"[^\n]+\.", member.__doc__ or ""), name


def test_exit_codes() -> None:
    codes = {name: member.exit_code for name, member in classes().items()}
    assert codes.pop("Cancelled") == 130
    assert codes.pop("OptionError") == 2
    assert set(codes.values()) == {1}


def test_messages_of_others_become_one_line() -> None:
    assert one_line(ValueError("two\nlines \x1b[31mred")) == "two lines [31mred"
    assert one_line(RecursionError()) == "RecursionError"
    assert (one_line("x" * 999), one_line("x" * 999, 3), one_line("x" * 999, None)) == ("x" * 200, "xxx", "x" * 999)
