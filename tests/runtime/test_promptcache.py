"""Prompts kept on disk: what another engine finds again, what is not kept, and every file that is no use."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ggufmoe import ContextOptions, Engine, InputError, SamplingOptions, files
from ggufmoe.runtime import promptcache
from ggufmoe.runtime.promptcache import MIN_TOKENS, PromptCache
from ggufmoe.runtime.session import read_session
from tests.architecture_files import write_architecture
from tests.engines import local_engine
from tests.runtime.test_batching import EXACT, FORTY, GREEDY, texts, words
from tests.runtime.test_engine import last_of
from tests.runtime.test_session import forge, parts

TEXT = words(200)
OTHER = words(200, 3)


@pytest.fixture
def options(tmp_path: Path) -> ContextOptions:
    return ContextOptions(n_threads=1, prompt_cache=tmp_path / "made" / "prompts")


def answer(engine: Engine, prompt: Sequence[int], settings: SamplingOptions = FORTY) -> tuple[list[int], int]:
    """The tokens of the answer, and how many tokens of the prompt were not computed."""
    events = list(engine.generate(prompt, settings))
    return texts([events])[0], last_of(iter(events)).timing.cached_tokens


def ask(path: Path, options: ContextOptions, *prompts: Sequence[int]) -> list[tuple[list[int], int]]:
    """The answers of an engine that is opened for them and closed again."""
    with Engine(path, options) as engine:
        return [answer(engine, prompt) for prompt in prompts]


def written(engine: Engine) -> None:
    """Wait until all texts are written that were computed until now."""
    local_engine(engine).wait_until_free()
    local_engine(engine)._loaded._kept.flush()


def kept(options: ContextOptions) -> list[Path]:
    """All files in the directory, those used last at the end."""
    assert options.prompt_cache is not None
    return sorted(options.prompt_cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def n_tokens(path: Path) -> int:
    return int(parts(path)[0]["n_tokens"])


def set_ages(paths: Sequence[Path]) -> None:
    """Let the files have been used one after another, long ago."""
    for i, path in enumerate(paths):
        os.utime(path, (10**9 + i, 10**9 + i))


# ---- found again


def test_a_conversation_goes_on_in_another_engine(mixing_path: Path, options: ContextOptions) -> None:
    [(first, cached)] = ask(mixing_path, options, TEXT)
    assert (len(first), cached) == (40, 0)
    turn = [*TEXT, *first, *words(9)]
    expected = ask(mixing_path, ContextOptions(n_threads=1), turn)
    # the last token of an answer is drawn and not computed; prompt and answer are one file
    assert [n_tokens(path) for path in kept(options)] == [len(TEXT) + 39]
    assert ask(mixing_path, options, turn) == [(expected[0][0], len(TEXT) + 39)]
    assert len(kept(options)) == 1


def test_a_beginning_and_the_same_question_are_found(mixing_path: Path, options: ContextOptions) -> None:
    expected = ask(mixing_path, ContextOptions(n_threads=1), TEXT, [*TEXT[:150], *OTHER])
    assert ask(mixing_path, options, TEXT)[0][0] == expected[0][0]
    assert ask(mixing_path, options, TEXT) == [(expected[0][0], len(TEXT) - 1)]
    assert ask(mixing_path, options, [*TEXT[:150], *OTHER]) == [(expected[1][0], 150)]


def test_what_is_prefilled_is_kept_and_read_by_an_engine_that_is_open_at_the_same_time(
    mixing_path: Path, options: ContextOptions
) -> None:
    with Engine(mixing_path, options) as one, Engine(mixing_path, options) as other:
        assert one.prefill(TEXT) == len(TEXT)
        written(one)
        assert other.prefill(TEXT) == 1
        other.prefill(OTHER)
        written(other)
        assert one.prefill(OTHER) == 1
    assert len(kept(options)) == 2


def test_prompt_and_answer_are_there_while_the_answer_is_read(mixing_path: Path, options: ContextOptions) -> None:
    with Engine(mixing_path, options) as engine:
        events = engine.generate(TEXT, replace(GREEDY, n_predict=-1))
        next(events)
        written(engine)
        [n_kept] = [n_tokens(path) for path in kept(options)]
        assert n_kept in range(len(TEXT), 512, 64)  # the answer is computed ahead of its reader
        for _ in range(70):
            next(events)
        written(engine)
        [n_kept] = [n_tokens(path) for path in kept(options)]
        assert n_kept in range(len(TEXT) + 64, 512, 64)
        events.close()  # type: ignore[attr-defined]


def test_only_the_user_may_read_what_is_kept(mixing_path: Path, options: ContextOptions) -> None:
    ask(mixing_path, options, TEXT)
    [path] = kept(options)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_text_that_was_set_aside_and_one_of_another_context(mixing_path: Path, options: ContextOptions) -> None:
    options = replace(options, cache_ram=0)
    with Engine(mixing_path, options) as engine:
        engine.evaluate(TEXT)  # keeps nothing by itself
        assert not kept(options)
        assert answer(engine, OTHER)[1] == 2  # which both begin with
        written(engine)
        assert answer(engine, TEXT)[1] == len(TEXT) - 1
        engine.set_context(replace(options, n_ctx=512))
        assert answer(engine, OTHER)[1] == len(OTHER) - 1


def test_several_answers_at_once(mixing_path: Path, options: ContextOptions) -> None:
    prompts = [words(150 + i, i) for i in range(1, 5)]
    options = replace(options, n_ctx=1024, n_parallel=4, **EXACT)

    def ask_all() -> list[tuple[list[int], int]]:
        with Engine(mixing_path, options) as engine, ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda prompt: answer(engine, prompt), prompts))

    computed, found = ask_all(), ask_all()
    assert [cached for _, cached in found] == [len(prompt) - 1 for prompt in prompts]
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in computed]
    assert len(kept(options)) == 4


@pytest.mark.parametrize("name", ["gemma3", "qwen3next"])
def test_models_that_cannot_go_back_begin_with_whole_texts(tmp_path: Path, name: str) -> None:
    path = write_architecture(tmp_path / f"{name}.gguf", name)
    alone = ContextOptions(n_ctx=1024, n_threads=1, n_ubatch=64)
    options = replace(alone, prompt_cache=tmp_path / "prompts")
    text = [3 + 7 * i % 300 for i in range(250)]
    shorter = text[:200]
    [(first, _)] = ask(path, alone, text)
    turn = [*text, *first, 5, 6, 7]
    expected = ask(path, alone, text, shorter, turn)
    assert ask(path, options, text) == expected[:1]
    found = [ask(path, options, prompt)[0] for prompt in (text, shorter, turn)]
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    # files have the prompt without its last token, and the whole conversation
    assert [cached for _, cached in found] == [len(text) - 1, 0, len(text) + 39]


# ---- not kept


def test_short_texts_and_small_changes_are_not_kept(mixing_path: Path, options: ContextOptions) -> None:
    settings = replace(GREEDY, n_predict=1)
    with Engine(mixing_path, options) as engine:
        answer(engine, TEXT[: MIN_TOKENS - 1], settings)
        written(engine)
        assert not kept(options)
        answer(engine, TEXT[:MIN_TOKENS], settings)
        written(engine)
        before = kept(options)
        answer(engine, TEXT[: MIN_TOKENS + 15], settings)
    assert kept(options) == before != []


def test_a_text_whose_beginning_was_dropped_is_not_kept(mixing_path: Path, options: ContextOptions) -> None:
    options = replace(options, n_ctx=256, overflow="shift")
    with Engine(mixing_path, options) as engine:
        answer(engine, TEXT, replace(GREEDY, n_predict=150))
        cached = engine.cached_tokens
        assert cached[: len(TEXT)] != tuple(TEXT)
        answer(engine, OTHER)  # sets it aside
        answer(engine, [*cached, 270])
    facts = local_engine(engine)._session_facts()
    assert all(read_session(path, facts, 512)[0].tokens[: len(cached)] != cached for path in kept(options))


def test_other_options_and_models_have_files_of_their_own(mixing_path: Path, options: ContextOptions) -> None:
    ask(mixing_path, options, TEXT)
    for changed in (replace(options, cache_type_k="f32"), replace(options, flash_attn="off")):
        assert ask(mixing_path, changed, TEXT)[0][1] == 0
    assert len(kept(options)) == 3
    assert ask(mixing_path, replace(options, n_ctx=256, n_ubatch=32), TEXT)[0][1] == len(TEXT) - 1


# ---- files that are no use


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def foreign(path: Path) -> None:
    path.write_bytes(b"something else")


def refused_by_llama_cpp(path: Path) -> None:
    header, body = parts(path)
    forge(path, {**header, "state_bytes": header["state_bytes"] - 64}, body[:-64])


def of_other_tokens(path: Path) -> None:
    header, body = parts(path)
    end = 4 * header["n_tokens"]
    forge(path, header, body[: end - 4] + (10**6).to_bytes(4, "little") + body[end:])


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [damaged, truncated, foreign, refused_by_llama_cpp, of_other_tokens, a_directory])
def test_a_file_that_cannot_be_used_is_ignored(
    mixing_path: Path, options: ContextOptions, spoil: object, caplog: pytest.LogCaptureFixture
) -> None:
    [(expected, _)] = ask(mixing_path, options, TEXT)
    [path] = kept(options)
    assert callable(spoil)
    spoil(path)
    with caplog.at_level(logging.DEBUG, "ggufmoe"):
        [(tokens, cached)] = ask(mixing_path, options, TEXT)
    assert (tokens, cached <= 2) == (expected, True)
    lines = [record for record in caplog.records if "a kept prompt is ignored" in record.message]
    assert [record.levelno for record in lines] == [logging.DEBUG]
    if not path.is_dir():  # it is written again
        assert ask(mixing_path, options, TEXT) == [(expected, len(TEXT) - 1)]


def test_a_file_may_go_before_it_is_read(
    mixing_path: Path, options: ContextOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(expected, _)] = ask(mixing_path, options, TEXT)

    def too_late(path: Path, *rest: object) -> object:
        path.unlink()
        return read_session(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(promptcache, "read_session", too_late)
    assert ask(mixing_path, options, TEXT) == [(expected, 0)]


# ---- the limit


def test_the_texts_that_were_not_used_for_longest_are_deleted(mixing_path: Path, options: ContextOptions) -> None:
    options = replace(options, prompt_cache_size=1)
    prompts = [words(200, i) for i in range(1, 9)]
    settings = replace(GREEDY, n_predict=1)
    with Engine(mixing_path, options) as engine:
        for prompt in prompts[1:]:
            answer(engine, prompt, settings)
            written(engine)
            assert sum(path.stat().st_size for path in kept(options)) <= 2**20
    found = kept(options)
    assert len(found) == 2**20 // found[0].stat().st_size < len(prompts) - 1
    set_ages(found)
    with Engine(mixing_path, options) as engine:
        oldest = next(prompt for prompt in prompts if _is_in(engine, found[0], prompt))
        assert answer(engine, oldest, settings)[1] == len(oldest) - 1
        answer(engine, prompts[0], settings)
    assert set(found) - set(kept(options)) == {found[1]}


def _is_in(engine: Engine, path: Path, prompt: Sequence[int]) -> bool:
    state, _ = read_session(path, local_engine(engine)._session_facts(), engine.n_ctx)
    return list(state.tokens[: len(prompt)]) == list(prompt)


def test_files_of_others_stay_and_what_a_killed_process_left_goes(mixing_path: Path, options: ContextOptions) -> None:
    folder = options.prompt_cache
    assert folder is not None
    folder.mkdir(parents=True)
    left = folder / f"{'0' * 16}-{'1' * 16}.prompt.77-abcdef01.partial"
    ours = folder / f"{'0' * 16}-{'2' * 16}.prompt.77-abcdef01.partial"
    letter = folder / "letter.txt"
    for path in (left, ours, letter):
        path.write_bytes(b"x" * 5_000_000)
    set_ages([left, letter])
    ask(mixing_path, replace(options, prompt_cache_size=1), TEXT)
    assert not left.exists()
    assert ours.exists()
    assert letter.exists()


# ---- what goes wrong


def test_a_full_disk_is_said_once(
    mixing_path: Path, options: ContextOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = ask(mixing_path, ContextOptions(n_threads=1), TEXT, OTHER)
    monkeypatch.setattr(files, "sync", full)
    assert ask(mixing_path, options, TEXT, OTHER) == expected
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no more prompts are kept" in record.message
    assert "No space left on device" in record.message
    assert not kept(options)


def _a_file(folder: Path) -> None:
    folder.write_text("not a directory")


def _open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize(
    ("make", "why"), [(_a_file, "File exists"), (_open_to_all, "every user may write there")], ids=["file", "open"]
)
def test_a_directory_that_cannot_be_used(
    mixing_path: Path, tmp_path: Path, make: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "prompts"
    assert callable(make)
    make(folder)
    assert ask(mixing_path, ContextOptions(n_threads=1, prompt_cache=folder), TEXT, TEXT)[0][1] == 0
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "prompts are not kept" in record.message
    assert why in record.message
    assert folder.is_file() or not list(folder.iterdir())


def test_a_directory_that_is_deleted_meanwhile(
    mixing_path: Path, options: ContextOptions, caplog: pytest.LogCaptureFixture
) -> None:
    folder = options.prompt_cache
    assert folder is not None
    with Engine(mixing_path, options) as engine:
        folder.rmdir()
        assert len(answer(engine, TEXT)[0]) == 40
        assert len(answer(engine, OTHER)[0]) == 40
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1


def test_copies_that_wait_are_few(mixing_path: Path, options: ContextOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promptcache, "_MAX_WAITING_BYTES", 1)
    with Engine(mixing_path, options) as engine:
        held = local_engine(engine)._loaded._kept
        assert isinstance(held, PromptCache)
        with held._changed:  # nothing can be written
            held._thread = object()  # type: ignore[assignment]
        engine.prefill(TEXT)
        engine.prefill(OTHER)
        assert [list(copy.text) for copy in held._waiting] == [TEXT]
        held._thread = None
        held._waiting.clear()
    # what was left out is kept when the engine is closed
    assert len(kept(options)) == 2


def test_a_path_that_is_none() -> None:
    with pytest.raises(InputError, match="is no path"):
        ContextOptions(prompt_cache=Path("a\0b"))
