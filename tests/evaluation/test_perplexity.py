"""Perplexity and divergence equal what numpy makes of an engine's logits; texts that cannot be cut are refused."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe import ContextOptions, Engine, EvaluationOptions
from ggufmoe.errors import Cancelled, ContextFullError, InputError, OptionError, TemplateError
from ggufmoe.work import Progress
from tests.scripted import Scripted

EXACT: dict[str, Any] = {"n_threads": 1, "flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
TEXT = "".join(f" w{i * i % 29}" for i in range(110))
Doubles = NDArray[np.float64]


def reference(path: Path, n_ctx: int, text: str = TEXT) -> tuple[Doubles, NDArray[np.int64]]:
    """log p of every token of the vocabulary at each scored place, and the token that follows there."""
    rows, targets = [], []
    with Engine(path, ContextOptions(n_ctx=512, **EXACT)) as engine:
        tokens = engine.tokenize(text)
        for begin in range(0, len(tokens) - n_ctx + 1, n_ctx):
            chunk = [engine.bos_token if engine.adds_bos else tokens[begin], *tokens[begin + 1 : begin + n_ctx]]
            logits = engine.logits([token for token in chunk if token is not None]).astype(np.float64)
            rows.append(logits[n_ctx // 2 : n_ctx - 1])
            targets += chunk[n_ctx // 2 + 1 :]
    logits = np.concatenate(rows)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.array(targets)


def nll_of(path: Path, n_ctx: int) -> Doubles:
    log_p, targets = reference(path, n_ctx)
    nll: Doubles = -np.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    return nll


@pytest.fixture(scope="module")
def noisy_path(write_model: Callable[[Scripted], Path]) -> Path:
    """The vocabulary of ``mixing_path`` with other logits."""
    words = [f" w{i}" for i in range(30)]
    random = np.random.default_rng(6)
    everything = Scripted(pieces=words).vocab
    follows = {piece: dict(zip(words, random.normal(0, 3, len(words)).tolist(), strict=True)) for piece in everything}
    return write_model(Scripted(follows, random_layers=True))


@pytest.mark.parametrize(
    ("n_ctx", "n_batch"),
    [(32, 64), (32, 2048), (32, 32), (33, 80), (32, 10), (32, 20)],
    ids=["two-at-once", "all-at-once", "one-by-one", "odd", "a-chunk-in-four-batches", "a-chunk-in-two-batches"],
)
def test_perplexity_is_what_numpy_makes_of_the_logits(mixing_path: Path, n_ctx: int, n_batch: int) -> None:
    result = ggufmoe.perplexity(mixing_path, TEXT, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=16, **EXACT)
    nll = nll_of(mixing_path, n_ctx)
    assert (result.n_chunks, result.total_chunks) == (111 // n_ctx, 111 // n_ctx)
    assert result.n_scored == len(nll) == result.n_chunks * (n_ctx - 1 - n_ctx // 2)
    assert result.value == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    error = np.exp(nll.mean()) * nll.std() / math.sqrt(len(nll) - 1)
    assert result.estimate.uncertainty == pytest.approx(error, rel=1e-4)
    assert result.is_complete


def test_a_model_without_bos_keeps_its_first_token(write_model: Callable[[Scripted], Path]) -> None:
    words = [f" w{i}" for i in range(30)]
    path = write_model(Scripted(pieces=words, random_layers=True, add_bos=False))
    result = ggufmoe.perplexity(path, TEXT, n_ctx=40, **EXACT)
    assert result.mean_nll.value == pytest.approx(nll_of(path, 40).mean(), rel=1e-5)


def test_the_result_so_far_comes_with_each_chunk(mixing_path: Path) -> None:
    seen: list[Progress] = []
    result = ggufmoe.perplexity(mixing_path, TEXT, n_ctx=16, n_batch=32, chunks=5, on_progress=seen.append, **EXACT)
    chunks = [step for step in seen if step.phase != "load"]
    assert [(step.phase, step.done, step.total, step.unit) for step in chunks] == [
        ("chunks", n, 5, "chunks") for n in (1, 2, 3, 4, 5)
    ]
    assert chunks[-1].result == result
    assert seen[0].phase == "load"
    assert {step.result for step in seen[: -len(chunks)]} == {None}
    so_far = chunks[0].result
    assert isinstance(so_far, ggufmoe.Perplexity)
    assert not so_far.is_complete
    first = ggufmoe.perplexity(mixing_path, TEXT, n_ctx=16, chunks=1, **EXACT)
    assert so_far.value == pytest.approx(first.value, rel=1e-6)


def test_a_model_is_no_way_from_itself(mixing_path: Path) -> None:
    result = ggufmoe.kl_divergence(mixing_path, mixing_path, TEXT, n_ctx=32, **EXACT)
    assert set(result.kl.quantiles.values()) == set(result.delta_p.quantiles.values()) == {0.0}
    assert (result.same_top.value, result.rms_delta_p.value, result.ratio.value) == (1.0, 0.0, 1.0)
    assert result.ratio.uncertainty == pytest.approx(0, abs=1e-6)
    assert result.correlation == pytest.approx(1)


@pytest.mark.parametrize("n_batch", [64, 20])
def test_divergence_is_what_numpy_makes_of_the_logits(mixing_path: Path, noisy_path: Path, n_batch: int) -> None:
    result = ggufmoe.kl_divergence(noisy_path, mixing_path, TEXT, n_ctx=32, n_batch=n_batch, **EXACT)
    (ours, targets), (base, _) = reference(noisy_path, 32), reference(mixing_path, 32)
    kl = (np.exp(base) * (base - ours)).sum(axis=1)
    p, p_base = (np.exp(np.take_along_axis(x, targets[:, None], axis=1)[:, 0]) for x in (ours, base))
    assert result.n_scored == len(kl)
    assert result.kl.mean.value == pytest.approx(kl.mean(), rel=1e-5)
    assert result.kl.mean.uncertainty == pytest.approx(kl.std() / math.sqrt(len(kl) - 1), rel=1e-4)
    assert (result.kl.median, result.kl.maximum) == pytest.approx((np.median(kl), kl.max()), rel=1e-4)
    assert result.kl.quantiles[0.99] == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert result.delta_p.mean.value == pytest.approx((p - p_base).mean(), abs=1e-7)
    assert result.rms_delta_p.value == pytest.approx(np.sqrt(((p - p_base) ** 2).mean()), rel=1e-4)
    assert result.same_top.value == (ours.argmax(axis=1) == base.argmax(axis=1)).mean()
    log_ratio = np.log(p_base) - np.log(p)
    assert result.log_ratio.value == pytest.approx(log_ratio.mean(), rel=1e-4)
    assert result.log_ratio.uncertainty == pytest.approx(log_ratio.std() / math.sqrt(len(kl) - 1), rel=1e-3)
    assert result.correlation == pytest.approx(np.corrcoef(np.log(p), np.log(p_base))[0, 1], rel=1e-3)
    alone = [ggufmoe.perplexity(path, TEXT, n_ctx=32, **EXACT) for path in (noisy_path, mixing_path)]
    assert result.perplexity.value == pytest.approx(alone[0].value, rel=1e-5)
    assert result.reference_perplexity.value == pytest.approx(alone[1].value, rel=1e-5)


def test_rounding_the_reference_moves_the_divergence_a_little(mixing_path: Path, noisy_path: Path) -> None:
    exact = ggufmoe.kl_divergence(noisy_path, mixing_path, TEXT, n_ctx=32, **EXACT)
    rounded = ggufmoe.kl_divergence(noisy_path, mixing_path, TEXT, n_ctx=32, round_reference=True, **EXACT)
    assert rounded.kl.mean.value != exact.kl.mean.value
    assert rounded.kl.mean.value == pytest.approx(exact.kl.mean.value, rel=1e-2)
    with_itself = ggufmoe.kl_divergence(mixing_path, mixing_path, TEXT, n_ctx=32, round_reference=True, **EXACT)
    assert 0 < abs(with_itself.kl.mean.value) < 1e-3


def test_vocabularies_that_differ_are_refused(
    mixing_path: Path, story_path: Path, write_model: Callable[[Scripted], Path]
) -> None:
    with pytest.raises(InputError, match=r"different vocabularies \(\d+ and \d+ tokens\)"):
        ggufmoe.kl_divergence(mixing_path, story_path, TEXT, n_ctx=32)
    words = [f" v{i}" for i in range(30)]
    with pytest.raises(InputError, match=r"token \d+ is ' w0' and ' v0'"):
        ggufmoe.kl_divergence(mixing_path, write_model(Scripted(pieces=words)), TEXT, n_ctx=32)
    words = [f" w{i}" for i in range(30)]
    with pytest.raises(InputError, match="add_bos_token is True and False"):
        ggufmoe.kl_divergence(mixing_path, write_model(Scripted(pieces=words, add_bos=False)), TEXT, n_ctx=32)


def test_a_text_that_does_not_fill_two_chunks_is_refused(mixing_path: Path) -> None:
    with pytest.raises(InputError, match="the text has 111 tokens, and two chunks of 56 need 112"):
        ggufmoe.perplexity(mixing_path, TEXT, n_ctx=56)
    exact = ggufmoe.perplexity(mixing_path, TEXT, n_ctx=55, **EXACT)
    assert exact.n_chunks == 2
    with pytest.raises(InputError, match="the text has 1 token,"):
        ggufmoe.perplexity(mixing_path, "")


def test_a_file_is_read_as_the_text_that_it_holds(mixing_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode() + b"\n")
    from_file = ggufmoe.perplexity(mixing_path, text_file=path, n_ctx=55, **EXACT)
    assert from_file.value == ggufmoe.perplexity(mixing_path, TEXT, n_ctx=55, **EXACT).value
    path.write_bytes(b"one\ntwo\nthr\xff\xfe\n")
    with pytest.raises(InputError, match=r"text\.txt:3: byte 11 is not UTF-8"):
        ggufmoe.perplexity(mixing_path, text_file=path)
    with pytest.raises(InputError, match="cannot read the text"):
        ggufmoe.perplexity(mixing_path, text_file=tmp_path / "nowhere.txt")


def test_a_str_is_a_text_and_never_a_path(mixing_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    output = tmp_path / "imatrix.gguf"
    for run in (
        partial(ggufmoe.perplexity, mixing_path),
        partial(ggufmoe.kl_divergence, mixing_path, mixing_path),
        partial(ggufmoe.imatrix, mixing_path, output),
    ):
        with pytest.raises(InputError, match="two chunks of 512 need 1024"):
            run(str(path))
        with pytest.raises(TypeError, match="give the path of a file as text_file"):
            run(path)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="give either text, the text itself, or text_file"):
            run()
        with pytest.raises(OptionError, match="give either text, the text itself, or text_file"):
            run(TEXT, text_file=path)
    assert not output.exists()


def test_impossible_options_are_refused(mixing_path: Path) -> None:
    impossible: list[dict[str, Any]] = [{"n_ctx": 7}, {"chunks": 0}, {"chunks": -2}, {"n_batch": 0}, {"size": 3}]
    for wrong in impossible:
        with pytest.raises(OptionError):
            ggufmoe.perplexity(mixing_path, TEXT, **wrong)
    assert EvaluationOptions(n_ctx=8, n_batch=4096).context.n_seq_max == 256
    context = replace(EvaluationOptions(n_ctx=700), n_batch=2048).context
    assert (context.n_batch, context.n_ctx, context.n_seq_max) == (1400, 1536, 2)


def test_a_chunk_that_the_context_cannot_hold_is_refused(mixing_path: Path) -> None:
    with Engine(mixing_path, ContextOptions(n_ctx=256, **EXACT)) as engine, pytest.raises(ContextFullError):
        next(engine.compute_chunks([[1] * 257], 0))


def test_who_cancels_gets_what_is_done(mixing_path: Path, noisy_path: Path) -> None:
    cancel = threading.Event()

    def stop(step: Progress) -> None:
        if step.phase == "chunks" and step.done == 2:
            cancel.set()

    result = ggufmoe.perplexity(mixing_path, TEXT, n_ctx=16, n_batch=16, cancel=cancel, on_progress=stop, **EXACT)
    assert (result.n_chunks, result.total_chunks, result.is_complete) == (2, 6, False)
    for run in (ggufmoe.perplexity, lambda *a, **b: ggufmoe.kl_divergence(noisy_path, *a, **b)):
        with pytest.raises(Cancelled, match="loading was stopped"):
            run(mixing_path, TEXT, n_ctx=16, cancel=cancel, **EXACT)


def test_afterwards_an_engine_generates_as_before(mixing_path: Path) -> None:
    with Engine(mixing_path, ContextOptions(n_ctx=512, n_seq_max=2, **EXACT)) as engine:
        prompt = engine.tokenize(" w1 w2 w3")
        before = engine.logits(prompt)
        parts = engine.compute_chunks([[1, 5, 7], [1, 8, 9], [1, 6, 6]], 1)
        part = next(parts)
        assert (part.group, part.scored) == (range(2), range(1, 3))
        np.testing.assert_allclose(part.logits(1), engine_logits(mixing_path, [1, 8, 9])[1:], atol=1e-4)
        parts.close()
        np.testing.assert_allclose(engine.logits(prompt), before, atol=1e-5)


def engine_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    with Engine(path, ContextOptions(n_ctx=256, **EXACT)) as engine:
        return engine.logits(tokens)


def test_what_is_known_is_plain_data(mixing_path: Path) -> None:
    options = EvaluationOptions(n_ctx=32, **EXACT)
    alone = ggufmoe.perplexity(mixing_path, TEXT, options=options)
    told = alone.to_dict()
    assert told["perplexity"] == {"value": alone.value, "uncertainty": alone.estimate.uncertainty}
    beside = ggufmoe.kl_divergence(mixing_path, mixing_path, TEXT, options=options)
    told = beside.to_dict()
    assert told["kl"]["quantiles"]["0.999"] == 0.0
    assert told["reference"] == str(mixing_path)


def test_several_models_are_compared_at_once(mixing_path: Path, noisy_path: Path) -> None:
    both = ggufmoe.kl_divergences([mixing_path, noisy_path], mixing_path, TEXT, n_ctx=32, **EXACT)
    alone = ggufmoe.kl_divergence(noisy_path, mixing_path, TEXT, n_ctx=32, **EXACT)
    assert both.is_complete
    assert [each.model for each in both.models] == [mixing_path, noisy_path]
    assert replace(both.models[1], seconds=0) == replace(alone, seconds=0)
    (difference,) = both.kl_differences
    assert difference.value == pytest.approx(alone.kl.mean.value - both.models[0].kl.mean.value)
    assert 0 < difference.uncertainty == pytest.approx(alone.kl.mean.uncertainty)
    with pytest.raises(OptionError, match="at least one model"):
        ggufmoe.kl_divergences([], mixing_path, TEXT, n_ctx=32)


@pytest.mark.parametrize("n_batch", [64, 10])
def test_kept_log_probabilities_give_the_numbers_of_a_rounded_reference(
    mixing_path: Path, noisy_path: Path, tmp_path: Path, n_batch: int
) -> None:
    kept, words = tmp_path / "kept.bin", {"n_ctx": 32, "n_batch": n_batch, **EXACT}
    phases: list[str] = []

    def compared() -> ggufmoe.Divergence:
        phases.clear()
        found = ggufmoe.kl_divergences(
            [noisy_path], mixing_path, TEXT, logits=kept, on_progress=lambda p: phases.append(p.phase), **words
        )
        return replace(found.models[0], seconds=0)

    first = compared()
    assert "reference" in phases
    assert first == compared()
    assert "reference" not in phases
    rounded = ggufmoe.kl_divergence(noisy_path, mixing_path, TEXT, round_reference=True, **words)
    assert first.kl.mean.value == pytest.approx(rounded.kl.mean.value, rel=1e-6)
    assert first.reference_perplexity.value == pytest.approx(rounded.reference_perplexity.value, rel=1e-6)


def test_log_probabilities_of_another_text_are_refused(mixing_path: Path, noisy_path: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.bin"
    compared = partial(ggufmoe.kl_divergences, [noisy_path], mixing_path, logits=kept)
    compared(TEXT, n_ctx=32, chunks=2, **EXACT)
    for text, n_ctx, chunks, said in (
        (TEXT[3:], 32, 2, "another text"),
        (TEXT, 16, 2, "chunks of 32"),
        (TEXT, 32, 3, "has 2 chunks"),
    ):
        with pytest.raises(InputError, match=said):
            compared(text, n_ctx=n_ctx, chunks=chunks, **EXACT)
    content = kept.read_bytes()
    for broken in (content[:-1], content[:10], b"x" + content[1:], content[:8] + b"\xff" * 12 + content[20:]):
        kept.write_bytes(broken)
        with pytest.raises(InputError, match=r"kept\.bin"):
            compared(TEXT, n_ctx=32, chunks=2, **EXACT)


CHAT = "{{ bos_token }}{% for m in messages %} <{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def chat_path(write_model: Callable[[Scripted], Path]) -> Path:
    """A model that is asked for an answer by `` <assistant>``."""
    template = CHAT + "{% if add_generation_prompt %} <assistant>{% endif %}"
    words = [*(f" w{i}" for i in range(30)), " <user>", " <assistant>"]
    return write_model(Scripted(pieces=words, random_layers=True, chat_template=template))


def said(*contents: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": one} for i, one in enumerate(contents)]})


def test_of_conversations_answers_alone_are_scored(chat_path: Path) -> None:
    talks = ((" w1 w2", " w3 w4 w5"), (" w6", " w7", " w8 w9", " w1 w9"))
    result = ggufmoe.perplexity(chat_path, "\n\n".join(said(*talk) for talk in talks) + "\n", answers=True, **EXACT)
    nll: list[float] = []
    places: list[int]
    with Engine(chat_path, ContextOptions(n_ctx=256, **EXACT)) as engine:
        for talk in talks:
            tokens, places = engine.tokenize(""), []
            for i, content in enumerate(talk):
                tokens += engine.tokenize((" <user>", " <assistant>")[i % 2], add_bos=False)
                words = engine.tokenize(content, add_bos=False)
                places += range(len(tokens), len(tokens) + len(words)) if i % 2 else []
                tokens += words
            rows = engine.logits(tokens).astype(np.float64)
            nll += [np.log(np.exp(rows[at - 1]).sum()) - rows[at - 1, tokens[at]] for at in places]
    assert (result.n_scored, result.n_chunks, result.total_chunks, result.answers) == (len(nll), 2, 2, True)
    assert len(nll) == 6
    assert result.value == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    first = ggufmoe.perplexity(chat_path, "\n".join(said(*talk) for talk in talks), answers=True, chunks=1, **EXACT)
    assert first.mean_nll.value == pytest.approx(np.mean(nll[:3]), rel=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "x"}', "line 2: expected an object with messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: expected an object with messages"),
        (said(" w1"), "line 2: no message of the assistant"),
        (said(" w1 w2 w3 w4 w5", " w1 w2"), "line 2: 10 tokens, more than 8"),
    ],
)
def test_a_line_that_is_no_conversation_is_refused(chat_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ggufmoe.perplexity(chat_path, said(" w1", " w2") + "\n" + line, answers=True, n_ctx=8)


def test_conversations_need_a_template_and_at_least_one(chat_path: Path, mixing_path: Path) -> None:
    with pytest.raises(InputError, match="the text has no conversations"):
        ggufmoe.perplexity(chat_path, "\n", answers=True)
    with pytest.raises(TemplateError, match="has no chat template"):
        ggufmoe.perplexity(mixing_path, said(" w1", " w2"), answers=True)
