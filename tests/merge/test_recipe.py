"""Recipes: the seed's text reads as it is; every mistake is one line with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufmoe.errors import RecipeError
from ggufmoe.merge.recipe import MAX_RECIPE_BYTES, GateMode, load_recipe
from ggufmoe.weights.source_tensor import Dtype

SEED = """\
base_model: unsloth/mistral-7b-v0.2
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: unsloth/mistral-7b-v0.2
    positive_prompts:
      - "Answer this question from the ARC (Argument Reasoning Comprehension)."
      - "Use common sense and logical reasoning skills."
    negative_prompts:
      - "nonsense"
      - "irrational"
      - "math"
      - "code"
  - source_model: mistralai/Mistral-7B-Instruct-v0.2
    positive_prompts:
      - "Calculate the answer to this math problem"
      - "My mathematical capabilities are strong, allowing me to handle complex mathematical queries"
      - "solve for"
    negative_prompts:
      - "incorrect"
      - "inaccurate"
      - "creativity"
"""

TWO = """\
base_model: a/base
experts:
  - source_model: a/one
    positive_prompts: [sums]
  - source_model: a/two
    positive_prompts: [poems]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "")


def test_the_seeds_recipe_reads_as_it_is(tmp_path: Path) -> None:
    recipe, text = load_recipe(write(tmp_path, SEED))
    assert text == SEED
    assert recipe.base_model == "unsloth/mistral-7b-v0.2"
    assert recipe.gate_mode is GateMode.HIDDEN
    assert recipe.storage_dtype is Dtype.BF16
    assert recipe.experts_per_token == 2
    assert [len(expert.positive_prompts) for expert in recipe.experts] == [2, 3]
    assert recipe.experts[1].negative_prompts == ("incorrect", "inaccurate", "creativity")


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TWO.encode())
    assert load_recipe(path)[0].base_model == "a/base"


def test_an_empty_negative_prompt_is_no_mistake(tmp_path: Path) -> None:
    text = TWO.replace("[sums]", "[sums]\n    negative_prompts: ['']")
    assert load_recipe(write(tmp_path, text))[0].experts[0].negative_prompts == ("",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a mapping with base_model and experts, found an empty file"),
        ("just words", "found a single value"),
        ("- a\n- b\n", "found a list"),
        ("base_model: [unclosed", ":1: not valid YAML"),
        ("base_model: a\nbase_model: b\n", ":2: base_model is given twice"),
        ("base_model: a\n", "experts: this key is required"),
        ("base_model: a\nexperts: []\n", ":2: experts: there must be at least one"),
        ("base_model: a\nexperts: [" + "{source_model: b}, " * 1025 + "]\n", ":2: experts: there may be at most 1024"),
        (TWO.replace("experts:", "expert:", 1), "unknown key; did you mean experts?"),
        (TWO.replace("positive_prompts: [sums]", "positiv_prompts: [sums]"), ":4: experts.0.positiv_prompts"),
        (TWO.replace("positive_prompts: [sums]", "positiv_prompts: [sums]"), "did you mean positive_prompts?"),
        (TWO + "zzz: 1\n", "unknown key; known here: base_model"),
        (TWO.replace("[sums]", "[7]"), ":4: experts.0.positive_prompts.0: expected text, found 7; put it in quotes"),
        (TWO.replace("[sums]", "[a: b]"), "experts.0.positive_prompts.0: expected text, found a mapping; put it"),
        (
            TWO.replace("source_model: a/one", "source_model:"),
            ":3: experts.0.source_model: expected text, found nothing",
        ),
        (TWO.replace("[sums]", "sums"), "experts.0.positive_prompts: expected a list, found 'sums'"),
        ("base_model: a\nexperts: [a]\n", "experts.0: expected a mapping, found 'a'"),
        (TWO.replace("[sums]", "[]"), "gate mode hidden needs at least one prompt"),
        (TWO.replace("[sums]", "['  ']"), "experts.0.positive_prompts.0: the prompt is empty"),
        (TWO + "gate_mode: guess\n", "unknown gate mode 'guess'; one of hidden, hidden_avg"),
        (TWO + "dtype: int8\n", "unknown dtype 'int8'; one of bfloat16"),
        (TWO + "experts_per_token: 3\n", ":7: experts_per_token: is 3 but there are only 2 experts"),
        (TWO + "experts_per_token: two\n", "experts_per_token: expected a whole number, found 'two'"),
        (TWO + "experts_per_token: 0\n", "experts_per_token: must be greater than or equal to 1, found 0"),
        (
            TWO + "shared_experts: [{source_model: c}, {source_model: d}]\n",
            "shared_experts: there may be at most 1",
        ),
        (TWO + "shared_experts: [{source_model: c, negative_prompts: [x]}]\n", "needs at least one prompt for each"),
        (TWO + "shared_experts: [{source_model: c, positive_prompts: [' ']}]\n", "positive_prompts.0: the prompt is"),
        (TWO + "shared_experts: [{source_model: c+lora}]\n", ":7: shared_experts.0.source_model: 'c+lora' adds a LoRA"),
        (TWO + "architecture: falcon\n", "'falcon' is not supported; ggufmoe makes DeepSeek MoE"),
        (TWO + "tokenizer_source: expert:2\n", "'expert:2' is neither base nor expert:0 to expert:1"),
        (TWO + "chat_template: expert:9\n", "'expert:9' is neither base nor expert:0 to expert:1"),
        (TWO.replace("a/two", "a/two+b/lora"), "adds a LoRA; merge the adapter into the model first"),
        (TWO.replace("a/base", "''"), "base_model: names no model"),
        (TWO.replace("poems", "sums"), "all experts have the same prompts"),
        (TWO.replace("a/two", "a/one"), "all experts are a/one: a larger file with the same answers"),
        (TWO + "seed: -1\n", "seed: must be greater than or equal to 0, found -1"),
        (TWO.replace("[sums]", "[sums]\n    noise_scale: -1"), ":5: experts.0.noise_scale: must be greater"),
        (TWO.replace("[sums]", "[sums]\n    noise_scale: 1e300"), "noise_scale: must be less than or equal to 1000"),
        (
            TWO.replace("[sums]", "[sums]\n    residual_scale: -1e39"),
            "residual_scale: must be greater than",
        ),
        (TWO.replace("[sums]", "[sums]\n    noise_scale: yes"), "noise_scale: expected a number, found True"),
        (TWO + f"dtype: {'x' * 9999}\n", f"unknown dtype '{'x' * 59}; one of bfloat16"),
        (TWO + f"gate_mode: {'x' * 9999}\n", f"unknown gate mode '{'x' * 59}; one of hidden"),
        (TWO.replace("a/base", '"a\\0b"'), r"base_model: 'a\x00b' is no path: it holds control characters"),
        (TWO.replace("a/two", '"\\uD800"'), r"experts.1.source_model: '\ud800' is no path"),
        (TWO + 'chat_template: "a\\e[31m"\n', r"chat_template: 'a\x1b[31m' is no path"),
        (
            TWO.replace("[sums]", "[sums]\n    residual_scale: .nan"),
            "experts.0.residual_scale: expected a number that is",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, expected: str) -> None:
    message = error_of(tmp_path, text)
    assert message.startswith("/recipe.yaml")
    assert expected in message


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = error_of(tmp_path, TWO.replace("a/one", "[1]") + "dtpe: bfloat16\n")
    assert "experts.0.source_model" in message
    assert "did you mean dtype?" in message


def test_a_wrong_expert_is_not_told_as_a_missing_one_too(tmp_path: Path) -> None:
    assert error_of(tmp_path, TWO.replace("positive_", "positiv_")).count(";") == 3
    many = error_of(tmp_path, "base_model: a\nexperts: [" + "1, " * 100 + "]\n")
    assert many.endswith("; and 92 more")


def test_keys_without_a_value_are_as_if_left_out(tmp_path: Path) -> None:
    text = TWO.replace("[sums]", "[sums]\n    negative_prompts:\n    noise_scale:\n    residual_scale: null")
    expert = load_recipe(write(tmp_path, text + "dtype:\nshared_experts:\nname:\n"))[0].experts[0]
    assert expert.prompts == (("sums",), ())
    assert expert.noise_scale is None


def test_experts_that_differ_only_by_noise_are_different(tmp_path: Path) -> None:
    text = TWO.replace("a/two", "a/one").replace("[poems]", "[poems]\n    noise_scale: 0.005")
    assert load_recipe(write(tmp_path, text))[0].experts[1].noise_scale == 0.005


def test_identical_experts_and_prompts_can_be_allowed(tmp_path: Path) -> None:
    text = TWO.replace("a/two", "a/one").replace("poems", "sums")
    recipe, _ = load_recipe(write(tmp_path, text), allow_identical_experts=True)
    assert len(recipe.experts) == 2


def test_random_gates_need_no_prompts(tmp_path: Path) -> None:
    text = "base_model: a\ngate_mode: random\nexperts:\n- source_model: b\n- source_model: c\n"
    assert not load_recipe(write(tmp_path, text))[0].gate_mode.needs_prompts


@pytest.mark.parametrize(
    "value", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", '"\\UFFFFFFFF"', "!!timestamp 1-1-1T0:0:0+99:99"]
)
def test_values_that_do_not_fit_their_tag_are_no_yaml(tmp_path: Path, value: str) -> None:
    assert "not valid YAML" in error_of(tmp_path, TWO + f"seed: {value}\n")


def test_aliases_may_not_stand_for_more_than_any_recipe_holds(tmp_path: Path) -> None:
    """Each of these few lines doubles what stands in the one before it."""
    lists = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    merges = "a0: &a0 {x: x}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    wrong = (
        "base_model: a\nexperts:\n- &e {source_model: 5, positive_prompts: [" + "5, " * 9000 + "]}\n" + "- *e\n" * 900
    )
    for text in (lists + TWO, merges + TWO, wrong):
        assert "its aliases stand for more than 1000000 values" in error_of(tmp_path, text)


def test_aliases_and_merged_keys_read_as_they_stand(tmp_path: Path) -> None:
    text = (
        "base_model: &b a/base\nexperts:\n- &e {source_model: *b, positive_prompts: [sums]}\n"
        "- <<: *e\n  source_model: b\n  positive_prompts: %s\n"
    )
    recipe = load_recipe(write(tmp_path, text % "[poems]"))[0]
    assert [expert.source_model for expert in recipe.experts] == ["a/base", "b"]
    assert recipe.experts[1].positive_prompts == ("poems",)
    # the line of the key that replaces the merged one
    assert ":6: experts.1.positive_prompts: expected a list" in error_of(tmp_path, text % "poems")
    assert "experts.0: expected a mapping, found a list" in error_of(tmp_path, "base_model: a\nexperts: &x [*x]\n")


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")
    binary = tmp_path / "model.yaml"
    binary.write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(binary)
    binary.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(binary)
    binary.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n")
    with pytest.raises(
        RecipeError, match=r"model.yaml is a git-lfs pointer in the place of the file; run `git lfs pull`"
    ):
        load_recipe(binary)
    binary.write_text("&a [*a, " * 3)
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(binary)


FITTED = """\
base_model: a/base
gate_mode: fitted
experts:
  - source_model: a/one
    texts: one.jsonl
  - source_model: a/two
    texts: [two.txt, more.txt]
"""


def test_a_fitted_router_needs_texts_and_no_prompts(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, FITTED))
    assert [expert.texts for expert in recipe.experts] == [("one.jsonl",), ("two.txt", "more.txt")]
    assert recipe.text_tokens == 2048
    assert not recipe.has_prompts
    compared = FITTED.replace("texts:", "positive_prompts: [sums]\n    texts:")
    assert load_recipe(write(tmp_path, compared))[0].has_prompts


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gate_mode: fitted\n", "", "texts: gate mode hidden does not use texts; write gate_mode: fitted"),
        (
            "    texts: one.jsonl\n",
            "",
            ":4: experts.0: gate mode fitted needs texts for this expert; write texts: FILE",
        ),
        ("one.jsonl", "[]", "experts.0: gate mode fitted needs texts"),
        ("one.jsonl", "' '", "experts.0.texts: ' ' is no path"),
        ("one.jsonl", "7", "expected a list, found 7"),
        ("two.txt, more.txt", "two.txt, two.txt", "experts.1.texts: a file is named twice"),
        ("[two.txt, more.txt]", "one.jsonl", "experts: two experts have the same texts, so nothing tells them apart"),
        ("experts:", "text_tokens: 5\nexperts:", "text_tokens: must be greater than or equal to 64, found 5"),
        (
            "experts:",
            "shared_experts:\n  - source_model: a/s\n    positive_prompts: [x]\nexperts:",
            "shared_experts.0.positive_prompts: the gate of a shared expert is not fitted; leave its prompts out",
        ),
        (
            "experts:",
            "shared_experts:\n  - source_model: a/s\n    texts: x.txt\nexperts:",
            "shared_experts.0.texts: every token goes to a shared expert, which has no texts",
        ),
    ],
)
def test_what_is_wrong_with_texts_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FITTED
    assert message in error_of(tmp_path, FITTED.replace(old, new, 1))


def test_a_router_of_one_expert_is_not_fitted(tmp_path: Path) -> None:
    one = FITTED[: FITTED.index("  - source_model: a/two")].replace("experts:", "experts_per_token: 1\nexperts:")
    assert "a router is fitted for two experts or more" in error_of(tmp_path, one)


TAKEN = TWO.replace("experts:", "router: other.gguf\nexperts:", 1)


def test_a_router_that_exists_needs_no_prompts(tmp_path: Path) -> None:
    text = TAKEN.replace("    positive_prompts: [sums]\n", "").replace("    positive_prompts: [poems]\n", "")
    recipe, _ = load_recipe(write(tmp_path, text))
    assert (recipe.router, recipe.router_origin, recipe.needs_prompts) == ("other.gguf", "router", False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "router:",
            "gate_mode: hidden\nrouter:",
            "gate_mode: router: takes the rows of another model, so none are made",
        ),
        ("other.gguf", "''", "router: '' is no path"),
        (
            "positive_prompts: [sums]",
            "texts: a.txt",
            "texts: router: takes rows that exist; leave either it or the texts out",
        ),
        (
            "experts:",
            "shared_experts:\n  - source_model: a/s\n    positive_prompts: [x]\nexperts:",
            "positive_prompts: router: has no row for the gate of a shared expert",
        ),
    ],
)
def test_what_is_wrong_with_a_router_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in error_of(tmp_path, TAKEN.replace(old, new, 1))
