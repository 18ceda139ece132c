"""Hold the renderings of llama.cpp's chat templates against those of transformers; prints a table.

usage: templates.py --peers-python PYTHON --llama-cpp DIR

Each template in ``models/templates`` of llama.cpp renders conversations with and without a system message, reasoning,
tools, calls and results. The texts must be equal, and what transformers refuses must be refused. Takes seconds. Exit
code 1 when a rendering differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ggufmoe.errors import TemplateError
from ggufmoe.runtime.template import ChatTemplate

HERE = Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SYSTEM = {"role": "system", "content": "Be kind & brief."}
ASK, MORE = {"role": "user", "content": "What is the weather?"}, {"role": "user", "content": "And <b>tomorrow</b>?"}
SAY = {"role": "assistant", "content": "It is warm."}
THINK = {**SAY, "reasoning_content": "Let me think."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name <of> the city, as in 'Zürich'"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    }
]


def called(*arguments: Any, content: str | None = "") -> dict[str, Any]:
    """An assistant's message with a call for each of ``arguments``."""
    calls = [
        {"id": f"call{n:05}", "type": "function", "function": {"name": "get_weather", "arguments": given}}
        for n, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def told(n: int) -> dict[str, str]:
    """The result of call ``n``."""
    return {"role": "tool", "tool_call_id": f"call{n:05}", "name": "get_weather", "content": '{"sky": "grey"}'}


PARIS, ROME = {"city": "Paris", "days": 2}, {"city": "Rome"}
OPEN, CLOSED = {"add_generation_prompt": True}, {"add_generation_prompt": False}
WITH_TOOLS = {**OPEN, "tools": TOOLS}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one question": ([ASK], OPEN),
    "system, turns": ([SYSTEM, ASK, SAY, MORE], OPEN),
    "turns": ([ASK, SAY, MORE], OPEN),
    "closed": ([SYSTEM, ASK, SAY], CLOSED),
    "reasoning before": ([SYSTEM, ASK, THINK, MORE], OPEN),
    "reasoning last": ([ASK, THINK], CLOSED),
    "thinking on": ([SYSTEM, ASK], {**OPEN, "enable_thinking": True}),
    "thinking off": ([SYSTEM, ASK], {**OPEN, "enable_thinking": False}),
    "effort": ([SYSTEM, ASK], {**OPEN, "reasoning_effort": "high"}),
    "empty tools": ([SYSTEM, ASK, SAY, MORE], {**OPEN, "tools": []}),
    "tools": ([SYSTEM, ASK], WITH_TOOLS),
    "call": ([SYSTEM, ASK, called(PARIS)], {**WITH_TOOLS, **CLOSED}),
    "call, no content": ([ASK, called(PARIS, content=None)], {**WITH_TOOLS, **CLOSED}),
    "result": ([SYSTEM, ASK, called(PARIS), told(0)], WITH_TOOLS),
    "result, answer": ([ASK, called(PARIS), told(0), SAY, MORE], WITH_TOOLS),
    "two calls": ([ASK, called(PARIS, ROME), told(0), told(1)], WITH_TOOLS),
    "arguments as text": ([ASK, called(json.dumps(PARIS)), told(0)], WITH_TOOLS),
}


def references(python: Path, templates: list[Path]) -> list[dict[str, str]]:
    """What transformers gives for every case of every template, in this order."""
    jobs = [
        {"template": path.read_text(encoding="utf-8"), "messages": messages, "variables": variables}
        for path in templates
        for messages, variables in CASES.values()
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "jobs.json"
        asked.write_text(json.dumps({"tokens": TOKENS, "jobs": jobs}), encoding="utf-8")
        done = subprocess.run(
            [str(python), str(HERE / "templates_reference.py"), str(asked)], check=True, stdout=subprocess.PIPE
        )
    answers: list[dict[str, str]] = json.loads(done.stdout)
    return answers


def verdict(template: ChatTemplate, case: str, reference: dict[str, str]) -> str:
    """``equal``, ``refused`` by both, or what differs."""
    messages, variables = CASES[case]
    try:
        text = template.render_strictly(messages, **variables)
    except TemplateError as error:
        return "refused" if "error" in reference else f"refused here alone: {error}"
    if "error" in reference:
        return f"refused there alone: {reference['error']}"
    return "equal" if text == reference["text"] else f"differs: {reference['text']!r:.300} and here {text!r:.300}"


def main() -> int:
    """Compare everything; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    arguments, _ = parser.parse_known_args()
    paths = sorted((arguments.llama_cpp / "models" / "templates").glob("*.jinja"))
    answers = iter(references(arguments.peers_python, paths))
    by_case: dict[str, Counter[str]] = {case: Counter() for case in CASES}
    whole = 0
    for path in paths:
        template = ChatTemplate(path.read_text(encoding="utf-8"), name=path.name, bos="<s>", eos="</s>")
        found = {case: verdict(template, case, next(answers)) for case in CASES}
        whole += set(found.values()) <= {"equal", "refused"}
        for case, said in found.items():
            by_case[case][said.partition(":")[0]] += 1
            if said not in ("equal", "refused"):
                print(f"{path.name}: {case}: {said}")
    print(f"{'conversation':<20} {'equal':>6} {'refused by both':>16} {'different':>10}")
    for case, counts in by_case.items():
        wrong = counts.total() - counts["equal"] - counts["refused"]
        print(f"{case:<20} {counts['equal']:>6} {counts['refused']:>16} {wrong:>10}")
    print(f"{whole} of {len(paths)} templates render as transformers renders them")
    return int(not paths or whole < len(paths))


if __name__ == "__main__":
    sys.exit(main())
