"""Router rows: what transformers and mergekit computed on the same models and prompts, and what each mode promises."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import ArchitectureError, Cancelled, CheckpointError, RecipeError, TokenizerError
from ggufmoe.merge import forward
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.prompts import prompt_tokenizer, read_vocabulary, tokenize_prompts
from ggufmoe.merge.recipe import Recipe
from ggufmoe.merge.router import Router, check_prompts, make_router
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.work import Progress
from tests.tiny import make_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def recipe(mode: str = "hidden", **fields: Any) -> Recipe:
    experts = [
        {"source_model": "a", "positive_prompts": ["common sense", "use logic"], "negative_prompts": ["math"]},
        {"source_model": "b", "positive_prompts": ["solve for x"]},
    ]
    return Recipe.model_validate({"base_model": "a", "gate_mode": mode, "experts": experts, **fields})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("router") / "base", arch="llama", n_layer=3)


def rows_of(directory: Path, mode: str = "hidden", **fields: Any) -> Router:
    with open_checkpoint(directory) as model:
        return make_router(recipe(mode, **fields), model)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_rows_have_length_one_and_a_row_for_each_layer_and_expert(base: Path, mode: str) -> None:
    rows = rows_of(base, mode).rows
    assert rows.shape == (3, 2, 256)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1.0, rtol=1e-6)


def test_hidden_is_the_last_tokens_state_before_each_layer(base: Path) -> None:
    """Layer 0 needs no forward pass: its rows follow from the embeddings alone."""
    with open_checkpoint(base) as model:
        rows = make_router(recipe(), model).rows
        tokenize = prompt_tokenizer(base)
        table = read_f32(model.tensors["model.embed_tokens.weight"])
        last = {text: table[tokenize(text)[-1]] for text in ("common sense", "use logic", "math", "solve for x")}
    expected = (last["common sense"] + last["use logic"]) / 2 - last["math"]
    np.testing.assert_allclose(rows[0, 0], expected / np.linalg.norm(expected), rtol=1e-5)
    np.testing.assert_allclose(rows[0, 1], last["solve for x"] / np.linalg.norm(last["solve for x"]), rtol=1e-5)


def test_hidden_avg_is_the_mean_over_the_prompts_own_tokens(base: Path) -> None:
    with open_checkpoint(base) as model:
        row = make_router(recipe("hidden_avg"), model).rows[0, 1]
        mean = ForwardPass(model).embed(prompt_tokenizer(base)("solve for x")).mean(axis=0)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5)


def test_hidden_last_is_another_word_for_hidden(base: Path) -> None:
    np.testing.assert_array_equal(rows_of(base, "hidden").rows, rows_of(base, "hidden_last").rows)


def test_prompts_do_not_see_each_other(base: Path) -> None:
    """All prompts share one batch; a prompt's states are those it has alone."""
    with open_checkpoint(base) as model:
        forward = ForwardPass(model)
        prompts = [[1, 5, 9, 30, 12], [1, 40, 41]]
        together = forward.logits(prompts)
        np.testing.assert_allclose(together[5:], forward.logits([prompts[1]]), rtol=1e-4, atol=1e-6)


def test_random_rows_follow_the_seed(base: Path) -> None:
    first, same, other = (rows_of(base, "random", seed=seed).rows for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert abs(float(first.std()) - 1) < 0.05
    assert not np.array_equal(first, other)
    uniform = rows_of(base, "uniform_random").rows
    assert np.abs(uniform).max() <= 1 / 16
    assert uniform.std() > 0.03


def test_the_report_shows_twins(base: Path) -> None:
    experts = [{"source_model": name, "positive_prompts": ["solve for x"]} for name in ("a", "b")]
    report = rows_of(base, experts=experts).report
    assert report.degenerate_layers == (0, 1, 2)
    assert report.cosines[1][0][1] == pytest.approx(1.0)
    assert report.to_dict()["degenerate_layers"] == [0, 1, 2]


def test_the_report_tells_where_each_prompt_goes(base: Path) -> None:
    report = rows_of(base).report
    assert [(p.expert, p.positive, p.prompt) for p in report.preferences] == [
        (0, True, "common sense"),
        (0, True, "use logic"),
        (0, False, "math"),
        (1, True, "solve for x"),
    ]
    for preference in report.preferences:
        assert len(preference.weights) == 3
        assert sum(preference.mean_weights) == pytest.approx(1.0)
    assert report.preferences[3].mean_weights[1] > 0.5


def test_progress_counts_layers(base: Path) -> None:
    seen: list[Progress] = []
    with open_checkpoint(base) as model:
        make_router(recipe(), model, on_progress=seen.append)
    assert [3 * step.done / step.total for step in seen] == [1, 2, 3]
    assert [step.item for step in seen] == [f"layer {n} of 3" for n in (1, 2, 3)]
    assert {(step.phase, step.unit) for step in seen} == {("router", "bytes")}


def test_a_cancelled_pass_stops(base: Path) -> None:
    stop = threading.Event()
    with open_checkpoint(base) as model, pytest.raises(Cancelled):
        make_router(recipe(), model, on_progress=lambda step: stop.set(), cancel=stop)


def test_the_number_of_threads_changes_no_bit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TILE_BYTES", 100 * 4 * 256)
    with open_checkpoint(base) as model:
        one, three = (make_router(recipe(), model, threads=threads).rows for threads in (1, 3))
    np.testing.assert_array_equal(one, three)
    np.testing.assert_allclose(one, rows_of(base).rows, atol=1e-5)


def test_blas_has_its_threads_back_after_a_pass(base: Path) -> None:
    def blas_threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    during: list[set[int]] = []
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"), open_checkpoint(base) as model:
        make_router(recipe(), model, on_progress=lambda step: during.append(blas_threads()))
        after = blas_threads()
    # an empty set where numpy's BLAS is one that cannot be told (Accelerate)
    assert after in ({2}, set())
    assert during[0] in ({1}, set())


def test_prompts_are_checked_before_anything_is_computed(base: Path) -> None:
    with open_checkpoint(base) as model:
        assert check_prompts(recipe(), model) > 8
        assert check_prompts(recipe("random"), model) == 0
        long = [{"source_model": "a", "positive_prompts": ["word " * 3000]}] * 2
        with pytest.raises(RecipeError, match=r"has \d+ tokens, the base model's context is 2048"):
            check_prompts(recipe(experts=long), model)
    with pytest.raises(RecipeError, match="gives no tokens"):
        tokenize_prompts(lambda text: [], ["x"], n_vocab=10, n_ctx=10)
    with pytest.raises(RecipeError, match="gives token 10, the base model has only 10"):
        tokenize_prompts(lambda text: [10], ["x"], n_vocab=10, n_ctx=10)


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"need a tokenizer\.json or tokenizer\.model"):
        prompt_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        prompt_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        prompt_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("nonsense")
    with pytest.raises(CheckpointError, match="is not JSON"):
        prompt_tokenizer(tmp_path)
    assert read_vocabulary(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("kind", ["spm", "json"])
def test_both_kinds_of_sentencepiece_files_give_the_same_prompt_ids(tmp_path: Path, kind: str) -> None:
    import sentencepiece

    from tests.tiny_tokenizers import sentencepiece_model

    directory = make_checkpoint(tmp_path, tokenizer=kind, n_layer=1)
    expected = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).encode("solve for x")
    assert prompt_tokenizer(directory)("solve for x") == [1, *expected]


def test_only_legacy_tokenizers_put_a_space_after_bos(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, n_layer=1)
    spaced = prompt_tokenizer(directory)("once upon")
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"legacy": true', '"legacy": false'))
    pieces = read_vocabulary(directory)
    joined = ["".join(pieces[i] for i in ids[1:]) for ids in (spaced, prompt_tokenizer(directory)("once upon"))]
    assert joined == ["▁once▁upon", "once▁upon"]
    assert prompt_tokenizer(directory)("</s>once")[:2] == [1, 2]


def test_a_sliding_window_hides_what_is_further_back(tmp_path: Path) -> None:
    window = make_checkpoint(tmp_path / "window", arch="mistral", n_layer=1, config={"sliding_window": 3})
    plain = make_checkpoint(tmp_path / "plain", arch="mistral", n_layer=1)
    with open_checkpoint(window) as narrow, open_checkpoint(plain) as wide:
        tokens = [1, 7, 30, 12, 44]
        a, b = ForwardPass(narrow).logits([tokens]), ForwardPass(wide).logits([tokens])
        other = ForwardPass(narrow).logits([[9, 8, *tokens[2:]]])
    np.testing.assert_allclose(a[:3], b[:3], rtol=1e-5)
    assert not np.allclose(a[3:], b[3:], rtol=1e-5)
    np.testing.assert_allclose(a[4], other[4], rtol=1e-5)


def test_an_empty_negative_prompt_is_the_beginning_of_text_alone(tmp_path: Path) -> None:
    for kind in ("spm", "json"):
        directory = make_checkpoint(tmp_path / kind, arch="mistral", tokenizer=kind)
        assert prompt_tokenizer(directory)("") == [1]


def test_rope_scaling_is_computed_or_refused(tmp_path: Path) -> None:
    linear = make_checkpoint(
        tmp_path / "linear", arch="llama", n_layer=1, rope_scaling={"type": "linear", "factor": 2.0}
    )
    plain = make_checkpoint(tmp_path / "plain", arch="llama", n_layer=1)
    tokens = [[1, 7, 30, 12, 44]]
    with open_checkpoint(linear) as scaled, open_checkpoint(plain) as unscaled:
        a, b = ForwardPass(scaled).logits(tokens), ForwardPass(unscaled).logits(tokens)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    assert not np.allclose(a[4], b[4], rtol=1e-5)
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    stretched = make_checkpoint(tmp_path / "yarn", arch="llama", n_layer=1, rope_scaling=yarn)
    with (
        open_checkpoint(stretched) as model,
        pytest.raises(CheckpointError, match=r"cannot be computed with yarn rope scaling$"),
    ):
        ForwardPass(model)
    with open_checkpoint(stretched) as model:
        assert make_router(recipe("cheap_embed"), model).rows.shape == (1, 2, 256)
        with pytest.raises(CheckpointError, match="use gate_mode cheap_embed"):
            check_prompts(recipe("hidden"), model)
    assert issubclass(ArchitectureError, CheckpointError)


def test_prompts_that_all_end_alike_are_warned_about(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    alike = [{"source_model": name, "positive_prompts": [f"{name} problem"]} for name in ("a", "b")]
    rows_of(base)
    assert "same token" not in caplog.text
    report = rows_of(base, experts=alike).report
    assert report.condition_numbers[0] > 1e6
    assert "all positive prompts end in the same token, so gate mode hidden cannot tell" in caplog.text
    caplog.clear()
    rows_of(base, "hidden_avg", experts=alike)
    assert "same token" not in caplog.text
