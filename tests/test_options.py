"""What option objects refuse; how their flags are read is the command line's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe import ContextOptions, ConvertOptions, OffloadOptions, OptionError, SamplingOptions
from ggufmoe.options import EvaluationOptions, PromptOptions, WorkerOptions


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
        (ConvertOptions, {"pure": "yes"}, "pure must be True or False, not 'yes'"),
    ],
)
def test_values_of_another_kind_are_refused(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**given)


def test_what_will_do() -> None:
    ContextOptions(n_ctx=np.int64(512), n_threads=None)
    SamplingOptions(temperature=1, top_p=np.float32(0.5), grammar_file=Path("a.gbnf"))
    SamplingOptions(grammar_file="a.gbnf", logit_bias=["5+1"])  # type: ignore[arg-type]
