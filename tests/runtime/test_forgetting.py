"""Models that cannot go back to every earlier token: sliding windows and recurrent layers. Answers stay right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ggufmoe import ContextOptions, Engine, InputError, OffloadOptions, SamplingOptions
from ggufmoe.runtime.events import Finished, Token
from ggufmoe.runtime.kvcache import SavedState
from tests.architecture_files import write_architecture
from tests.engines import local_engine

CPU = OffloadOptions(load_mode="none", device="none")
SMALL = ContextOptions(n_ctx=1024, n_threads=1, n_ubatch=64)
"""Windows of 64 tokens and batches as long: windowed layers have room for 256 tokens."""
N_NEW = 12
WINDOWED = ("gemma3", "gpt-oss")
RECURRENT = ("lfm2moe", "qwen3next")
TEXT = [3 + 7 * i % 300 for i in range(400)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forgetting")
    return {name: write_architecture(folder / f"{name}.gguf", name) for name in WINDOWED + RECURRENT}


@pytest.fixture(params=WINDOWED + RECURRENT)
def engine(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[Engine]:
    with Engine(paths[request.param], SMALL, CPU) as engine:
        yield engine


@pytest.fixture(params=WINDOWED)
def windowed(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Path:
    return paths[request.param]


def answer(engine: Engine, prompt: Sequence[int], n: int = N_NEW) -> tuple[list[int], int]:
    """The likeliest tokens after ``prompt``, and how many of its tokens were reused."""
    # </s> may not end the answer
    settings = SamplingOptions(temperature=0.0, n_predict=n, logit_bias=("2-inf",))
    events = list(engine.generate(prompt, settings))
    last = events[-1]
    assert isinstance(last, Finished)
    return [event.token_id for event in events if isinstance(event, Token)], last.timing.cached_tokens


def fresh(engine: Engine, prompt: Sequence[int]) -> list[int]:
    """The answer with an empty cache."""
    engine.forget()
    found, cached = answer(engine, prompt)
    assert cached == 0
    return found


def test_answers_are_those_of_an_empty_cache(engine: Engine) -> None:
    texts = [
        TEXT,
        TEXT,
        TEXT[:-1],
        [*TEXT[:200], *TEXT[210:]],  # further back than a window and a batch
        TEXT,
        TEXT[::-1],
        TEXT,
        TEXT[:90],
    ]
    found = [answer(engine, text)[0] for text in texts]
    assert found == [fresh(engine, text) for text in texts]
    assert len({tuple(tokens) for tokens in found}) > 3


def test_the_same_question_again_computes_its_last_token_only(engine: Engine) -> None:
    first, _ = answer(engine, TEXT)
    again, cached = answer(engine, TEXT)
    assert (again, cached) == (first, len(TEXT) - 1)
    longer, cached = answer(engine, [*TEXT, *first[:-1], 5, 6, 7])
    assert cached == len(TEXT) + len(first) - 1
    assert longer == fresh(engine, [*TEXT, *first[:-1], 5, 6, 7])


def test_an_answer_that_is_left_out_of_the_history_costs_only_what_is_new(engine: Engine) -> None:
    """As chats with reasoning models do."""
    answer(engine, TEXT, n=100)
    found, cached = answer(engine, [*TEXT, 5, 6, 7])
    assert cached >= len(TEXT) - 1
    assert found == fresh(engine, [*TEXT, 5, 6, 7])


def test_another_text_comes_back_from_its_copy(engine: Engine) -> None:
    first, _ = answer(engine, TEXT)
    answer(engine, TEXT[::-1])
    again, cached = answer(engine, TEXT)
    assert (again, cached) == (first, len(TEXT) - 1)


def test_a_copy_has_the_checkpoints_for_which_there_is_room(engine: Engine) -> None:
    for n in (200, 300, 400):
        answer(engine, TEXT[:n])
    cache = local_engine(engine)._loaded.cache

    def set_aside() -> list[SavedState]:
        state = cache.state()
        cache.saved.max_bytes = state.n_bytes - 1
        cache.set_aside()
        assert len(state.checkpoints) == 3
        return [replace(state, checkpoints=state.checkpoints[1:]), *cache.saved._states]

    expected, kept = local_engine(engine)._native.call(set_aside)
    assert (kept.n_bytes, kept.checkpoints) == (expected.n_bytes, expected.checkpoints)


def test_without_room_for_copies_no_token_is_computed_apart(paths: dict[str, Path]) -> None:
    for name in (*WINDOWED, *RECURRENT):
        with Engine(paths[name], replace(SMALL, cache_ram=0), CPU) as engine:
            answer(engine, TEXT, n=1)
            assert local_engine(engine)._loaded.cache.n_returned == 1, name


def test_without_room_for_copies_everything_is_computed_again(paths: dict[str, Path]) -> None:
    with Engine(paths["qwen3next"], replace(SMALL, cache_ram=0), CPU) as engine:
        first = answer(engine, TEXT)
        assert answer(engine, TEXT) == first == (first[0], 0)


def test_a_session_goes_on(engine: Engine, tmp_path: Path) -> None:
    found, _ = answer(engine, TEXT)
    engine.save_session(tmp_path / "s", TEXT)
    engine.forget()
    engine.load_session(tmp_path / "s")
    more = [*TEXT, 5, 6]
    again, cached = answer(engine, more)
    assert cached == len(TEXT)
    assert again == fresh(engine, more)
    engine.load_session(tmp_path / "s")
    assert answer(engine, TEXT)[0] == found
    engine.load_session(tmp_path / "s")
    assert answer(engine, TEXT[:150])[0] == fresh(engine, TEXT[:150])


def test_a_prompt_that_is_broken_off_leaves_nothing_wrong(engine: Engine) -> None:
    expected = fresh(engine, TEXT)
    engine.forget()
    engine.prefill(TEXT[:100])
    local = local_engine(engine)

    def broken_off() -> bool:
        local._loaded.abort_flag[0] = b"\x01"
        done = local._loaded.cache.compute(TEXT[100:])
        local._loaded.abort_flag[0] = b"\x00"
        return done

    assert not local._native.call(broken_off)
    assert len(engine.cached_tokens) <= 100
    assert answer(engine, TEXT)[0] == expected


def test_a_full_context_goes_on(paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        for swa_full in (False, True):
            options = ContextOptions(n_ctx=256, n_threads=1, n_ubatch=32, overflow="shift", swa_full=swa_full)
            with Engine(path, options, CPU) as engine:
                assert len(answer(engine, TEXT[:200], n=150)[0]) == 150, name
                assert answer(engine, TEXT[:200])[0] == fresh(engine, TEXT[:200]), name


def test_a_recurrent_model_forgets_what_a_full_context_drops(paths: dict[str, Path]) -> None:
    """Its state cannot lose tokens, so the rest is computed again."""
    options = ContextOptions(n_ctx=256, n_threads=1, overflow="shift")
    with Engine(paths["qwen3next"], options, CPU) as engine:
        tokens, _ = answer(engine, TEXT[:250], n=20)
        kept = list(engine.cached_tokens)
        assert len(kept) < 200
        assert answer(engine, [*kept, tokens[-1]])[0] == fresh(engine, [*kept, tokens[-1]])


# ---- --swa-full


def test_a_full_cache_can_go_back_anywhere(windowed: Path) -> None:
    changed = [*TEXT[:200], *TEXT[210:]]
    with Engine(windowed, SMALL, CPU) as engine:
        few = engine.placement.report.kv_bytes["CPU"]
        answer(engine, TEXT)
        small, cached = answer(engine, changed)
        assert cached == 0
    with Engine(windowed, replace(SMALL, swa_full=True), CPU) as engine:
        many = engine.placement.report.kv_bytes["CPU"]
        answer(engine, TEXT)
        full, cached = answer(engine, changed)
        assert cached == 200
    assert small == full
    assert few < many


def test_a_full_cache_takes_checkpoints_when_texts_take_turns(windowed: Path) -> None:
    with Engine(windowed, replace(SMALL, swa_full=True), CPU) as engine:
        cache = local_engine(engine)._loaded.cache
        answer(engine, TEXT, n=1)
        assert (cache.n_returned, cache._checkpoints) == (1, [])
        answer(engine, TEXT[::-1], n=100)
        assert cache._checkpoints
        answer(engine, TEXT)
        found, cached = answer(engine, [*TEXT[::-1], 5, 6, 7])
        assert cached == len(TEXT) - 1
        assert found == fresh(engine, [*TEXT[::-1], 5, 6, 7])


def test_a_session_is_not_taken_by_another_size_of_cache(windowed: Path, tmp_path: Path) -> None:
    with Engine(windowed, SMALL, CPU) as engine:
        engine.save_session(tmp_path / "s", TEXT)
    with (
        Engine(windowed, replace(SMALL, swa_full=True), CPU) as engine,
        pytest.raises(InputError, match="another --swa-full"),
    ):
        engine.load_session(tmp_path / "s")


# ---- several answers in one batch


BATCHED = replace(SMALL, n_parallel=3, cache_type_k="f32", cache_type_v="f32", flash_attn="off")


def together(engine: Engine, prompts: Sequence[Sequence[int]], n: int = N_NEW) -> list[list[int]]:
    """The answers to ``prompts``, asked for at the same time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return [tokens for tokens, _ in pool.map(lambda prompt: answer(engine, prompt, n), prompts)]


@pytest.fixture(params=WINDOWED + RECURRENT)
def pair(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[tuple[Engine, Engine]]:
    """An engine that computes three answers at once, and one that computes one after another."""
    path = paths[request.param]
    with Engine(path, BATCHED, CPU) as engine, Engine(path, replace(BATCHED, n_parallel=1), CPU) as alone:
        yield engine, alone


def test_answers_are_the_same_alone_and_in_a_batch(pair: tuple[Engine, Engine]) -> None:
    engine, alone = pair
    prompts = [TEXT, TEXT[::-1], TEXT[5:90], [*TEXT[:200], *TEXT[210:]], TEXT, [*TEXT, 5, 6], TEXT[:90]]
    expected = [fresh(alone, prompt) for prompt in prompts]
    assert together(engine, prompts) == expected
    assert together(engine, prompts[::-1]) == expected[::-1]
    assert [answer(engine, prompt)[0] for prompt in prompts] == expected


def test_a_text_that_is_being_continued_is_copied_for_others(pair: tuple[Engine, Engine]) -> None:
    engine, alone = pair
    answer(engine, TEXT, n=1)
    stream = engine.generate([*TEXT, 5, 6, 7], SamplingOptions(temperature=0.0, n_predict=99, logit_bias=("2-inf",)))
    next(stream)
    for end in ([9, 8, 7, 6], [11], [50, 60, 70]):
        found, cached = answer(engine, [*TEXT, *end])
        assert cached >= len(TEXT) - 1
        assert found == fresh(alone, [*TEXT, *end])
    assert len(list(stream)) == 99


def test_the_same_prompt_is_computed_once_for_several_answers(pair: tuple[Engine, Engine]) -> None:
    engine, alone = pair
    settings = SamplingOptions(temperature=0.0, n_predict=40, logit_bias=("2-inf",))
    first = engine.generate(TEXT, settings)
    next(first)
    others = [answer(engine, TEXT, n=40) for _ in range(2)]
    expected = answer(alone, TEXT, n=40)[0]
    assert others == [(expected, len(TEXT) - 1)] * 2
    assert [event.token_id for event in first if isinstance(event, Token)] == expected[1:]


@pytest.mark.parametrize("cache_ram", [0, 64])
def test_texts_that_give_way_to_others_go_on(paths: dict[str, Path], cache_ram: int) -> None:
    prompts = [TEXT[:120], TEXT[100:220], TEXT[200:320]]
    for name, path in paths.items():
        options = replace(BATCHED, cache_ram=cache_ram)
        with Engine(path, replace(options, n_parallel=1), CPU) as alone:
            expected = [answer(alone, prompt, n=30)[0] for prompt in prompts]
        with Engine(path, replace(options, n_ctx=256, n_parallel=2), CPU) as engine:
            assert together(engine, prompts, n=30) == expected, name


@pytest.mark.parametrize("swa_full", [False, True])
def test_a_full_context_goes_on_beside_others(paths: dict[str, Path], swa_full: bool) -> None:
    options = replace(BATCHED, n_ctx=256, n_ubatch=32, overflow="shift", swa_full=swa_full)
    prompts = [TEXT[:200], [*TEXT[:190], 5, 6, 7], TEXT[200:390]]
    for name, path in paths.items():
        with Engine(path, options, CPU) as engine:
            assert [len(tokens) for tokens in together(engine, prompts, n=80)] == [80] * 3, name
            assert together(engine, prompts) == [fresh(engine, prompt) for prompt in prompts], name
