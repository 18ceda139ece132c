"""The words of llama.cpp that decisions depend on, held against what the installed engine says."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ggufmoe import ContextOptions, Engine, ModelLoadError, OffloadOptions
from ggufmoe.evaluation.probe import write_probe_model
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import backends, rpc_calls, wording
from ggufmoe.native import library as native
from ggufmoe.placement.devices import repacked_types
from ggufmoe.runtime.bindings import native_log

EVERY_LINE = re.compile("")
CONTEXT = ContextOptions(n_ctx=256, n_threads=1)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of two layers, whose matrices are Q4_K and Q6_K."""
    return write_probe_model(tmp_path_factory.mktemp("wording") / "probe.gguf")


@pytest.fixture(scope="module")
def lines(probe: Path) -> list[str]:
    """All that the engine logs while it loads a model of which some experts are named for the CPU."""
    offload = OffloadOptions(device="none", override_tensor=("blk.1.ffn_up_exps=CPU",))
    with native_log().collecting(EVERY_LINE) as said, Engine(probe, CONTEXT, offload):
        return list(said)


def test_buffers_are_told_with_their_sizes(lines: list[str], probe: Path) -> None:
    buffers = [buffer for line in lines if (buffer := wording.buffer_size(line)) is not None]
    assert {buffer.content for buffer in buffers} == {"model", "KV", "compute"}
    sizes = {buffer.name: buffer.n_bytes for buffer in buffers if buffer.content == "model"}
    assert sizes[wording.mapped_buffer("CPU")] == pytest.approx(probe.stat().st_size, rel=0.05)
    assert (wording.repack_buffer("CPU") in sizes) is (GGMLType.Q4_K in repacked_types())
    assert [wording.is_repack_buffer(name) for name in sizes] == [name == "CPU_REPACK" for name in sizes]


def test_tensors_that_are_overridden_are_told(lines: list[str]) -> None:
    moved = [found for line in lines if (found := wording.overridden_tensor(line)) is not None]
    buffer = wording.repack_buffer("CPU") if GGMLType.Q4_K in repacked_types() else "CPU"
    assert moved == [("blk.1.ffn_up_exps.weight", buffer)]


def test_the_lines_that_are_read_are_kept(lines: list[str]) -> None:
    readers = (wording.buffer_size, wording.overridden_tensor, wording.offloaded_layers)
    read = [line for line in lines if any(reader(line) is not None for reader in readers)]
    kept = [line for line in lines if wording.PLACEMENT_LINES.search(line)]
    assert set(read) <= set(kept)
    assert len(read) >= 4


def phrases() -> bytes:
    """The bytes of libllama and of the libraries beside it, which hold what it can say."""
    folder = Path(native.library()._name).parent
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink())


def test_what_only_gpus_and_workers_make_it_say_is_in_the_library() -> None:
    said = phrases()
    assert b"%s: offloaded %d/%d layers to GPU" in said
    assert wording.offloaded_layers("load_tensors: offloaded 3/33 layers to GPU") == 3
    assert b"unable to allocate %s buffer" in said
    assert wording.lacks_pinned_memory("error loading model: unable to allocate CUDA_Host buffer")
    assert not wording.lacks_pinned_memory("error loading model: unable to allocate CUDA0 buffer")
    if rpc_calls.has_rpc():
        assert b"Remote RPC server crashed or returned malformed response" in said
    assert wording.is_worker_abort("Remote RPC server crashed or returned malformed response")


def test_nodes_of_graphs_bear_the_names_that_are_looked_for() -> None:
    said = phrases()
    for step in wording.ROUTING_NODES:
        assert f"\0ffn_moe_{step}\0".encode() in said
        assert wording.routing_node(f"ffn_moe_{step}-31".encode()) == (step, 31)
    assert [wording.routing_node(name) for name in (b"ffn_moe_gate-0", b"ffn_moe_topk", b"l_out-3")] == [None] * 3
    assert b"\0%s#%s#%d\0" in said
    assert wording.weight_of_copy("CUDA0#blk.0.attn_k.weight#0") == "blk.0.attn_k.weight"
    assert wording.weight_of_copy("blk.0.attn_k.weight") == "blk.0.attn_k.weight"


def test_backends_bear_the_names_that_are_looked_for() -> None:
    assert wording.CPU_BACKEND in {device.backend for device in backends.devices()}
    if rpc_calls.has_rpc():
        assert f"\0{wording.RPC_BACKEND}\0".encode() in phrases()


def test_the_line_before_a_vague_one_has_the_cause(probe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(probe.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    mark = native_log().mark()
    with pytest.raises(ModelLoadError, match=r"tensor 'blk\.1\.attn_q\.weight' not found"):
        Engine(broken, CONTEXT, OffloadOptions(device="none"))
    errors = [line.text for line in native_log().since(mark) if line.level >= logging.ERROR]
    assert [wording.is_vague(error) for error in errors] == [False, True]
    assert wording.without_function(errors[0]).startswith("error loading model: check_tensor_dims")


def last_words(code: str) -> tuple[int, list[str]]:
    """Exit code and stderr of a Python process that runs ``code``."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stderr.splitlines()


def test_a_failed_assertion_is_found_on_stderr() -> None:
    code = (
        "import numpy as np\n"
        "from ggufmoe.gguf.types import GGMLType\n"
        "from ggufmoe.native import quantizing\n"
        "quantizing.quantize_chunk(GGMLType.IQ2_XXS, np.ones((1, 256), np.float32), np.zeros((1, 66), np.uint8))"
    )
    code_of_exit, said = last_words(code)
    assert code_of_exit != 0
    (message,) = filter(None, map(wording.abort_message, said))
    assert message == "GGML_ASSERT(imatrix != NULL) failed"
    assert not wording.is_worker_abort(message)


def test_a_worker_that_is_not_there_is_found_on_stderr() -> None:
    if not rpc_calls.has_rpc():
        pytest.fail("the tests need an engine that was built with RPC")
    code_of_exit, said = last_words(
        "from ggufmoe.native import rpc_calls; rpc_calls.register_rpc_server('127.0.0.1:1')"
    )
    assert code_of_exit != 0
    (message,) = filter(None, map(wording.abort_message, said))
    assert message.startswith("Failed to connect to 127.0.0.1:1")
    assert wording.is_worker_abort(message)


@pytest.mark.parametrize(
    "line", ["Traceback (most recent call last):", '  File "x.py", line 3', "load_tensors: CPU: 12 MiB", ""]
)
def test_other_lines_are_no_aborts(line: str) -> None:
    assert wording.abort_message(line) == ""
