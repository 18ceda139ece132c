"""What a forward pass says that it reads is what it reads, in that order; so it can be read ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.checkpoint.opening import open_checkpoint
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.merge import forward
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.pass_reads import Step
from ggufmoe.weights.source_tensor import SourceTensor
from tests.families.tiny_family import config_json, make_checkpoint

Reads = list[tuple[str, int]]


class Noted:
    """A tensor that notes from which row on it is read."""

    def __init__(self, tensor: SourceTensor, reads: Reads) -> None:
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape
        self._tensor, self._reads = tensor, reads

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        self._reads.append((self.name, start))
        self._tensor.read_rows(start, stop, out)


class NotedModel:
    def __init__(self, config: ModelConfig, tensors: dict[str, SourceTensor]) -> None:
        self.reads: Reads = []
        self.config = config
        self.tensors = MappingProxyType({name: Noted(one, self.reads) for name, one in tensors.items()})


def said(steps: Iterator[Step]) -> Reads:
    return [
        (tensor.name, start)
        for step in steps
        for start in range(0, step[0].shape[0] if len(step[0].shape) > 1 else 1, forward.tile_rows(step[0]))
        for tensor in step
    ]


@pytest.fixture(params=["qwen2", "qwen3"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NotedModel]:
    """With biases, and with norms of queries and keys."""
    config = config_json(request.param.title() + "ForCausalLM", request.param)
    with open_checkpoint(make_checkpoint(tmp_path / "model", config)) as model:
        yield NotedModel(model.config, dict(model.tensors))


def test_a_pass_reads_its_steps(dense: NotedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TILE_BYTES", 100 * 4 * dense.config.n_embd)
    one = ForwardPass(dense, threads=1)
    one.embed([1])
    dense.reads.clear()
    states = list(one.layers([[1, 2, 3]]))
    embedding = dense.reads[:3]
    assert {name for name, _ in embedding} == {"model.embed_tokens.weight"}
    assert dense.reads[3:] == said(one.steps())
    assert any(start for _, start in dense.reads), "every tensor was one tile"
    dense.reads.clear()
    one.losses(states[-1].input, np.array([1, 2, 3]))
    assert sorted(dense.reads) == sorted(said(one.loss_steps()))


def test_experts_and_shared_experts_read_their_steps(tmp_path: Path) -> None:
    keys = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    config = config_json("Qwen2MoeForCausalLM", "qwen2_moe", shared_expert_intermediate_size=768, **keys)
    with open_checkpoint(make_checkpoint(tmp_path / "model", config)) as model:
        noted = NotedModel(model.config, dict(model.tensors))
        one = ForwardPass(noted, threads=1)
        states = np.ones((2, model.config.n_embd), np.float32)
        one.expert_output(1, 2, states)
        one.shared_output(1, states)
        assert noted.reads == [*said(one.expert_steps(1, 2)), *said(one.shared_steps(1))]
        assert len(noted.reads) > 6
