"""The tiny model with a known answer: the same bytes everywhere, wide margins, and every part of it matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.engine import Engine
from ggufmoe.evaluation.probe import PROBE_ANSWER, PROBE_PROMPT, probe_answer, write_probe_model
from ggufmoe.gguf.header import read_header
from ggufmoe.native import graph_tensors
from ggufmoe.options import ContextOptions, OffloadOptions, SamplingOptions
from ggufmoe.runtime.events import Token

ON_CPU = OffloadOptions(n_gpu_layers=0)
TEXT = [*PROBE_PROMPT, *PROBE_ANSWER]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_probe_model(tmp_path_factory.mktemp("probe") / "probe.gguf")


def answer(path: Path, offload: OffloadOptions = ON_CPU, **context: object) -> tuple[int, ...]:
    options = ContextOptions(**{"n_ctx": 256, "n_threads": 1, **context})  # type: ignore[arg-type]
    with Engine(path, options, offload) as engine:
        sampling = SamplingOptions(temperature=0.0, repeat_penalty=1.0, n_predict=len(PROBE_ANSWER))
        return tuple(event.token_id for event in engine.generate(PROBE_PROMPT, sampling) if isinstance(event, Token))


def test_it_says_what_is_stored() -> None:
    assert probe_answer(ON_CPU) == PROBE_ANSWER
    assert len(set(TEXT)) == len(TEXT) == 28


def test_its_bytes_are_the_same_everywhere(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "9201ead1bd88445aa3de983994428c8ea6b99239e30af6f0e7c05b0af500aa41"
    assert path.stat().st_size < 1_300_000


@pytest.mark.parametrize(
    ("offload", "context"),
    [
        (ON_CPU, {"flash_attn": "off"}),
        (ON_CPU, {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}),
        (ON_CPU, {"n_batch": 3, "n_ubatch": 3}),
        (OffloadOptions(n_gpu_layers=0, repack=False), {}),
    ],
)
def test_other_ways_to_compute_do_not_change_it(
    path: Path, offload: OffloadOptions, context: dict[str, object]
) -> None:
    assert answer(path, offload, **context) == PROBE_ANSWER


def gaps(rows: NDArray[np.float32], n_best: int) -> NDArray[np.float32]:
    """How far the ``n_best`` largest of each row are ahead of the next one."""
    ordered = np.sort(rows, axis=1)
    return np.asarray(ordered[:, -n_best] - ordered[:, -n_best - 1])


def test_margins_are_wide(path: Path) -> None:
    routers: list[NDArray[np.float32]] = []

    def see(tensor: int, ask: bool) -> bool:
        wanted = graph_tensors.tensor_name(tensor).startswith(b"ffn_moe_logits-")
        if wanted and not ask:
            routers.append(graph_tensors.tensor_values(tensor).reshape(-1, 4))
        return wanted

    with Engine(path, ContextOptions(n_ctx=256, n_threads=1), ON_CPU) as engine, engine.observed(see):
        logits = engine.logits(TEXT)[len(PROBE_PROMPT) - 1 : -1]
    assert logits.argmax(axis=1).tolist() == list(PROBE_ANSWER)
    assert gaps(logits, 1).min() > 0.4 * logits.std()
    rows = np.concatenate(routers)
    assert len(rows) == 2 * len(TEXT)
    assert gaps(rows, 2).min() > 0.4 * rows.std()


def matrices(path: Path) -> Iterator[str]:
    return (tensor.name for tensor in read_header(path).tensors if len(tensor.shape) > 1)


def without(path: Path, name: str, target: Path) -> Path:
    """The model with all bytes of one tensor zero: for quantized ones that means all weights."""
    header, data = read_header(path), bytearray(path.read_bytes())
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    begin = header.data_offset + tensor.offset
    data[begin : begin + tensor.n_bytes] = bytes(tensor.n_bytes)
    target.write_bytes(data)
    return target


def test_every_matrix_has_a_part_in_it(path: Path, tmp_path: Path) -> None:
    names: Sequence[str] = list(matrices(path))
    unchanged = [name for name in names if answer(without(path, name, tmp_path / "m.gguf")) == PROBE_ANSWER]
    assert len(names) == 18
    assert unchanged == []
