"""Ask ``ggufmoe serve`` through OpenAI's client and frameworks that are built on it; prints what works as a table.

usage: frameworks.py --frameworks-python PYTHON

The model is a scripted one: with tools it calls ``weather`` for Oslo when it is asked something, and else it says
"It is warm."; grammars hold its structured answers. Exit code 1 when something does not work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai_calls import started

from tests.scripted import Scripted

HERE = Path(__file__).parent
_TIMEOUT_S = 300
_CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
MODEL = Scripted(
    {
        "[assistant]": " It",
        " It": " is",
        " is": " warm",
        " warm": ".",
        "[calls]": "<tool_call>",
        "<tool_call>": _CALL,
        _CALL: "</tool_call>",
    },
    pieces=["[system]", "[user]", "[tool]", "[tools]"],
    controls=["<tool_call>", "</tool_call>"],
    chat_template="{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    '{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}{% endfor %}'
    "{% if add_generation_prompt %}[assistant]"
    "{% if tools and messages[-1].role == 'user' %}[calls]{% endif %}{% endif %}",
    n_ctx_train=8192,
)


def main() -> int:
    """Start the server, ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks-python", required=True, help="Python of the environment with the frameworks")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL.write(Path(folder) / "scripted.gguf")
        with started([sys.executable, "-m", "ggufmoe", "serve", str(model), "-np", "4"]) as url:
            found = list(_answers(asked.frameworks_python, f"{url}/v1"))
    wrong = [one for one in found if one["wrong"]]
    for one in found:
        print(f"{'wrong' if one['wrong'] else 'ok':6} {one['of']}: {one['what']} ({one['s']} s)  {one['wrong']}")
    print(f"{len(found) - len(wrong)} of {len(found)} work")
    return int(bool(wrong) or not found)


def _answers(python: str, base_url: str) -> Iterator[dict[str, Any]]:
    command = [python, str(HERE / "framework_calls.py"), base_url, "scripted"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"framework_calls.py failed:\n{done.stderr[-4000:]}")
    for line in done.stdout.splitlines():
        if line.startswith('{"of"'):
            yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
