"""llama.cpp gives up in one engine: an exception of that engine, while the process and its other engines go on.

Each scenario runs in a process of its own, because the threads that are lost stay until its end. The checks of a header
are switched off there, so that llama.cpp gets files that it cannot take.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import Engine, EngineLostError, OffloadOptions
from ggufmoe.placement import footprint
from ggufmoe.remote import process
from tests.remote.workers import start_worker
from tests.scripted import Scripted

FOLLOWS = {"a": "b", "b": "a"}
NEGATIVE_EPSILON = {"llama.attention.layer_norm_rms_epsilon": -1.0}
MANY_USED = {"llama.expert_used_count": np.uint32(3)}

_PREFACE = """
import ctypes, sys, threading
from pathlib import Path
import ggufmoe.placement.footprint, ggufmoe.runtime.loading
from ggufmoe import ContextOptions, Engine, EngineError, EngineLostError
from ggufmoe.native import library
from ggufmoe.runtime.local import LocalEngine

for module in (ggufmoe.placement.footprint, ggufmoe.runtime.loading):
    module.check_loadable = lambda model: None
good, bad = map(Path, sys.argv[1:])
options = ContextOptions(n_ctx=256, n_threads=2)

def lost(call):
    try:
        call()
    except EngineLostError as error:
        line = str(error).replace(str(bad), "BAD").replace(str(good), "GOOD")
        sys.stdout.write(line + "\\n")  # in one piece: several threads write here
        return
    raise AssertionError("not lost")

def answer(engine):
    return len(list(engine.generate(engine.tokenize("a"))))

def throw(engine):  # a character that the vocabulary of a file of without_bytes cannot spell
    tokens, vocab = (ctypes.c_int32 * 8)(), ctypes.c_void_p(engine._runner._vocabulary.handle)
    library.library().llama_tokenize(vocab, b"\\xc3\\xa9", 2, tokens, 8, False, False)

INT, POINTER = ctypes.c_int, ctypes.c_void_p
WORK = ctypes.CFUNCTYPE(None, POINTER, POINTER, INT, INT, POINTER)  # ggml_custom1_op_t

class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))

def compute_in_two_threads(work):  # ggml's CPU backend computes a graph whose one operation is work
    def call(name, restype, *arguments):
        values = [POINTER(value) if isinstance(value, int) else value for value in arguments]
        return ctypes.CFUNCTYPE(restype, *map(type, values))((name, library.library()))(*values)

    context = call("ggml_init", POINTER, InitParams(2**20, None, False))
    source = call("ggml_new_tensor_1d", POINTER, context, INT(0), ctypes.c_int64(4))
    result = call("ggml_map_custom1", POINTER, context, source, work, INT(2), POINTER())
    graph = call("ggml_new_graph", POINTER, context)
    call("ggml_build_forward_expand", None, graph, result)
    backend = call("ggml_backend_init_by_type", POINTER, INT(0), POINTER())
    set_n_threads = library.backend_function("CPU", "ggml_backend_set_n_threads")
    ctypes.CFUNCTYPE(None, POINTER, INT)(set_n_threads)(backend, 2)
    assert call("ggml_backend_graph_compute", INT, backend, graph) == 0
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return Scripted(FOLLOWS).write(tmp_path / "good.gguf")


def run_script(good: Path, bad: Path, script: str) -> subprocess.CompletedProcess[str]:
    code = _PREFACE + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code, str(good), str(bad)], capture_output=True, text=True, timeout=200, check=False
    )


def test_a_load_that_llama_cpp_gives_up_is_an_error_and_others_load(tmp_path: Path, good: Path) -> None:
    bad = Scripted(FOLLOWS, metadata=MANY_USED).write(tmp_path / "bad.gguf")
    ended = run_script(
        good,
        bad,
        """
        with Engine(good, options) as before:
            lost(lambda: Engine(bad, options))
            lost(lambda: Engine(bad, options))
            with Engine(good, options) as after:
                print(answer(before), answer(after))
        """,
    )
    said = "GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed"
    line = f"BAD: llama.cpp has given up: {said}; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line, line, "256 256"], "")


def test_an_answer_that_llama_cpp_gives_up_fails_for_all_who_wait(tmp_path: Path, good: Path) -> None:
    bad = Scripted(FOLLOWS, metadata=NEGATIVE_EPSILON).write(tmp_path / "bad.gguf")
    ended = run_script(
        good,
        bad,
        """
        other, engine = Engine(good, options), Engine(bad, options)
        waiting = [threading.Thread(target=lost, args=(lambda: list(engine.generate([1, 2])),)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        lost(lambda: engine.prefill([1]))
        lost(lambda: engine.logits([1, 2]))
        lost(engine.forget)
        print(engine.tokenize("a") == other.tokenize("a"), answer(other))
        engine.close()
        engine.close()
        try:
            engine.prefill([1])
        except EngineError as error:
            print(type(error).__name__)
        """,
    )
    line = "BAD: llama.cpp has given up: GGML_ASSERT(eps >= 0.0f) failed; this engine is lost, load the model again"
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [*[line] * 6, "True 256", "EngineError"]


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP's threads are known on Linux alone")
def test_an_abort_in_a_thread_of_ggml_is_that_of_its_engine(good: Path) -> None:
    ended = run_script(
        good,
        good,
        """
        first, second = Engine(good, options), Engine(good, options)
        leader = []

        @WORK
        def work(*_):
            if threading.get_ident() != leader[0]:
                library.library().ggml_abort(b"some.c", 7, b"no such row")

        def compute():
            leader.append(threading.get_ident())
            compute_in_two_threads(work)

        busy = threading.Event()
        waiting = threading.Thread(target=lambda: second._runner._native.call(busy.wait))
        waiting.start()
        lost(lambda: first._runner._native.call(compute))
        busy.set()
        waiting.join()
        lost(lambda: answer(first))
        print(answer(second))
        """,
    )
    line = "BAD: llama.cpp has given up: no such row; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line, line, "256"], "")


@pytest.mark.skipif(sys.platform == "win32", reason="the C++ exception ends the process there")
def test_a_cpp_exception_without_a_handler_is_one_too(tmp_path: Path, good: Path) -> None:
    ended = run_script(
        good,
        without_bytes(tmp_path / "bad.gguf"),
        """
        engine = Engine(bad, options)
        lost(lambda: engine._runner._native.call(lambda: throw(engine)))
        """,
    )
    said = "a C++ exception without a handler (St12out_of_range)"
    line = f"BAD: llama.cpp has given up: {said}; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line], "")


def without_bytes(path: Path) -> Path:
    """A SentencePiece vocabulary without byte tokens: llama.cpp throws at any other character."""
    spec = Scripted(FOLLOWS)
    vocab = [text.replace("<0x", "no byte ") for text in spec.vocab]
    types = [2, 3, 3, *[1] * (len(vocab) - 3)]
    metadata = {"tokenizer.ggml.tokens": vocab, "tokenizer.ggml.token_type": types}
    return Scripted(FOLLOWS, metadata=metadata).write(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the C++ exception ends the process there")
def test_an_abort_while_tokenizing_is_an_exception_of_the_engine(tmp_path: Path, good: Path) -> None:
    ended = run_script(
        good,
        without_bytes(tmp_path / "bad.gguf"),
        """
        from ggufmoe.runtime.vocabulary import LoadedVocabulary

        LoadedVocabulary._check_spellable = lambda self, text: None
        other, engine = Engine(good, options), Engine(bad, options)
        events = engine.generate([259])  # "a", which a long answer follows
        next(events)
        lost(lambda: engine.tokenize("\u00e9"))
        lost(lambda: list(events))
        lost(lambda: engine.piece(2))
        lost(lambda: engine.detokenize([2]))
        lost(lambda: engine.generate([1]))
        lost(lambda: engine.prefill([1]))
        engine.close()
        print(answer(other))
        """,
    )
    said = "a C++ exception without a handler (St12out_of_range)"
    line = f"BAD: llama.cpp has given up: {said}; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [*[line] * 6, "256"], "")


def test_after_an_abort_in_the_thread_for_texts_no_computation_begins(good: Path) -> None:
    ended = run_script(
        good,
        good,
        """
        engine = Engine(good, options)
        begun, release = threading.Event(), threading.Event()

        def compute():
            begun.set()
            release.wait()
            return engine._runner._loaded.cache.compute([259])

        running = threading.Thread(target=lambda: print(engine._runner._native.call(compute)))
        running.start()
        begun.wait()
        queued = threading.Thread(target=lost, args=(lambda: engine.prefill([1]),))
        queued.start()
        while not engine._runner._native._jobs:
            pass
        lost(lambda: engine._runner._texts.call(lambda: library.library().ggml_abort(b"some.c", 7, b"no such text")))
        queued.join()
        release.set()
        running.join()
        lost(lambda: engine.prefill([1]))
        engine.close()
        """,
    )
    line = "BAD: llama.cpp has given up: no such text; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line, line, "True", line], "")


def test_the_text_of_a_token_without_a_vocabulary_is_an_error(tmp_path: Path, good: Path) -> None:
    ended = run_script(
        good,
        Scripted(FOLLOWS, vocabulary=False).write(tmp_path / "bad.gguf"),
        """
        engine = Engine(bad, options)
        for call in (engine.token_text, engine.piece):
            try:
                call(5)
            except EngineError as error:
                print(str(error).replace(str(bad), "BAD"))
        print(engine.prefill([1]))
        """,
    )
    line = "BAD: the file has no tokenizer; convert it again with one"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line, line, "1"], "")


@pytest.mark.parametrize("offload", ["", "offload=OffloadOptions(device='none'), "])
def test_a_llama_that_llama_cpp_gives_up_is_an_exception_of_it(tmp_path: Path, good: Path, offload: str) -> None:
    bad = Scripted(FOLLOWS, metadata=NEGATIVE_EPSILON).write(tmp_path / "bad.gguf")
    ended = run_script(
        good,
        bad,
        f"""
        from ggufmoe import LlamaCpp, OffloadOptions

        llama = LlamaCpp(bad, {offload}n_ctx=256, n_threads=1, verbose=False)
        tokens = llama.tokenize(b"a")
        lost(lambda: llama.eval(tokens))
        lost(lambda: llama("a", max_tokens=2))
        lost(lambda: llama.tokenize(b"a"))
        llama.close()
        del llama
        print(len(LlamaCpp(good, n_ctx=256, n_threads=1, verbose=False)("a", max_tokens=2)["choices"]))
        """,
    )
    line = "BAD: llama.cpp has given up: GGML_ASSERT(eps >= 0.0f) failed; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line, line, line, "1"], "")


def test_a_llama_that_is_lost_while_it_loads_gives_the_outputs_back(tmp_path: Path, good: Path) -> None:
    ended = run_script(
        good,
        Scripted(FOLLOWS, metadata=MANY_USED).write(tmp_path / "bad.gguf"),
        """
        from ggufmoe import LlamaCpp

        lost(lambda: LlamaCpp(bad, n_ctx=256, verbose=False))
        print("on stderr", file=sys.stderr)
        print(answer(Engine(good, options)))
        """,
    )
    said = "GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed"
    line = f"BAD: llama.cpp has given up: {said}; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [line, "256"], "on stderr\n")


def test_an_abort_in_a_thread_of_the_app_ends_it_with_one_line(good: Path) -> None:
    ended = run_script(
        good,
        good,
        """
        engine = Engine(good, options)
        library.library().ggml_abort(b"some.c", 7, b"no such row")
        """,
    )
    assert (ended.returncode, ended.stderr) == (-6, "llama.cpp ends this process: no such row\n")


@pytest.mark.skipif(sys.platform == "win32", reason="the C++ exception ends the process there without a line")
def test_a_cpp_exception_in_a_thread_of_the_app_ends_it_with_one_line(tmp_path: Path, good: Path) -> None:
    ended = run_script(good, without_bytes(tmp_path / "bad.gguf"), "throw(Engine(bad, options))")
    said = "a C++ exception without a handler (St12out_of_range) ends this process\n"
    assert (ended.returncode, ended.stderr) == (-6, said)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGBUS")
def test_a_file_that_becomes_shorter_is_said_by_the_command_line(good: Path) -> None:
    ended = run_script(
        good,
        good,
        """
        import os
        import ggufmoe.cli.run
        from ggufmoe.cli.app import main

        original = LocalEngine.generate

        def generate(self, *arguments, **keywords):
            os.truncate(good, 4096)
            return original(self, *arguments, **keywords)

        LocalEngine.generate = generate
        main(["run", str(good), "a", "--raw", "-n", "2", "--quiet"])
        """,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith("error: a file became shorter, or its disk failed, while it was in")


def test_the_command_line_says_it_in_one_line(tmp_path: Path, good: Path) -> None:
    bad = Scripted(FOLLOWS, metadata=NEGATIVE_EPSILON).write(tmp_path / "bad.gguf")
    ended = run_script(
        good,
        bad,
        """
        from ggufmoe.cli.app import main

        main(["run", str(bad), "a", "--raw", "-n", "2"])
        """,
    )
    said = "llama.cpp has given up: GGML_ASSERT(eps >= 0.0f) failed; this engine is lost, load the model again"
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == f"error: {bad}: {said}"


def test_a_child_process_that_llama_cpp_ends_is_a_lost_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Scripted(FOLLOWS, metadata=NEGATIVE_EPSILON).write(tmp_path / "bad.gguf")
    switch_off = (
        "import ggufmoe.runtime.loading as loading, ggufmoe.placement.footprint as footprint; "
        "loading.check_loadable = footprint.check_loadable = lambda model: None; run_task("
    )
    monkeypatch.setattr(footprint, "check_loadable", lambda model: None)
    monkeypatch.setattr(process, "_CODE", process._CODE.replace("run_task(", switch_off))
    with start_worker() as worker, Engine(bad, offload=OffloadOptions(rpc=worker.endpoint, n_gpu_layers=0)) as engine:
        said = r"given up: GGML_ASSERT\(eps >= 0.0f\) failed .*; this engine is lost, load the model again"
        with pytest.raises(EngineLostError, match=said):
            list(engine.generate([1, 2]))
        with pytest.raises(EngineLostError, match=said):
            engine.prefill([1])
