"""Names of file types and tensor types, against libllama and ggml."""

from __future__ import annotations

from operator import attrgetter

import pytest

from ggufmoe.errors import OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, WRITABLE_TYPES, FileType, parse_tensor_type

NAMES = (
    "F32 F16 BF16 Q8_0 Q1_0 Q2_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q2_K_S Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K "
    "IQ4_NL IQ4_XS IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ1_S IQ1_M TQ1_0 TQ2_0 MXFP4_MOE"
)


def test_every_file_type_of_llama_quantize_is_there() -> None:
    assert " ".join(file_type.name for file_type in FileType) == NAMES


@pytest.mark.parametrize("file_type", FileType, ids=attrgetter("name"))
def test_numbers_and_descriptions_are_libllamas(file_type: FileType) -> None:
    from llama_cpp import llama_cpp

    assert getattr(llama_cpp, _constant(file_type)) == file_type.id
    assert llama_cpp.llama_ftype_name(file_type.id).decode() == file_type.description


def _constant(file_type: FileType) -> str:
    return "LLAMA_FTYPE_ALL_F32" if file_type is FileType.F32 else f"LLAMA_FTYPE_MOSTLY_{file_type.name}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Q4_K_M", FileType.Q4_K_M),
        ("q4_k_m", FileType.Q4_K_M),
        (" iq2_xxs ", FileType.IQ2_XXS),
        ("Q3_K", FileType.Q3_K_M),
        ("q4_k", FileType.Q4_K_M),
        ("Q5_K", FileType.Q5_K_M),
        ("mxfp4_moe", FileType.MXFP4_MOE),
        ("15", FileType.Q4_K_M),
        ("0", FileType.F32),
    ],
)
def test_names_aliases_and_numbers(name: str, expected: FileType) -> None:
    assert FileType.from_name(name) is expected


def test_numbers_of_a_gguf() -> None:
    assert [FileType.from_id(file_type.id) for file_type in FileType] == list(FileType)
    with pytest.raises(OptionError, match="unknown file type '39'"):
        FileType.from_id(39)


def test_an_unknown_file_type_names_its_neighbours() -> None:
    with pytest.raises(OptionError, match=r"unknown file type 'Q4_KM'; did you mean .*Q4_K_M"):
        FileType.from_name("Q4_KM")
    with pytest.raises(OptionError, match="choose one of F32, F16, BF16"):
        FileType.from_name("zzz")


@pytest.mark.parametrize("type", [known for known in GGMLType if known in WRITABLE_TYPES], ids=attrgetter("name"))
def test_tensor_types_by_name(type: GGMLType) -> None:
    assert parse_tensor_type(type.name.lower()) is type


@pytest.mark.parametrize("name", ["q8_k", "i32", "q4_k_m", "f64", ""])
def test_types_that_ggml_cannot_make_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="tensor type"):
        parse_tensor_type(name)


def test_a_tensor_type_names_its_neighbours() -> None:
    with pytest.raises(OptionError, match=r"did you mean .*Q4_K"):
        parse_tensor_type("q4_k_m")


def test_types_that_abort_are_those_of_ggml() -> None:
    assert {known for known in GGMLType if quantizing.requires_imatrix(known)} == ABORTS_WITHOUT_IMATRIX
