"""Flags made from option objects."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
import typer.main

from ggufmoe import ContextOptions, OffloadOptions, OptionError, SamplingOptions
from ggufmoe.cli.params import with_options
from ggufmoe.options import option


@dataclass(frozen=True)
class Sizes:
    width: int = option(3, "-w", "--width", help="How wide.")
    names: tuple[str, ...] = option((), "--name", help="May be repeated.")
    kind: Literal["a", "b"] = option("a", "--kind", help="Which.")
    folder: Path | None = option(None, "--folder", help="Where.")
    wrap: bool = option(True, "--wrap/--no-wrap", " /-nw", help="Whether.")
    hidden: int = option(7, help="Only in the API.")

    def __post_init__(self) -> None:
        if self.width > 100:
            raise OptionError("too wide")


@dataclass(frozen=True)
class Other:
    width: int = option(1, "--other-width", help="A second width.")


def run(command: Any, *args: str) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return typer.main.get_command(app).main(list(args), standalone_mode=False)


def sizes(*args: str) -> tuple[str, Sizes, bool]:
    seen: list[tuple[str, Sizes, bool]] = []

    @with_options(Sizes)
    def command(word: str, options: Sizes, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        seen.append((word, options, loud))

    run(command, *args)
    return seen[0]


def test_defaults() -> None:
    assert sizes("x") == ("x", Sizes(), False)


def test_every_kind_of_field() -> None:
    given = sizes("-w", "5", "--name", "n", "--name", "m", "--kind", "b", "x", "--folder", "f", "-nw", "--loud")
    assert given == ("x", Sizes(5, ("n", "m"), "b", Path("f"), False), True)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--width", "101"], "too wide"),
        (["--width", "x"], "expected a whole number, not 'x'"),
        (["--kind", "c"], "c"),
        (["--hidden", "3"], "hidden"),
    ],
)
def test_wrong_usage(args: list[str], why: str) -> None:
    with pytest.raises(typer.BadParameter.__mro__[1], match=why) as caught:
        sizes("x", *args)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_flags_of_several_letters_with_one_dash() -> None:
    seen: list[Any] = []

    @with_options(ContextOptions, OffloadOptions, SamplingOptions)
    def command(context: ContextOptions, offload: OffloadOptions, sampling: SamplingOptions) -> None:
        seen.extend([context, offload, sampling])

    line = "-c 4096 -b 64 -ub 32 -t 2 -fa off -ctk q8_0 -ctv f32 -ngl 7 -lm none -nr -n 9"
    run(command, *line.split())
    assert seen[0] == ContextOptions(4096, 64, 32, 2, "off", "q8_0", "f32")
    assert seen[1] == OffloadOptions(7, "none", repack=False)
    assert seen[2] == SamplingOptions(n_predict=9)


def test_long_names_of_the_same_flags() -> None:
    seen: list[Any] = []

    @with_options(OffloadOptions, SamplingOptions)
    def command(offload: OffloadOptions, sampling: SamplingOptions) -> None:
        seen.extend([offload, sampling])

    line = (
        "--n-gpu-layers 0 --load-mode mmap+mlock --repack --temp 0 --top-k 1 --top-p 0.5 --min-p 0.1 "
        "--repeat-penalty 1.5 --seed 3 --n-predict -1"
    )
    run(command, *line.split())
    assert seen[0] == OffloadOptions(0, "mmap+mlock")
    assert seen[1] == SamplingOptions(0.0, 1, 0.5, 0.1, 1.5, 3, -1)


def test_two_fields_of_one_name_are_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="more than one parameter is called width"):

        @with_options(Sizes, Other)
        def command(sizes: Sizes, other: Other) -> None: ...


def test_a_group_without_a_parameter_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="exactly one parameter"):

        @with_options(Sizes)
        def command(word: str) -> None: ...


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ContextOptions(n_ctx=-1),
        lambda: ContextOptions(n_ctx=2**32 + 1),
        lambda: ContextOptions(n_batch=2**31),
        lambda: ContextOptions(n_ubatch=2**31),
        lambda: ContextOptions(n_threads=513),
        lambda: OffloadOptions(n_gpu_layers=2**31),
        lambda: ContextOptions(n_batch=0),
        lambda: ContextOptions(n_ubatch=0),
        lambda: ContextOptions(n_threads=0),
        lambda: ContextOptions(flash_attn="maybe"),  # type: ignore[arg-type]
        lambda: ContextOptions(cache_type_k="f8"),  # type: ignore[arg-type]
        lambda: OffloadOptions(load_mode="fast"),  # type: ignore[arg-type]
    ],
)
def test_impossible_options_are_refused_in_python_too(wrong: Any) -> None:
    with pytest.raises(OptionError, match="not"):
        wrong()
