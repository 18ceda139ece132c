"""The recipe of a merge: mergekit-moe's YAML, checked before anything is opened.

Owns the schema (mergekit's keys and a few optional ones of ours) and its messages, each with the place in the file.
What the named models contain is checked by ``merged``.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic_core import PydanticCustomError

from ggufmoe.errors import RecipeError, one_line
from ggufmoe.families.family import SharedExperts
from ggufmoe.files import decode_text, what_instead
from ggufmoe.merge.targets import Wanted, is_known, known_names
from ggufmoe.options.limits import MAX_EXPERTS
from ggufmoe.options.refit_options import MAX_ROUTER_STEPS, MAX_ROUTER_TOKENS, MIN_ROUTER_TOKENS, ROUTER_TOKENS
from ggufmoe.weights.source_tensor import Dtype

MAX_RECIPE_BYTES = 1 << 20
_MAX_VALUES = 1_000_000
"""How many keys and values a recipe may have, those of an alias counted each time that it is used."""
_NO_PATH = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_SHOWN_PROBLEMS = 8
TAKEN = "router"
"""What is told in the place of a gate mode where a router was taken from another model."""
_MAX_SCALE = 1000
"""Far above any use: weights are around 0.02, and larger ones would not fit in 16 bits."""


class GateMode(str, Enum):
    """How router rows are made; the names are mergekit's, but for ``fitted``."""

    HIDDEN = "hidden"
    HIDDEN_AVG = "hidden_avg"
    HIDDEN_LAST = "hidden_last"
    CHEAP_EMBED = "cheap_embed"
    RANDOM = "random"
    UNIFORM_RANDOM = "uniform_random"
    FITTED = "fitted"

    @property
    def needs_prompts(self) -> bool:
        """Whether the rows depend on the experts' prompts."""
        return not self.is_random and self is not GateMode.FITTED

    @property
    def is_random(self) -> bool:
        """Whether the rows are drawn."""
        return self in (GateMode.RANDOM, GateMode.UNIFORM_RANDOM)

    @property
    def needs_forward_pass(self) -> bool:
        """Whether the base model's layers have to be computed."""
        return self in (GateMode.HIDDEN, GateMode.HIDDEN_AVG, GateMode.HIDDEN_LAST, GateMode.FITTED)


_DTYPES = {
    "bfloat16": Dtype.BF16,
    "bf16": Dtype.BF16,
    "float16": Dtype.F16,
    "fp16": Dtype.F16,
    "half": Dtype.F16,
    "float32": Dtype.F32,
    "fp32": Dtype.F32,
    "float": Dtype.F32,
}
_MODEL = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_Prompts = Annotated[
    tuple[StrictStr, ...], Field(strict=False), BeforeValidator(lambda value: () if value is None else value)
]
"""A key without a value means no prompts, as for mergekit."""


def _as_list(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


_Files = Annotated[tuple[StrictStr, ...], Field(strict=False), BeforeValidator(_as_list)]
"""One file, or a list of them."""


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


_Number = Annotated[float, BeforeValidator(_no_flag)]
"""A number, which YAML may read as text (``1e-3``), but not as true or false."""


class ExpertRecipe(BaseModel):
    """One expert: a dense model, what it should and should not answer, and optional changes to its weights."""

    model_config = _MODEL

    source_model: StrictStr
    positive_prompts: _Prompts = ()
    negative_prompts: _Prompts = ()
    texts: _Files = ()
    """Files of texts that it should answer, for gate mode fitted."""
    noise_scale: _Number | None = Field(default=None, ge=0, le=_MAX_SCALE)
    residual_scale: _Number | None = Field(default=None, ge=-_MAX_SCALE, le=_MAX_SCALE)

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive and negative prompts."""
        return self.positive_prompts, self.negative_prompts


class Recipe(BaseModel):
    """A whole recipe. The last seven keys are ours; mergekit does not know them."""

    model_config = _MODEL

    base_model: StrictStr
    experts: tuple[ExpertRecipe, ...] = Field(min_length=1, max_length=MAX_EXPERTS)
    gate_mode: GateMode = GateMode.HIDDEN
    dtype: StrictStr | None = None
    experts_per_token: StrictInt = Field(default=2, ge=1)
    architecture: StrictStr | None = None
    shared_experts: tuple[ExpertRecipe, ...] | None = Field(default=None, max_length=1)

    seed: StrictInt = Field(default=0, ge=0, lt=1 << 64)
    name: StrictStr | None = None
    chat_template: StrictStr | None = None
    tokenizer_source: StrictStr | None = None
    router: StrictStr | None = None
    """A mixture's checkpoint or a GGUF file whose router is taken; no rows are computed then."""
    text_tokens: StrictInt = Field(default=ROUTER_TOKENS, ge=MIN_ROUTER_TOKENS, le=MAX_ROUTER_TOKENS)
    """Tokens of each expert's texts that a router is fitted on and judged by, at most."""
    router_steps: StrictInt | None = Field(default=None, ge=0, le=MAX_ROUTER_STEPS)
    """Steps of a fitted router down the loss of its texts; None: as many as do not take long."""

    @property
    def storage_dtype(self) -> Dtype | None:
        """The dtype every weight is rounded to; None keeps the base model's."""
        return None if self.dtype is None else _DTYPES[self.dtype]

    @property
    def shared(self) -> ExpertRecipe | None:
        """The expert that every token goes to, if there is one."""
        return self.shared_experts[0] if self.shared_experts else None

    @property
    def gated(self) -> tuple[ExpertRecipe, ...]:
        """The experts that get a router row: the routed ones, and a shared one that has prompts or needs none."""
        shared = self.shared_experts or ()
        return (*self.experts, *(one for one in shared if one.positive_prompts or self.gate_mode.is_random))

    @property
    def needs_prompts(self) -> bool:
        """Whether the router is made of the experts' prompts."""
        return self.router is None and self.gate_mode.needs_prompts

    @property
    def router_origin(self) -> str:
        """The gate mode; ``TAKEN`` for a router that is taken from another model."""
        return self.gate_mode.value if self.router is None else TAKEN

    @property
    def has_prompts(self) -> bool:
        """Whether every routed expert has positive prompts."""
        return all(expert.positive_prompts for expert in self.experts)

    @property
    def wanted(self) -> Wanted:
        """What decides which mixture the recipe becomes."""
        kind = SharedExperts.NONE
        if self.shared is not None:
            kind = SharedExperts.GATED if self.shared.positive_prompts else SharedExperts.PLAIN
        n_expert, n_used = len(self.experts), self.experts_per_token
        return Wanted(self.architecture, kind, n_expert, n_used, self.gate_mode.is_random)


def load_recipe(path: Path, *, allow_identical_experts: bool = False) -> tuple[Recipe, str]:
    """Read and check a recipe; returns it and its text.

    Raises RecipeError for a file that cannot be read, is not YAML or not a mapping, for unknown keys, wrong types and
    missing prompts, for experts that are all the same unless they are allowed, and for what no mixture that ggufmoe
    makes can express.
    """
    text = _read_text(path)
    node, values = _parse(path, text)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_describe(path, node, error)) from None
    for place, problem in _problems(recipe, allow_identical_experts):
        raise RecipeError(f"{path}{_at(node, place)}: {problem}")
    return recipe, text


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; is this a recipe?")
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); is this a recipe?") from error
    if (instead := what_instead(path)) is not None:
        raise RecipeError(f"{path} is {instead}")
    return text


def _parse(path: Path, text: str) -> tuple[yaml.MappingNode, Any]:
    """The document as nodes, which have line numbers, and as values.

    Raises RecipeError if it is not YAML, no mapping, repeats a key, or stands for more values than any recipe has.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kinds = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}
            found = kinds.get(type(node), "an empty file")
            raise RecipeError(f"{path}: expected a mapping with base_model and experts, found {found}")
        if _n_values(node, {}) > _MAX_VALUES:
            raise RecipeError(f"{path}: its aliases stand for more than {_MAX_VALUES} values; write out what is meant")
        for mapping in _mappings(node):
            _refuse_repeated_keys(path, mapping)
        return node, loader.construct_document(node)
    except _YAML_FAILURES as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or f"{type(error).__name__}: {one_line(error)}"
        raise RecipeError(f"{path}{line}: not valid YAML: {problem}") from None


_YAML_FAILURES = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What PyYAML raises: the errors after the first come from values that do not fit their tag, as in ``!!bool x``."""


def _n_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Number of keys and values in ``node``, counted as often as aliases repeat them; a node in itself counts once."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1
        parts = (part for item in node.value for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(node)]


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    seen: set[int] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, yaml.MappingNode):
            yield current
            stack.extend(value for _, value in current.value)
        elif isinstance(current, yaml.SequenceNode):
            stack.extend(current.value)


def _refuse_repeated_keys(path: Path, mapping: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise RecipeError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice; keep one")
        seen.add(str(key.value))


def place_of(path: Path, text: str, place: Sequence[str | int]) -> str:
    """``FILE:LINE: key`` of something in a recipe whose text has been read already."""
    return f"{path}{_at(_parse(path, text)[0], place)}"


def _at(node: yaml.Node, place: Sequence[str | int]) -> str:
    """``:LINE: key`` of a place in the document; the line of the nearest enclosing key if the place is absent."""
    line = node.start_mark.line
    for step in place:
        child = _child(node, step)
        if child is None:
            break
        line, node = child
    dotted = ".".join(str(step) for step in place)
    return f":{line + 1}: {dotted}" if dotted else f":{line + 1}"


def _child(node: yaml.Node, step: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):  # the keys that ``<<`` merged stand before those that replace them
            if key.value == step:
                return key.start_mark.line, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step].start_mark.line, node.value[step]
    return None


def _describe(path: Path, node: yaml.Node, error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # pydantic drops items that are wrong, and then misses them
    wrong = {problem["loc"][0] for problem in problems if len(problem["loc"]) > 1}
    problems = [p for p in problems if not (p["type"] == "too_short" and p["loc"][0] in wrong)]
    told = [f"{path}{_at(node, p['loc'])}: {_message(p['type'], p['loc'], p)}" for p in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        told.append(f"and {len(problems) - _SHOWN_PROBLEMS} more")
    return "; ".join(told)


def _message(kind: str, place: Sequence[str | int], problem: Any) -> str:
    found = _found(problem["input"])
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(place)}"
    if kind == "missing":
        return "this key is required"
    if kind == "enum":
        return f"unknown gate mode {problem['input']!r:.60}; one of {', '.join(mode.value for mode in GateMode)}"
    if kind == "too_short":
        return "there must be at least one"
    if kind == "too_long":
        return f"there may be at most {problem['ctx']['max_length']}"
    if kind == "string_type":
        return f"expected text, found {found}; put it in quotes if it is meant as text"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {found}"
    message: str = problem["msg"].replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}, found {found}"


_EXPECTED = {
    "tuple_type": "a list",
    "model_type": "a mapping",
    "int_type": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is not infinite",
}


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return reprlib.repr(value)


def _nearest(place: Sequence[str | int]) -> str:
    fields = Recipe.model_fields if len(place) == 1 else ExpertRecipe.model_fields
    matches = difflib.get_close_matches(str(place[-1]), fields, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else f"; known here: {', '.join(fields)}"


_Problem = tuple[tuple[str | int, ...], str]


def _problems(recipe: Recipe, allow_identical: bool) -> Iterator[_Problem]:
    """Reasons why a well-formed recipe cannot be merged, as (place, message)."""
    yield from _unsupported(recipe)
    if recipe.experts_per_token > len(recipe.experts):
        yield (
            ("experts_per_token",),
            f"is {recipe.experts_per_token} but there are only {len(recipe.experts)} experts; lower it or add experts",
        )
    yield from _text_problems(recipe)
    yield from _router_problems(recipe)
    if recipe.needs_prompts:
        yield from _prompt_problems(recipe)
    if not allow_identical:
        yield from _identical_prompts(recipe)
        yield from _identical_experts(recipe)


def _all_experts(recipe: Recipe) -> Iterator[tuple[tuple[str, int], ExpertRecipe]]:
    """Routed and shared experts, each with its place in the recipe."""
    for key, experts in (("experts", recipe.experts), ("shared_experts", recipe.shared_experts or ())):
        for i, expert in enumerate(experts):
            yield (key, i), expert


def _unsupported(recipe: Recipe) -> Iterator[_Problem]:
    if recipe.architecture and not is_known(recipe.architecture):
        yield ("architecture",), f"{recipe.architecture!r:.60} is not supported; ggufmoe makes {known_names()}"
    if recipe.dtype is not None and recipe.dtype not in _DTYPES:
        yield ("dtype",), f"unknown dtype {recipe.dtype!r:.60}; one of bfloat16, float16, float32"
    models = [((*place, "source_model"), expert.source_model) for place, expert in _all_experts(recipe)]
    for place, model in [(("base_model",), recipe.base_model), *models]:
        if not model.strip():
            yield place, "names no model"
        elif _NO_PATH.search(model):
            yield place, f"{model!r:.60} is no path: it holds control characters"
        elif "+" in model:
            yield place, f"{model!r:.60} adds a LoRA; merge the adapter into the model first"
    if recipe.tokenizer_source != "union":
        yield from _bad_choice("tokenizer_source", recipe.tokenizer_source, recipe, ", nor union")
    if recipe.chat_template is not None and _NO_PATH.search(recipe.chat_template):
        yield ("chat_template",), f"{recipe.chat_template!r:.60} is no path: it holds control characters"
    if recipe.chat_template is not None and recipe.chat_template.startswith("expert:"):
        yield from _bad_choice("chat_template", recipe.chat_template, recipe)


def _bad_choice(key: str, value: str | None, recipe: Recipe, others: str = "") -> Iterator[_Problem]:
    if value is None or value == "base":
        return
    match = re.fullmatch(r"expert:(\d+)", value)
    if match is None or int(match[1]) >= len(recipe.experts):
        yield (key,), f"{value!r:.60} is neither base nor expert:0 to expert:{len(recipe.experts) - 1}{others}"


def _prompt_problems(recipe: Recipe) -> Iterator[_Problem]:
    mode = recipe.gate_mode.value
    for (key, i), expert in _all_experts(recipe):
        if not expert.positive_prompts and (key == "experts" or expert.negative_prompts):
            yield (key, i, "positive_prompts"), f"gate mode {mode} needs at least one prompt for each expert"
        # an empty negative prompt is the beginning-of-text token alone, as for mergekit
        for j, prompt in enumerate(expert.positive_prompts):
            if not prompt.strip():
                yield (key, i, "positive_prompts", j), "the prompt is empty"


def _text_problems(recipe: Recipe) -> Iterator[_Problem]:
    """What is wrong with the files of texts; whether they can be read is seen when the models are open."""
    is_fitted = recipe.gate_mode is GateMode.FITTED
    for (key, i), expert in _all_experts(recipe):
        if key == "shared_experts" and is_fitted and expert.positive_prompts:
            yield (key, i, "positive_prompts"), "the gate of a shared expert is not fitted; leave its prompts out"
        if key == "shared_experts" and expert.texts:
            yield (key, i, "texts"), "every token goes to a shared expert, which has no texts"
        elif expert.texts and recipe.router is not None:
            yield (
                (key, i, "texts"),
                "router: takes rows that exist; leave either it or the texts out",
            )
        elif expert.texts and not is_fitted:
            yield (
                (key, i, "texts"),
                f"gate mode {recipe.gate_mode.value} does not use texts; write gate_mode: fitted",
            )
        elif is_fitted and not expert.texts and key == "experts":
            yield (
                (key, i),
                "gate mode fitted needs texts for this expert; write texts: FILE, or a list of files",
            )
        if len({*expert.texts}) < len(expert.texts):
            yield (key, i, "texts"), "a file is named twice"
        for file in expert.texts:
            if not file.strip() or _NO_PATH.search(file):
                yield (key, i, "texts"), f"{file!r:.60} is no path"
    if is_fitted and len(recipe.experts) < 2:
        yield ("experts",), "a router is fitted for two experts or more"
    files = [frozenset(expert.texts) for expert in recipe.experts]
    if is_fitted and len({*files}) < len(files):
        yield ("experts",), "two experts have the same texts, so nothing tells them apart"


def _router_problems(recipe: Recipe) -> Iterator[_Problem]:
    if recipe.router is None:
        return
    if not recipe.router.strip() or _NO_PATH.search(recipe.router):
        yield ("router",), f"{recipe.router!r:.60} is no path"
    if "gate_mode" in recipe.model_fields_set:
        yield ("gate_mode",), "router: takes the rows of another model, so none are made; leave one of the two out"
    if recipe.shared is not None and recipe.shared.positive_prompts:
        yield ("shared_experts", 0, "positive_prompts"), "router: has no row for the gate of a shared expert"


def _identical_prompts(recipe: Recipe) -> Iterator[_Problem]:
    first = recipe.experts[0].prompts
    same = all(expert.prompts == first for expert in recipe.experts)
    if recipe.needs_prompts and len(recipe.experts) > 1 and same:
        yield (
            ("experts",),
            "all experts have the same prompts, so the router cannot tell them apart; "
            "if you mean to train it afterwards, pass --allow-identical-experts",
        )


def _identical_experts(recipe: Recipe) -> Iterator[_Problem]:
    def weights(expert: ExpertRecipe) -> tuple[object, ...]:
        return expert.source_model, expert.noise_scale or 0.0, expert.residual_scale

    first = recipe.experts[0]
    noisy = any(expert.noise_scale for expert in recipe.experts)
    if len(recipe.experts) > 1 and not noisy and len({weights(expert) for expert in recipe.experts}) == 1:
        yield (
            ("experts",),
            f"all experts are {first.source_model}: a larger file with the same answers; "
            "if you mean to train it afterwards, pass --allow-identical-experts",
        )
