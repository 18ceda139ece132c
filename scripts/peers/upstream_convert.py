"""Run llama.cpp's convert_hf_to_gguf.py over a list of jobs in one process, because importing torch takes longer.

usage: upstream_convert.py LLAMA_CPP_DIR JOBS.json

A job is ``{"model": DIR, "outtype": "f32", "outfile": FILE, "pre": NAME or null, "log": FILE}``, with further
``flags`` where the model needs them. ``pre`` names the pre-tokenizer of a byte-level vocabulary: llama.cpp recognises
it by a hash over the ids of a sample text, so that it cannot know a vocabulary made for a test.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any


def convert(converter: Any, model_class: Any, job: dict[str, Any]) -> None:
    """One run of the converter, as its command line would do it."""
    recognise = model_class.get_vocab_base_pre
    if job["pre"]:
        model_class.get_vocab_base_pre = lambda self, tokenizer: job["pre"]
    flags = ["--outtype", job["outtype"], "--outfile", job["outfile"], *job.get("flags", ())]
    sys.argv = ["convert_hf_to_gguf.py", job["model"], *flags]
    try:
        converter.main()
    finally:
        model_class.get_vocab_base_pre = recognise


def main() -> int:
    """Convert all; what failed leaves no file and a log that says why."""
    sources, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    for job in jobs:
        with open(job["log"], "w", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            logging.basicConfig(stream=log, level=logging.INFO, force=True)
            try:
                convert(convert_hf_to_gguf, TextModel, job)
            except (Exception, SystemExit) as error:
                log.write(f"\n{type(error).__name__}: {error}\n")
                Path(job["outfile"]).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
