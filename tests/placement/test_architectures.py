"""Plans held against libllama's own report, for small random models of many architectures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from ggufmoe import ContextOptions, Engine, OffloadOptions, SamplingOptions
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.wording import SIZE_STEP_BYTES
from ggufmoe.runtime.events import Token
from tests.architecture_files import fixtures, write_architecture
from tests.placement.test_load_report import wait_for, worker

PLAIN = ContextOptions(n_ctx=1024, n_threads=1, n_ubatch=64)
CONTEXTS = {
    "plain": PLAIN,
    "swa-full": replace(PLAIN, swa_full=True),
    "no-flash-attention": replace(PLAIN, flash_attn="off"),
    "several-texts": replace(PLAIN, n_seq_max=3, n_ctx=1000),
    "several-answers": replace(PLAIN, n_parallel=3),
    "quantized": replace(PLAIN, cache_type_k="q8_0", cache_type_v="q8_0", flash_attn="on"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("architectures")
    return {
        (name, kind): write_architecture(folder / f"{name}-{kind}.gguf", name, kind=GGMLType[kind])
        for name in fixtures()
        for kind in ("F32", "Q4_0")
    }


@pytest.mark.parametrize("name", fixtures())
@pytest.mark.parametrize("case", CONTEXTS)
def test_what_layers_keep_is_what_libllama_allocates(
    name: str, case: str, paths: dict[tuple[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    offload = OffloadOptions(load_mode="none", device="none")
    with caplog.at_level(logging.WARNING, "ggufmoe"), Engine(paths[name, "F32"], CONTEXTS[case], offload) as engine:
        placement = engine.placement
    assert placement.plan.is_kv_exact
    assert placement.differences == ()
    assert not [record for record in caplog.records if "not placed as planned" in record.message]
    reported = sum(placement.report.kv_bytes.values())
    assert abs(placement.plan.host.kv_bytes - reported) <= 3 * SIZE_STEP_BYTES


@pytest.mark.parametrize("mode", ["none", "mmap"])
@pytest.mark.parametrize("name", fixtures())
def test_weights_are_where_libllama_puts_them(
    name: str, mode: Literal["none", "mmap"], paths: dict[tuple[str, str], Path]
) -> None:
    """Quantized ones are rearranged by the CPU's backend, but for those of three dimensions that are no experts."""
    offload = OffloadOptions(load_mode=mode, device="none")
    with Engine(paths[name, "Q4_0"], PLAIN, offload) as engine:
        placement = engine.placement
    planned = {buffer.name: buffer.n_bytes for buffer in placement.plan.host.buffers}
    assert planned == pytest.approx(dict(placement.report.weight_bytes), abs=2 * SIZE_STEP_BYTES)
    assert placement.differences == ()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with worker() as served:
        wait_for(served)
        yield served


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "deepseek2-v3", "lfm2moe", "qwen3next"])
def test_devices_get_what_was_planned_and_answers_stay(
    name: str, paths: dict[tuple[str, str], Path], endpoint: str
) -> None:
    path, prompt = paths[name, "F32"], [3 + 7 * i % 300 for i in range(400)]
    changed = [*prompt[:200], *prompt[210:]]
    with Engine(path, PLAIN, OffloadOptions(load_mode="none", device="none")) as engine:
        expected = [engine.logits(text)[-1].argmax() for text in (prompt, changed)]
    for offload in (
        OffloadOptions(rpc=endpoint, n_gpu_layers=99),
        OffloadOptions(rpc=endpoint, n_gpu_layers=2),
        OffloadOptions(rpc=endpoint, n_gpu_layers=99, kv_offload=False),
    ):
        with Engine(path, PLAIN, offload) as engine:
            assert engine.placement.differences == ()
            # the second text needs an earlier part of the first, the third one the end of the first
            found = [_next_token(engine, text) for text in (prompt, changed, prompt)]
        assert found == [*expected, expected[0]]


def _next_token(engine: Engine, text: list[int]) -> int:
    settings = SamplingOptions(temperature=0.0, n_predict=1, logit_bias=("2-inf",))
    return next(event.token_id for event in engine.generate(text, settings) if isinstance(event, Token))
