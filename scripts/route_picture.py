"""Draw where a model sends the tokens of some prompts, as an SVG picture for README.

usage: route_picture.py MODEL.gguf OUT.svg PROMPT [PROMPT ...] [--generate N] [--name WORD ...]

The picture is that of ``ggufmoe.routing.picture``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ggufmoe import ContextOptions, Engine, trace_routing
from ggufmoe.routing.picture import routing_picture


def main() -> None:
    """Trace, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="go on with so many tokens")
    parser.add_argument("--name", action="append", default=[], help="what an expert is, the first one first")
    parser.add_argument("--title", help="instead of the file's name")
    arguments = parser.parse_args()
    with Engine(arguments.model, ContextOptions()) as engine:
        traces = [trace_routing(engine, prompt, generate=arguments.generate) for prompt in arguments.prompts]
    if arguments.name and len(arguments.name) != traces[0].n_expert:
        parser.error(f"--name: {len(arguments.name)} names for {traces[0].n_expert} experts")
    svg = routing_picture(arguments.title or arguments.model.name, traces, arguments.name)
    arguments.out.write_text(svg, encoding="utf-8")
    print(f"{arguments.out}: {len(svg.encode()) / 1000:.1f} kB")


if __name__ == "__main__":
    main()
