"""Threads of ggml's own, as an engine without OpenMP gets them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from ggufmoe import ContextOptions, Engine, OffloadOptions, SamplingOptions
from ggufmoe.evaluation.probe import PROBE_ANSWER, PROBE_PROMPT, write_probe_model
from ggufmoe.native import library as native
from ggufmoe.native import threadpool
from ggufmoe.native.threadpool import ThreadPool, thread_pool
from ggufmoe.runtime.events import Token


def test_the_parameters_are_laid_out_as_ggml_writes_them() -> None:
    params = threadpool._Params(n_threads=99, prio=99, poll=99, strict_cpu=True, paused=True)
    params.cpumask[:] = [True] * len(params.cpumask)
    native.library().ggml_threadpool_params_init(ctypes.addressof(params), 3)
    assert (params.n_threads, params.prio, params.poll, params.strict_cpu, params.paused) == (3, 0, 50, False, False)
    assert not any(params.cpumask)


def test_openmp_keeps_its_threads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threadpool, "cpu_has", lambda feature: feature == "OPENMP")
    assert thread_pool(4) is None
    monkeypatch.setattr(threadpool, "cpu_has", lambda _: False)
    assert thread_pool(1) is None
    pool = thread_pool(2)
    assert pool is not None
    pool.free()
    pool.free()


def test_a_context_computes_with_them_and_they_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threadpool, "cpu_has", lambda _: False)
    said: list[tuple[str, ThreadPool]] = []
    for name in ("attach", "free"):
        real = getattr(ThreadPool, name)

        def noted(self: ThreadPool, *context: object, name: str = name, real: object = real) -> None:
            said.append((name, self))
            real(self, *context)  # type: ignore[operator]

        monkeypatch.setattr(ThreadPool, name, noted)
    model = tmp_path / "probe.gguf"
    write_probe_model(model)
    context = ContextOptions(n_ctx=256, n_threads=2)
    with Engine(model, context, OffloadOptions(device="none")) as engine:
        for _ in range(2):
            sampling = SamplingOptions(temperature=0, repeat_penalty=1, n_predict=len(PROBE_ANSWER))
            events = list(engine.generate(PROBE_PROMPT, sampling))
            assert tuple(event.token_id for event in events if isinstance(event, Token)) == PROBE_ANSWER
            engine.set_context(context)
    pools = [pool for name, pool in said if name == "attach"]
    assert len(set(map(id, pools))) == 3
    assert [name for name, _ in said] == ["attach", "free"] * 3
