#!/usr/bin/env python3
"""Write ggufmoe/quant/kernels/probe_hashes.py: the fingerprints that judge kernels on every machine.

    .venv/bin/python scripts/probe_hashes.py             write them
    .venv/bin/python scripts/probe_hashes.py --check     only say whether those in the repository are right

Runs on x86-64 with the pinned engine, whose routines make the bytes. The kernels of this machine only say which blocks
they leave to ggml; where they differ from ggml otherwise, nothing is written.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import library as native
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, IGNORES_IMATRIX, WRITABLE_TYPES
from ggufmoe.quant.kernels import has_kernel, trust
from ggufmoe.quant.kernels.probe_tile import fingerprint, hash_name, probe, probe_importances

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "ggufmoe" / "quant" / "kernels" / "probe_hashes.py"
HEADER = '''\
"""Fingerprints of what the pinned ggml makes of the probe on x86-64; written by ``scripts/probe_hashes.py``.

``ggml`` is that of all bytes, ``kernel`` that of which blocks a kernel leaves to ggml and the bytes of all the others.
"""

from __future__ import annotations

from typing import NamedTuple


class ProbeHashes(NamedTuple):
    """Of one format made of one kind of source, with or without importances."""

    ggml: str
    kernel: str


HASHES = {
'''
ALONE = """\
}

GGML_ALONE = {
"""


def main() -> int:
    """Write the file or check it; 1 if a kernel or the file is wrong."""
    parser = argparse.ArgumentParser(description="Write the fingerprints that judge kernels on every machine.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the stored ones are wrong")
    check = parser.parse_args().check
    engine = native.engine_version()
    if platform.machine() not in ("x86_64", "AMD64") or not engine.is_pinned:
        sys.exit(f"this needs x86-64 and the pinned engine, not {platform.machine()} and {engine}")
    text = HEADER + "".join(entries()) + ALONE + "".join(alone()) + "}\n"
    text += '"""The hash of all bytes for formats without a kernel, made of float32."""\n'
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--stdin-filename", str(FILE), "-"]
    text = subprocess.run(ruff, cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout
    if not check:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        print(f"{FILE.name} is not what this machine makes; run scripts/probe_hashes.py", file=sys.stderr)
        return 1
    return 0


def entries() -> list[str]:
    """One line for each format, kind of source, and use of importances."""
    made = []
    for type_ in filter(has_kernel, GGMLType):
        for source in ("F32", "F16", "BF16"):
            for weighted in (False, True):
                if type_ in (IGNORES_IMATRIX if weighted else ABORTS_WITHOUT_IMATRIX):
                    continue
                name = hash_name(type_, source, weighted)
                made.append(f'    "{name}": ProbeHashes({", ".join(map(repr, hashes(type_, source, weighted)))}),\n')
                print(name, file=sys.stderr)
    return made


def alone() -> list[str]:
    """One line for each format that only ggml makes."""
    made = []
    for type_ in GGMLType:
        if type_.is_quantized and type_ in WRITABLE_TYPES and not has_kernel(type_):
            weights = probe(type_, "F32")
            blocks = np.zeros((len(weights), type_.row_bytes(weights.shape[1])), np.uint8)
            quantizing.quantize_chunk(type_, weights, blocks)
            made.append(f'    "{type_.name}": "{fingerprint(blocks)}",\n')
    return made


def hashes(type_: GGMLType, source: str, weighted: bool) -> tuple[str, str]:
    """The two fingerprints. Exits where this machine's kernel has other bytes than ggml."""
    weights, imatrix = probe(type_, source), probe_importances() if weighted else None
    ours, theirs = (np.zeros((len(weights), type_.row_bytes(weights.shape[1])), np.uint8) for _ in range(2))
    odd = trust.compile_format(type_, source, weighted).call(weights, ours, imatrix)
    quantizing.quantize_chunk(type_, trust.widened(weights), theirs, imatrix)
    found = fingerprint(theirs, odd)
    if fingerprint(ours, odd) != found:
        sys.exit(f"{hash_name(type_, source, weighted)}: the kernel's bytes are not ggml's")
    return fingerprint(theirs), found


if __name__ == "__main__":
    raise SystemExit(main())
