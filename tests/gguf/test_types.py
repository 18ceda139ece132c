"""Our names of types, entry by entry against the ``gguf`` package, and what that package costs to load."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import gguf

from ggufmoe.gguf import upstream
from ggufmoe.gguf.types import FILE_TYPES, GGMLType, ValueType

MISSING = {"Q2_0"}
"""Types of the pinned llama.cpp that the package does not have; remove one here when it does."""
DIFFERENT = {"Q8_1": (9, 32, 40)}
"""Types whose block the package has from an older ggml; ``test_type_table_equals_ggml`` shows what is right."""


def test_value_types_are_those_of_the_package() -> None:
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in gguf.GGUFValueType}


def test_tensor_types_are_those_of_the_package() -> None:
    theirs = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (kind.id, kind.block_size, kind.block_bytes) for kind in GGMLType if kind.name not in MISSING}
    assert ours | DIFFERENT == theirs
    assert {kind.name for kind in GGMLType} == theirs.keys() | MISSING


def test_file_types_are_those_of_the_package() -> None:
    theirs = {int(kind): kind.name.removeprefix("ALL_").removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    del theirs[gguf.LlamaFileType.GUESSED]
    assert {number: name for number, name in FILE_TYPES.items() if name not in MISSING} == theirs
    assert set(FILE_TYPES.values()) - set(theirs.values()) == MISSING


def test_types_are_shown_as_they_were() -> None:
    # the identity of saved sessions is a hash over these texts
    assert repr(GGMLType.Q4_K) == "<GGMLType.Q4_K: (12, 256, 144)>"
    assert repr(ValueType.UINT32) == "<ValueType.UINT32: 4>"


def test_constants_are_those_of_the_package_and_load_nothing_else() -> None:
    code = (
        "import sys\n"
        "from ggufmoe.gguf import upstream\n"
        "heavy = {'numpy', 'gguf', 'yaml', 'sentencepiece', 'mistral_common'} & set(sys.modules)\n"
        "print(upstream.Keys.LLM.BLOCK_COUNT, upstream.DEFAULT_ALIGNMENT, upstream.QUANTIZATION_VERSION, *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = (gguf.Keys.LLM.BLOCK_COUNT, gguf.GGUF_DEFAULT_ALIGNMENT, gguf.GGML_QUANT_VERSION)
    assert done.stdout.split() == [str(value) for value in expected]
    names = {kind.name: text for kind, text in upstream.TENSOR_NAMES.items()}
    assert names == {kind.name: text for kind, text in gguf.TENSOR_NAMES.items()}


def test_the_package_is_imported_where_its_files_are_in_an_archive(tmp_path: Path) -> None:
    package = Path(gguf.__file__).parent
    with zipfile.ZipFile(tmp_path / "gguf.zip", "w") as archive:
        for path in package.glob("*.py"):
            archive.write(path, f"gguf/{path.name}")
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from ggufmoe.gguf import upstream\n"
        "print(upstream.Keys is sys.modules['gguf.constants'].Keys, sys.modules['gguf'].__file__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "gguf.zip")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(tmp_path / "gguf.zip" / "gguf" / "__init__.py")]
