"""Compare the choice of tensor types with llama_model_quantize: the full product of shapes, file types and options.

Prints one line for each group of shapes and ends with the number of tensors compared; exits 1 if any differs. Takes a
quarter of an hour of processor time, less with --quick; the tests run a part of it.

    python scripts/check_policy.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.filetypes import WRITABLE_TYPES, FileType
from ggufmoe.quant.policy import TypePolicy
from tests.quant.llama_quantize import Specimen, compare_types, write_model

EXPERTS = (0, 1, 2, 3, 4, 8)
HEADS = ((8, 8), (8, 4), (8, 2), (8, 1))
LAYERS = (1, 2, 9, 17, 32, 80)
ROWS = ((256, 256), (512, 256), (256, 384), (288, 512), (288, 288), (272, 256), (320, 272))


def specimens(quick: bool) -> Iterator[Specimen]:
    """Every shape that some rule tells from another, and the values beside its limits."""
    layers = LAYERS[:3] if quick else LAYERS
    for n_expert, (n_head, n_head_kv), n_layer, tied in itertools.product(EXPERTS, HEADS, layers, (False, True)):
        yield Specimen(n_expert, n_layer, n_head=n_head, n_head_kv=n_head_kv, tied=tied)
    for n_expert, (n_embd, n_ff), tied in itertools.product((0, 2, 3, 4, 8), ROWS, (False, True)):
        for source in (GGMLType.BF16, GGMLType.F16, GGMLType.F32):
            yield Specimen(n_expert, 9, n_embd, n_ff, n_head=8, n_head_kv=2, tied=tied, source=source)


def policies(file_type: FileType) -> Iterator[TypePolicy]:
    """A file type alone, with each override, and with all of them."""
    yield TypePolicy(file_type)
    yield TypePolicy(file_type, pure=True)
    for given in (GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.F16, GGMLType.IQ3_S):
        yield TypePolicy(file_type, output_tensor_type=given)
        yield TypePolicy(file_type, token_embedding_type=given)
        yield TypePolicy(file_type, output_tensor_type=given, token_embedding_type=GGMLType.Q6_K, pure=True)
    yield TypePolicy(file_type, (("ffn_down", GGMLType.Q5_K), (r"blk\.0\.", GGMLType.F16)))
    yield TypePolicy(file_type, ((r"blk\.[02468]\.(ffn_down|attn_v)", GGMLType.Q4_1), ("token_embd", GGMLType.Q5_0)))
    yield TypePolicy(file_type, ((r"^(output|token_embd)\.weight$", GGMLType.Q3_K),), pure=True)


def any_type_anywhere() -> Iterator[TypePolicy]:
    """Every writable type as an override of one role."""
    for wanted in sorted(WRITABLE_TYPES, key=lambda writable: writable.id):
        yield TypePolicy(FileType.Q4_K_M, (("ffn_(up|down)", wanted),))


def check(specimen: Specimen, path: Path) -> tuple[int, list[str]]:
    """All policies on one specimen: tensors compared, and the differences."""
    write_model(path, specimen)
    compared, different = 0, []
    asked = [TypePolicy(file_type) for file_type in FileType]
    if specimen.n_layer < 80:
        asked = [policy for file_type in FileType for policy in policies(file_type)] + list(any_type_anywhere())
    for policy, imatrix in itertools.product(asked, (False, True)):
        count, found = compare_types(path, specimen, policy, imatrix=imatrix)
        compared += count
        different += [f"{specimen} {policy} imatrix={imatrix}: {what}" for what in found]
    path.unlink()
    return compared, different


def main() -> int:
    """Check everything; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the deep models")
    quick = parser.parse_args().quick
    logging.disable(logging.WARNING)
    total = 0
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        groups = itertools.groupby(specimens(quick), key=lambda specimen: (specimen.n_expert, specimen.n_embd))
        for (n_expert, n_embd), members in groups:
            results = [check(specimen, Path(directory) / "specimen.gguf") for specimen in members]
            compared, different = sum(count for count, _ in results), [what for _, found in results for what in found]
            print(f"{n_expert:3} experts, n_embd {n_embd}: {compared:9} types compared, {len(different)} differ")
            total, failures = total + compared, failures + different
    print(*failures[:20], sep="\n", end="\n" if failures else "")
    print(f"{total} types compared with llama_model_quantize, {len(failures)} differ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
