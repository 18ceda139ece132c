"""The layout of ``ggufmoe VERB --help``: plain text in sections, wrapped at words at any width.

Rich's tables, which typer draws by default, cut the names of flags on narrow terminals.
"""

from __future__ import annotations

from typing import Any

import typer
import typer.core

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_ARGUMENTS = "Arguments"
_OWN = "Options"


class PlainCommand(typer.core.TyperCommand):
    """A command whose help has one section for each panel that its options name (``rich_help_panel``)."""

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
            record = name, text.replace("  [default:", " [default:")
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
            with formatter.section(typer.style("Examples", bold=True)):
                for example in self.epilog.splitlines():
                    formatter.write(f"  {example}\n")


def _shown_argument(argument: Any) -> str:
    given = argument.metavar and argument.metavar.removesuffix("...")
    name = (given or argument.name.upper()) + "..." * (argument.nargs < 0)
    return name if argument.required else f"[{name}]"
