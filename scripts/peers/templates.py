"""Hold the renderings of llama.cpp's chat templates against those of transformers; prints a table.

usage: templates.py --peers-python PYTHON --llama-cpp DIR

Each template in ``models/templates`` of llama.cpp renders conversations with and without a system message, reasoning,
tools, calls and results. The texts must be equal, and what transformers refuses must be refused. Then answers with
reasoning, text and calls, as each template writes them for its model to learn from, are read back in pieces. Takes
seconds. Exit code 1 when a rendering differs, or an answer is read as something else.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ggufmoe.errors import TemplateError
from ggufmoe.runtime.answer_reader import AnswerReader
from ggufmoe.runtime.answer_syntax import AnswerSyntax, syntax_of
from ggufmoe.runtime.chatformat import message_of
from ggufmoe.runtime.events import Token
from ggufmoe.runtime.messages import Message, Tool, ToolCall
from ggufmoe.templates.jinja_template import ChatTemplate

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


PARSED: dict[str, Message] = {
    "text": Message("assistant", "It is warm: <b>25</b> degrees."),
    "reasoning": Message("assistant", "It is warm.", "Let me think: 1 < 2."),
    "a call": Message("assistant", "", tool_calls=(ToolCall("get_weather", json.dumps(PARIS), "call00000"),)),
    "two calls": Message(
        "assistant",
        "",
        tool_calls=tuple(
            ToolCall("get_weather", json.dumps(given), f"call0000{n}") for n, given in enumerate((PARIS, ROME))
        ),
    ),
    "all": Message("assistant", "I'll look.", "Hm.", (ToolCall("get_weather", json.dumps(ROME), "call00000"),)),
}


OTHERWISE = {
    "Apriel-1.6-15b-Thinker-fixed": "writes earlier reasoning without the words that its prompt begins it with",
    "GigaChat3-10B-A1.8B": "begins a call with the mark that ends a message",
    "Kimi-K3": "marks of several words",
    "MiniMax-M3": "each argument has a mark of its own",
    "NVIDIA-Nemotron-Nano-v2": "begins earlier answers with reasoning that it never ends",
    "google-gemma-4-31B-it": "arguments in a notation of its own",
    "google-gemma-4-31B-it-interleaved": "arguments in a notation of its own",
    "meetkai-functionary-medium-v3.2": "calls without a mark of their own",
    "muse-glimmer": "channels of its own",
}
"""Templates whose answers are not all read, and why: what is not known there is text."""
CONTROL = re.compile("<[|\uff5c][^<>]*[|\uff5c]>")


def read_back(template: ChatTemplate, syntax: AnswerSyntax, answer: Message) -> str:
    """Whether ``answer`` is read from what the template writes of it: ``read``, ``not written``, or what was read."""
    function: Any = TOOLS[0]["function"]
    tools = [Tool("get_weather", function["description"], function["parameters"])]
    given: dict[str, Any] = {"tools": TOOLS}
    turns = [Message("user", "What is the weather?"), answer]
    messages = [turn.to_template(arguments_as_text=syntax.arguments_as_text) for turn in turns]
    try:
        prompt = template.render(messages[:1], **given)
        closed = template.render([messages[0], {"role": "assistant", "content": "ggufmoeSays"}], **given, **CLOSED)
        whole = template.render(messages, **given, **CLOSED)
    except TemplateError:
        return "not written"
    known = [
        answer.content,
        answer.reasoning,
        *("Rome" if "Rome" in call.arguments else "Paris" for call in answer.tool_calls),
    ]
    if any(text not in whole for text in known):
        return "not written"
    pairs = enumerate(zip(prompt, whole, strict=False))
    begin = next((n for n, (one, other) in pairs if one != other), len(prompt))
    cut = re.search(r"[<\[][^<>\[\]\s]*$", whole[:begin])
    begin = cut.start() if cut else begin
    text = whole[begin:].removesuffix(closed.partition("ggufmoeSays")[2])
    # control tokens that are not asked for have no text
    text = CONTROL.sub(lambda found: found[0] if found[0] in syntax.marks else "", text)
    in_reasoning = prompt[:begin].rstrip().endswith(syntax.reasoning.opens)
    reader = AnswerReader(syntax, in_reasoning=in_reasoning, tools=tools)
    parts = [part for at in range(0, len(text), 3) for part in reader.push(text[at : at + 3])] + reader.finish()
    events = [Token(part, 0) if isinstance(part, str) else part for part in parts]
    found = message_of(events)
    calls = [(call.name, json.loads(call.arguments)) for call in found.tool_calls]
    expected = [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
    same = (found.content, found.reasoning, calls) == (answer.content, answer.reasoning, expected)
    return "read" if same else f"of {text!r} was read: {found}"


def main() -> int:
    """Compare everything; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    arguments, _ = parser.parse_known_args()
    paths = sorted((arguments.llama_cpp / "models" / "templates").glob("*.jinja"))
    answers = iter(references(arguments.peers_python, paths))
    by_case: dict[str, Counter[str]] = {case: Counter() for case in CASES}
    by_answer: dict[str, Counter[str]] = {name: Counter() for name in PARSED}
    whole = n_misread = 0
    for path in paths:
        template = ChatTemplate(path.read_text(encoding="utf-8"), name=path.name, bos="<s>", eos="</s>")
        found = {case: verdict(template, case, next(answers)) for case in CASES}
        whole += set(found.values()) <= {"equal", "refused"}
        for case, said in found.items():
            by_case[case][said.partition(":")[0]] += 1
            if said not in ("equal", "refused"):
                print(f"{path.name}: {case}: {said}")
        syntax = syntax_of(template)
        for name, answer in PARSED.items():
            said = read_back(template, syntax, answer)
            by_answer[name][said.partition(" of ")[0] if said in ("read", "not written") else "other"] += 1
            if said not in ("read", "not written") and path.stem not in OTHERWISE:
                n_misread += 1
                print(f"{path.name}: {name}: {said}")
    print(f"{'conversation':<20} {'equal':>6} {'refused by both':>16} {'different':>10}")
    for case, counts in by_case.items():
        wrong = counts.total() - counts["equal"] - counts["refused"]
        print(f"{case:<20} {counts['equal']:>6} {counts['refused']:>16} {wrong:>10}")
    print(f"\n{'answer':<20} {'read':>6} {'not written':>16} {'otherwise':>10}")
    for name, counts in by_answer.items():
        print(f"{name:<20} {counts['read']:>6} {counts['not written']:>16} {counts['other']:>10}")
    print(f"{whole} of {len(paths)} templates render as transformers renders them")
    for name, why in OTHERWISE.items():
        print(f"not all answers of {name} are read: {why}")
    return int(not paths or whole < len(paths) or n_misread > 0)


if __name__ == "__main__":
    sys.exit(main())
