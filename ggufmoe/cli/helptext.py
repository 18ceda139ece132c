"""The layout of ``ggufmoe VERB --help``: plain text in sections, wrapped at words at any width.

Rich's tables, which typer draws by default, cut the names of flags on narrow terminals.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import typer
import typer.core

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_ARGUMENTS = "Arguments"
_OWN = "Options"
_SHORT_BRACKET = re.compile(r"\[[^\]]{,24}\]")
_HELD = str.maketrans({" ": "\u00a0", "-": "\u2011"})
_FREED = str.maketrans({"\u00a0": " ", "\u2011": "-"})
_FORMATTER: Any = typer.Context.formatter_class


class _Formatter(_FORMATTER):  # type: ignore[misc]
    """Breaks lines between words only: neither at the hyphens of a name nor within short square brackets."""

    def write_text(self, text: str) -> None:
        super().write_text(_held(text))

    def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **keywords: Any) -> None:
        super().write_dl([(name, _held(text)) for name, text in rows], *args, **keywords)

    def getvalue(self) -> str:
        text: str = super().getvalue()
        return text.translate(_FREED)


def _held(text: str) -> str:
    """``text`` with characters in place of hyphens, and of spaces in brackets, at which lines are not broken."""
    return _SHORT_BRACKET.sub(lambda found: found[0].translate(_HELD), text).replace("-", "\u2011")


class PlainContext(typer.Context):
    """The context of a command whose help is in plain text."""

    formatter_class = _Formatter


class PlainCommand(typer.core.TyperCommand):
    """A command whose help has one section for each panel that its options name (``rich_help_panel``)."""

    context_class = PlainContext

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with what is kept of options that the command line does not give."""
        from ggufmoe.cli.kept_options import apply_kept

        apply_kept(ctx)
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``[OPTIONS] MODEL [PROMPT]``."""
        arguments = (p for p in self.get_params(ctx) if p.param_type_name == "argument")
        return [self.options_metavar or "", *map(_shown_argument, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then the verb's own options, then the others panel by panel."""
        panels: dict[str, list[tuple[str, str]]] = {_ARGUMENTS: [], _OWN: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            name, text = record
            text = re.sub(r"  \[(default:|required)", r" [\1", text)
            record = name, re.sub(r"(\[default: -?\d+)\.0\]", r"\1]", text)
            if parameter.param_type_name == "argument":
                panels[_ARGUMENTS].append((_shown_argument(parameter), getattr(parameter, "help", None) or ""))
            else:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or _OWN, []).append(record)
        for name, records in panels.items():
            if records:
                with formatter.section(typer.style(name, bold=True)):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on a line of its own."""
        if self.epilog:
            write_examples(formatter, self.epilog.splitlines())


class PlainGroup(typer.core.TyperGroup):
    """A verb that has commands of its own, and does something without one as well."""

    context_class = PlainContext

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that was typed; one that does not exist is wrong usage, which names a similar one."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"no such command: {args[0]}; {near_command(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``[OPTIONS]``, and that a command may follow."""
        del ctx
        return [self.options_metavar or "", "[COMMAND ...]"]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the whole first sentence of its help."""
        del ctx
        rows = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
        with formatter.section(typer.style("Commands", bold=True)):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on a line of its own."""
        del ctx
        if self.epilog:
            write_examples(formatter, self.epilog.splitlines())


def near_command(name: str, commands: Iterable[str]) -> str:
    """What to type instead of a command that does not exist."""
    near = difflib.get_close_matches(name, commands)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(commands)}"


def write_examples(formatter: Any, examples: Sequence[str]) -> None:
    """Write a section of commands as people type them."""
    with formatter.section(typer.style("Examples", bold=True)):
        for example in examples:
            formatter.write(f"  {example}\n")


def _shown_argument(argument: Any) -> str:
    given = argument.metavar and argument.metavar.removesuffix("...")
    name = (given or argument.name.upper()) + "..." * (argument.nargs < 0)
    return name if argument.required else f"[{name}]"
