"""``LlamaCpp``: a ``Llama`` with our placement and a way to stop it. Placements on a remote device run in a child."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe import (
    Cancelled,
    ContextOptions,
    Engine,
    EngineError,
    GGUFError,
    LlamaCpp,
    ModelLoadError,
    OffloadOptions,
    OptionError,
    SamplingOptions,
)
from tests.interrupts import interrupted_after
from tests.placement.test_load_report import ROOT, Outcomes, wait_for, worker
from tests.scripted import Scripted

SMALL: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
CPU = OffloadOptions(device="none")
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}[assistant]"
LONG = " on" * 600


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llamacpp") / "m.gguf"
    ggufmoe.convert(tiny_checkpoint(n_layer=4, n_ff=2048), path, quant="Q4_K_M", threads=1)
    return path


@pytest.fixture(scope="module")
def story(write_model: Callable[[Scripted], Path]) -> Iterator[Any]:
    follows = {" once": " upon", " upon": " a", " a": " time", " on": " on", "[assistant]": " once"}
    path = write_model(Scripted(follows, pieces=("[user]",), chat_template=TEMPLATE, n_ctx_train=2048))
    llama = LlamaCpp(path, offload=CPU, **{**SMALL, "n_ctx": 2048})
    yield llama
    llama.close()


# ---- placement


@pytest.fixture(scope="module")
def outcomes(model: Path) -> Outcomes:
    with worker() as endpoint:
        wait_for(endpoint)
        command = [sys.executable, "-m", "tests.runtime.llamacpp_child", str(model), endpoint]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: Outcomes = json.loads(done.stdout)
    return found


CASES = ("cpu", "cpu_moe", "n_cpu_moe", "ot", "one_expert")


@pytest.mark.parametrize("case", CASES)
def test_libllama_reports_what_was_planned(case: str, outcomes: Outcomes) -> None:
    assert outcomes[case]["differences"] == []
    plan, report = outcomes[case]["plan"], outcomes[case]["report"]
    planned = {buffer["name"]: buffer["n_bytes"] for share in plan["shares"] for buffer in share["buffers"]}
    assert planned == pytest.approx(report["weight_bytes"], rel=0.01, abs=8192)
    assert report["n_layers_offloaded"] == plan["n_gpu_layers"]


def test_experts_go_where_the_options_send_them(outcomes: Outcomes) -> None:
    overridden = {case: set(outcomes[case]["report"]["overridden"]) for case in CASES}
    assert overridden["cpu"] == set()
    assert len(overridden["cpu_moe"]) == 12
    assert {name.split(".")[1] for name in overridden["n_cpu_moe"]} == {"0", "1", "2"}
    assert {name for name in overridden["ot"] if "ffn_up_exps" in name} == {"blk.0.ffn_up_exps.weight"}
    assert outcomes["n_cpu_moe"]["report"]["kv_bytes"].keys() == {"CPU"}


@pytest.mark.parametrize("case", [case for case in CASES if case != "one_expert"])
def test_the_text_is_that_of_the_engine(case: str, outcomes: Outcomes) -> None:
    assert outcomes[case]["text"] == outcomes["engine"]["text"] != ""


def test_fewer_experts_are_used(outcomes: Outcomes) -> None:
    assert outcomes["one_expert"]["plan"]["n_expert_used"] == 1
    assert outcomes["one_expert"]["text"] != outcomes["engine"]["text"]
    assert outcomes["one_expert"]["kv_overrides"] == {"llama.rope.freq_base": 10000.0}


def test_remote_devices_are_not_used_unless_they_are_named(outcomes: Outcomes) -> None:
    assert outcomes["as_llama"]["placement"] is None
    assert outcomes["as_llama"]["n_devices"] == 0


def test_the_memory_of_the_plan_is_that_of_its_context(model: Path) -> None:
    llama: Any = LlamaCpp(model, offload=CPU, **{**SMALL, "n_ctx": 0}, type_k=8, flash_attn=True)
    try:
        plan = llama.placement.plan
        assert plan.n_ctx == llama.n_ctx() == 2048
        assert llama.placement.differences == ()
    finally:
        llama.close()


# ---- it is a Llama


def test_it_is_a_llama() -> None:
    from llama_cpp import Llama

    assert issubclass(LlamaCpp, Llama)
    assert LlamaCpp.__name__ == "LlamaCpp"


def test_completions_and_chats_are_made(story: Any) -> None:
    done = story.create_completion(" once", max_tokens=8, temperature=0)
    assert done["choices"][0] == {"text": " upon a time", "index": 0, "logprobs": None, "finish_reason": "stop"}
    said = story.create_chat_completion([{"role": "user", "content": " dice"}], temperature=0, max_tokens=8)
    assert said["choices"][0]["message"] == {"role": "assistant", "content": " once upon a time"}
    stream = story.create_completion(" on", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == " on" * 5


def test_without_offload_the_arguments_are_llamas(model: Path) -> None:
    llama = LlamaCpp(str(model), n_gpu_layers=0, use_mmap=False, **SMALL)
    try:
        assert llama.placement is None
        assert llama.model_params.load_mode == 0
        with Engine(model, ContextOptions(n_ctx=256, n_threads=1), CPU) as engine:
            prompt = engine.tokenize("the model reads")
            events = list(engine.generate(prompt, SamplingOptions(temperature=0, n_predict=8)))
        done = llama.create_completion(prompt, max_tokens=8, temperature=0)
        assert done["choices"][0]["text"] == "".join(event.text for event in events)
    finally:
        llama.close()


def test_one_can_be_pickled(model: Path) -> None:
    llama: Any = LlamaCpp(model, offload=OffloadOptions(device="none", n_expert_used=1, load_mode="none"), **SMALL)
    copy = pickle.loads(pickle.dumps(llama))
    try:
        assert copy.placement.plan == llama.placement.plan
    finally:
        llama.close()
        copy.close()


def test_its_log_goes_to_logging(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ggufmoe.llama"):
        LlamaCpp(model, offload=CPU, **SMALL).close()
    assert any("model buffer size" in record.message for record in caplog.records)


def test_it_takes_the_place_of_llama(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    base, ours = llama_cpp.Llama, LlamaCpp
    monkeypatch.setattr(llama_cpp, "Llama", ours)
    llama: Any = llama_cpp.Llama(str(model), **SMALL)
    try:
        assert isinstance(llama, base)
        assert ggufmoe.LlamaCpp is ours
    finally:
        llama.close()


def test_arguments_of_former_versions_are_left_out(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ggufmoe"):
        LlamaCpp(model, n_parts=-1, f16_kv=True, **SMALL).close()
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        f"{model}: left out f16_kv, n_parts, which llama.cpp no longer has"
    ]


# ---- turns


def test_calls_of_many_threads_are_those_of_one(story: Any) -> None:
    def asked(n: int) -> Any:
        return story.create_completion(" on" * (1 + n % 5) + " once", max_tokens=8, temperature=0)["choices"]

    alone = [asked(n) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(asked, range(24))) == alone


def test_a_stream_has_its_turn_until_it_ends(story: Any) -> None:
    stream = story.create_completion(" once", max_tokens=8, temperature=0, stream=True)
    text = next(stream)["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(story.create_completion, " on", max_tokens=2, temperature=0)
        text += "".join(part["choices"][0]["text"] for part in stream)
        assert (text, other.result()["choices"][0]["text"]) == (" upon a time", " on on")


def test_a_stream_that_is_left_holds_up_nobody(story: Any) -> None:
    for leave in (lambda stream: stream.close(), lambda stream: None):
        leave(story.create_completion(" on", max_tokens=50, stream=True))
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(story.create_completion, " on", max_tokens=2, temperature=0).result()
        assert done["choices"][0]["text"] == " on on"


def test_a_second_call_of_the_reader_ends_the_stream(story: Any) -> None:
    stream = story.create_completion(" on", max_tokens=50, temperature=0, stream=True)
    next(stream)
    assert story.create_completion(" once", max_tokens=8, temperature=0)["choices"][0]["text"] == " upon a time"
    with pytest.raises(EngineError, match="another call"):
        next(stream)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_gpu_layer": 3}, r"Llama has no argument n_gpu_layer; did you mean n_gpu_layers"),
        ({"rpc_servers": "a:1"}, r"Llama has no argument rpc_servers"),
        ({"offload": CPU, "n_gpu_layers": 1, "use_mmap": True}, r"n_gpu_layers, use_mmap: offload says"),
        ({"offload": CPU, "offload_kqv": False}, r"offload_kqv: offload says"),
        ({"offload": CPU, "vocab_only": True}, r"vocab_only loads no weights"),
        ({"offload": OffloadOptions(rpc="127.0.0.1:50052")}, r"with offload.rpc, use ggufmoe.Engine"),
        ({"offload": OffloadOptions(override_tensor=("ffn_upp_exps=CPU",))}, r"near names: .*ffn_up_exps"),
        ({"offload": OffloadOptions(device="CUDA7")}, r"--device CUDA7: there is no such device"),
        (
            {"offload": OffloadOptions(n_expert_used=1), "kv_overrides": {"llama.expert_used_count": 2}},
            r"kv_overrides: llama.expert_used_count is what offload.n_expert_used says",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_loading(model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LlamaCpp(model, **SMALL, **arguments)
    gc.collect()


def test_a_corrupt_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(GGUFError):
        LlamaCpp(tmp_path / "m.gguf", **SMALL)
    gc.collect()


def test_what_llama_cpp_refuses_has_its_reason(write_model: Callable[[Scripted], Path]) -> None:
    path = write_model(Scripted(arch="llama9"))
    with pytest.raises(ModelLoadError, match=r"llama.cpp cannot load it: .*llama9"):
        LlamaCpp(path, offload=CPU, **SMALL)
    gc.collect()


# ---- stopping


def cancel_soon(llama: Any) -> threading.Timer:
    timer = threading.Timer(0.3, llama.cancel)
    timer.start()
    return timer


def eval_for_a_minute(llama: Any, tokens: list[int]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        llama.reset()
        llama.eval(tokens)


def test_a_stream_is_stopped_and_the_model_goes_on(story: Any) -> None:
    stream = story.create_completion(" on", max_tokens=2000, temperature=0, stream=True)
    for _ in range(3):
        next(stream)
    story.cancel()
    with pytest.raises(Cancelled):
        next(stream)
    for prompt in (" on", " on on on"):
        again = story.create_completion(prompt, max_tokens=4, temperature=0)
        assert again["choices"][0]["text"] == " on" * 4


def test_a_prompt_is_stopped(story: Any) -> None:
    story.reset()
    tokens = story.tokenize(LONG.encode()) * 3
    timer = cancel_soon(story)
    with pytest.raises(Cancelled):
        eval_for_a_minute(story, tokens)
    timer.join()
    assert story.create_completion(" once", max_tokens=8, temperature=0)["choices"][0]["text"] == " upon a time"


def test_a_cancel_without_a_call_stops_nothing(story: Any) -> None:
    story.cancel()
    assert story.create_completion(" on", max_tokens=2, temperature=0)["choices"][0]["text"] == " on on"


def test_embedding_is_stopped(write_model: Callable[[Scripted], Path]) -> None:
    llama = LlamaCpp(write_model(Scripted({" on": " on"})), offload=CPU, embedding=True, **SMALL)
    try:
        timer = cancel_soon(llama)
        with pytest.raises(Cancelled):
            llama.embed([" on" * 200] * 100_000)
        timer.join()
        assert len(llama.embed(" on")) > 0
    finally:
        llama.close()


def test_an_error_of_llama_cpp_stays_one(story: Any) -> None:
    story.reset()
    with pytest.raises(RuntimeError, match="llama_decode returned"):
        story.eval(story.tokenize(LONG.encode()) * 4)
    story.reset()


def test_ctrl_c_stops_a_prompt_and_the_model_stays_usable(story: Any) -> None:
    tokens = story.tokenize(LONG.encode())
    with contextlib.suppress(KeyboardInterrupt), interrupted_after(0.3):
        for _ in range(100_000):
            story.reset()
            story.eval(tokens)
        pytest.fail("not stopped")
    story.reset()
    story.eval(tokens[:8])
    assert story.n_tokens == 8


def test_a_second_ctrl_c_leaves_the_model_usable(story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        is_current = False

        def call(self, function: Callable[[], object]) -> object:
            raise KeyboardInterrupt

    story.reset()
    tokens = story.tokenize(b" on")
    with monkeypatch.context() as patch:
        patch.setattr(story, "_native", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            story.eval(tokens)
    story.eval(tokens)
    assert story.n_tokens == len(tokens)


def test_calls_run_in_a_thread_of_their_own_that_ends_with_the_object(model: Path) -> None:
    def n_threads() -> int:
        return sum(thread.name == "ggufmoe-native" for thread in threading.enumerate())

    before = n_threads()
    llama = LlamaCpp(model, **SMALL)
    assert n_threads() == before + 1
    assert "Tokenize" in (llama.tokenize.__doc__ or "")
    llama.close()
    assert n_threads() == before
