"""What a plan makes of what, which kernels are compiled for it, and what is said of them afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ggufmoe.errors import OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import QuantizeKeywords
from ggufmoe.quant import kernels
from ggufmoe.quant.kernels import kernel_report
from ggufmoe.quant.kernels.trust import Kernels
from ggufmoe.quantize import plan_quantize, quantize
from ggufmoe.writing import formats as module
from ggufmoe.writing.formats import Format, formats, prepare_kernels, routines
from ggufmoe.writing.plan import WritePlan
from tests.quant.llama_quantize import Specimen, write_model

if TYPE_CHECKING:
    from typing_extensions import Unpack


def plan(
    directory: Path, file_type: str, source: GGMLType = GGMLType.F16, **options: Unpack[QuantizeKeywords]
) -> WritePlan:
    specimen = Specimen(source=source)
    model = write_model(directory / "in.gguf", specimen, specimen.weights())
    return plan_quantize(model, directory / "out.gguf", file_type, **options)


def test_the_most_work_comes_first_and_copies_are_none(tmp_path: Path) -> None:
    made = formats(plan(tmp_path, "Q4_K_M", tensor_types=("attn_q=f16",)))
    weights = {Format(GGMLType.Q4_K, GGMLType.F16, False): 5, Format(GGMLType.Q6_K, GGMLType.F16, False): 2}
    assert {made_format: n // (256 * 256) for made_format, n in made.items()} == weights
    assert list(made) == list(weights)
    assert formats(plan(tmp_path, "COPY")) == {}


def test_what_is_quantized_already_is_made_from_floats(tmp_path: Path) -> None:
    model = write_model(tmp_path / "in.gguf", Specimen(), Specimen().weights())
    quantize(model, tmp_path / "q8.gguf", "Q8_0")
    again = plan_quantize(tmp_path / "q8.gguf", tmp_path / "out.gguf", "Q3_K_S", allow_requantize=True)
    assert {made.source for made in formats(again)} == {GGMLType.F32}


def test_fast_compiles_all_and_refuses_what_has_no_kernel(tmp_path: Path) -> None:
    small = plan(tmp_path, "Q5_K_S")
    prepare_kernels(small, "fast")
    assert {(row.type, row.routine) for row in routines(small, "fast")} >= {(GGMLType.Q5_K, "fast")}
    assert {row.reason for row in routines(small, "ggml")} == {"asked for"}
    with pytest.raises(OptionError, match="TQ2_0: there is no fast quantizer"):
        prepare_kernels(plan(tmp_path, "TQ2_0"), "fast")


def test_little_work_is_left_to_ggml_and_much_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(tmp_path, "Q4_1", GGMLType.F32)
    monkeypatch.setattr(kernels, "_KERNELS", Kernels())  # other tests may have judged these formats
    prepare_kernels(made, "auto")
    assert "too little work to compile a kernel" in {row.reason for row in routines(made, "auto")}
    monkeypatch.setattr(module, "_COMPILE_AT_ONCE_WEIGHTS", 1)
    prepare_kernels(made, "auto")
    judged = {(row.type, row.source) for row in kernel_report()}
    assert judged >= {(GGMLType.Q4_1, "F32"), (GGMLType.Q6_K, "F32")}
    assert {row.routine for row in routines(made, "auto")} == {"fast"}
    ternary = routines(plan(tmp_path, "TQ2_0"), "auto")
    assert {row.reason for row in ternary if row.type is GGMLType.TQ2_0} == {"there is no kernel for it"}
