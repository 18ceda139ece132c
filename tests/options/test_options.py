"""What option objects refuse, and how a function takes its options; tests/cli/test_params.py tests their flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import ggufmoe
from ggufmoe import (
    ContextOptions,
    ConvertOptions,
    ImatrixOptions,
    InputError,
    MergeOptions,
    OffloadOptions,
    OptionError,
    QuantizeOptions,
    RefitOptions,
    SamplingOptions,
    SensitivityOptions,
)
from ggufmoe.convert import plan_convert
from ggufmoe.options import (
    ConvertKeywords,
    EvaluationKeywords,
    EvaluationOptions,
    ImatrixKeywords,
    MergeKeywords,
    PromptOptions,
    QuantizeKeywords,
    RefitKeywords,
    RoutingKeywords,
    RoutingOptions,
    SensitivityKeywords,
    WorkerOptions,
    options_of,
)
from ggufmoe.quantize import plan_quantize


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ContextOptions, {"n_ctx": "512"}, "n_ctx must be a whole number, not '512'"),
        (ContextOptions, {"n_ctx": 512.0}, r"n_ctx must be a whole number, not 512\.0"),
        (ContextOptions, {"n_batch": None}, "n_batch must be a whole number, not None"),
        (ContextOptions, {"n_threads": True}, "n_threads must be a whole number, not True"),
        (ContextOptions, {"flash_attn": True}, "--flash-attn must be one of on, off, auto, not True"),
        (OffloadOptions, {"n_gpu_layers": "all"}, "n_gpu_layers must be a whole number, not 'all'"),
        (OffloadOptions, {"override_tensor": "exps=CPU"}, "override_tensor must be a tuple of texts, not 'exps=CPU'"),
        (OffloadOptions, {"tensor_split": [3, 1]}, r"tensor_split must be a text, not \[3, 1\]"),
        (OffloadOptions, {"cpu_moe": 1}, "cpu_moe must be True or False, not 1"),
        (SamplingOptions, {"temperature": "0.7"}, r"temperature must be a number, not '0\.7'"),
        (SamplingOptions, {"grammar_file": 5}, "grammar_file must be a path, not 5"),
        (PromptOptions, {"system_prompt": 5}, "system_prompt must be a text, not 5"),
        (OffloadOptions, {"override_tensor": (1,)}, r"override_tensor must be a tuple of texts, not \(1,\)"),
        (SamplingOptions, {"logit_bias": [5]}, r"logit_bias must be a tuple of texts, not \[5\]"),
        (EvaluationOptions, {"chunks": "3"}, "chunks must be a whole number, not '3'"),
        (WorkerOptions, {"host": None}, "host must be a text, not None"),
        (RoutingOptions, {"generate": 1.5}, r"generate must be a whole number, not 1\.5"),
        (RoutingOptions, {"sampling": {}}, r"sampling must be SamplingOptions\(\.\.\.\), not {}"),
        (ConvertOptions, {"pure": "yes"}, "pure must be True or False, not 'yes'"),
    ],
)
def test_values_of_another_kind_are_refused(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**given)


def test_numbers_of_numpy_and_paths_as_text_are_accepted() -> None:
    assert ContextOptions(n_ctx=np.int64(512), n_threads=None).n_ctx == 512
    sampling = SamplingOptions(temperature=1, top_p=np.float32(0.5), grammar_file=Path("a.gbnf"))
    assert sampling == SamplingOptions(temperature=1.0, top_p=0.5, grammar_file="a.gbnf")  # type: ignore[arg-type]
    assert SamplingOptions(logit_bias=["5+1"]).logit_bias == ("5+1",)  # type: ignore[arg-type]


def test_the_home_directory_is_expanded_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert ConvertOptions(imatrix=Path("~/m.gguf")).imatrix == tmp_path / "m.gguf"
    with pytest.raises(InputError, match="~nobody-of-this-name/m: there is no such home directory"):
        ConvertOptions(imatrix=Path("~nobody-of-this-name/m"))


def test_options_of_an_object_of_keywords_or_of_neither() -> None:
    given = ConvertOptions(threads=4)
    assert options_of(ConvertOptions, given, {}) is given
    assert options_of(ConvertOptions, None, {"threads": 4}) == given
    assert options_of(ConvertOptions, None, {}) == ConvertOptions()


@pytest.mark.parametrize(
    ("options", "keywords", "message"),
    [
        (None, {"thread": 4}, "ConvertOptions has no option 'thread'; did you mean 'threads'?"),
        (None, {"zzz": 4}, "ConvertOptions has no option 'zzz'; there are quant, size, target_bpw, "),
        (None, {"threads": "x"}, "threads must be a whole number, not 'x'"),
        (ConvertOptions(), {"pure": True, "quant": "F16"}, "options=ConvertOptions(...) or single options by name, not "
         "both: found pure, quant too"),
    ],
)  # fmt: skip
def test_keywords_that_are_refused(options: ConvertOptions | None, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        options_of(ConvertOptions, options, keywords)
    assert message in str(caught.value)


@pytest.mark.parametrize("wrong", [{"threads": 4}, QuantizeOptions(), ConvertOptions])
def test_an_object_of_another_class_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected ConvertOptions\(\.\.\.\), not"):
        options_of(ConvertOptions, wrong, {})


@pytest.mark.parametrize(
    ("function", "kind", "keywords"),
    [
        (ggufmoe.convert, ConvertOptions, ConvertKeywords),
        (plan_convert, ConvertOptions, ConvertKeywords),
        (ggufmoe.quantize, QuantizeOptions, QuantizeKeywords),
        (plan_quantize, QuantizeOptions, QuantizeKeywords),
        (ggufmoe.merge, MergeOptions, MergeKeywords),
        (ggufmoe.refit, RefitOptions, RefitKeywords),
        (ggufmoe.sensitivity, SensitivityOptions, SensitivityKeywords),
        (ggufmoe.perplexity, EvaluationOptions, EvaluationKeywords),
        (ggufmoe.kl_divergence, EvaluationOptions, EvaluationKeywords),
        (ggufmoe.kl_divergences, EvaluationOptions, EvaluationKeywords),
        (ggufmoe.imatrix, ImatrixOptions, ImatrixKeywords),
        (ggufmoe.trace_routing, RoutingOptions, RoutingKeywords),
    ],
)
def test_a_function_takes_each_option_once_with_the_type_of_the_field(
    function: Callable[..., Any], kind: type[Any], keywords: type[Any]
) -> None:
    parameters = inspect.signature(function).parameters
    assert parameters["options"].annotation == f"{kind.__name__} | None"
    assert parameters["keywords"].annotation == f"Unpack[{keywords.__name__}]"
    hints = get_type_hints(kind)
    by_name = get_type_hints(keywords)
    if "quant" in parameters:  # None stands for the default
        assert "quant" not in by_name
        assert parameters["quant"].annotation == "str | None"
        by_name["quant"] = str
    assert by_name == {spec.name: hints[spec.name] for spec in fields(kind)}
    assert by_name.keys() & parameters.keys() <= {"quant"}


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [("4G", 4_000_000_000), ("500M", 500_000_000), ("64k", 64_000), ("2000", 2000), (" 2GB ", 2 * 10**9)],
)
def test_sizes_of_files(given: str, n_bytes: int) -> None:
    assert ConvertOptions(split_max_size=given).split_max_bytes == n_bytes
    assert MergeOptions(max_shard_size=given).max_shard_bytes == n_bytes
    assert ConvertOptions().split_max_bytes is None


@pytest.mark.parametrize("given", ["", "0", "4", "0G", "-1G", "4X", "1.5G", "G", "1e9", "4GiB"])
def test_what_is_no_size_of_a_file(given: str) -> None:
    with pytest.raises(OptionError, match=r"is not a size; .* for example 4G"):
        QuantizeOptions(split_max_size=given)
    with pytest.raises(OptionError, match=r"is not a size; .* for example 4G"):
        MergeOptions(max_shard_size=given)
