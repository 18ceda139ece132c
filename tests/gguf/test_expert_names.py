"""Names of experts from the recipe in a header, which anybody may have written."""

from __future__ import annotations

import pytest

from ggufmoe.gguf.expert_names import expert_names
from ggufmoe.gguf.own_keys import RECIPE
from tests.gguf_files import mixtral_metadata, text


def names(recipe: str, n_expert: int = 2) -> tuple[str, ...]:
    return expert_names({**mixtral_metadata(n_expert, 1), RECIPE: text(recipe)})


def recipe(*sources: str) -> str:
    return "base_model: b\nexperts:\n" + "".join(f"  - source_model: {source}\n" for source in sources)


def test_the_last_part_of_each_source() -> None:
    assert names(recipe("mistralai/Mistral-7B@main", "./models/math/")) == ("Mistral-7B", "math")


def test_names_are_told_apart() -> None:
    assert names(recipe("a/m", "b/m")) == ("m (0)", "m (1)")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "experts: 3",
        "experts: [1, 2]",
        recipe("a"),
        recipe("a", "b", "c"),
        recipe("a", "/"),
        "experts:\n  - source_model: [a]\n  - source_model: b\n",
        "[" * 100_000,
        "!!python/object/apply:os.system [true]",
    ],
)
def test_numbers_where_the_recipe_names_none(content: str) -> None:
    assert names(content) == ("expert 0", "expert 1")


def test_without_a_recipe_and_without_experts() -> None:
    assert expert_names(mixtral_metadata(3, 1)) == ("expert 0", "expert 1", "expert 2")
    assert expert_names({}) == ()


def test_names_cannot_command_the_terminal() -> None:
    shown = names(recipe('"\\x1b[2J\\u202e"', "n" * 99))
    assert shown[0] == "[2J"
    assert len(shown[1]) == 24
