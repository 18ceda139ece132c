"""What the server has done so far, as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ggufmoe.runtime.events import Timing


class Metrics:
    """Counts requests and tokens. Used by the event loop alone."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._n_prompt = self._n_cached = self._n_generated = 0
        self._prompt_s = self._generation_s = 0.0

    def count_request(self, path: str, status: int) -> None:
        """Count a request; ``path`` is one of the few that the server has."""
        self._requests[path, status] += 1

    def count_answers(self, timings: Iterable[Timing]) -> None:
        """Count answers that have ended."""
        for timing in timings:
            self._n_prompt += timing.prompt_tokens
            self._n_cached += timing.cached_tokens
            self._n_generated += timing.generated_tokens
            self._prompt_s += timing.prompt_s
            self._generation_s += timing.generation_s

    def text(self, n_under_way: int, n_reloads: int, *, is_loaded: bool) -> str:
        """All numbers; ``n_under_way`` are the answers that wait or are being computed."""
        lines = ["# HELP ggufmoe_requests_total Requests by path and status.", "# TYPE ggufmoe_requests_total counter"]
        for (path, status), n in sorted(self._requests.items()):
            lines.append(f'ggufmoe_requests_total{{path="{path}",status="{status}"}} {n}')
        for name, kind, what, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self._n_prompt),
            ("cached_tokens_total", "counter", "Tokens of prompts that were not computed again.", self._n_cached),
            ("generated_tokens_total", "counter", "Tokens of answers.", self._n_generated),
            ("prompt_seconds_total", "counter", "Seconds of computing prompts.", self._prompt_s),
            ("generation_seconds_total", "counter", "Seconds of computing answers.", self._generation_s),
            ("reloads_total", "counter", "How often the engine was lost.", n_reloads),
            ("answers_under_way", "gauge", "Answers that wait or are being computed.", n_under_way),
            ("model_loaded", "gauge", "Whether the model can answer.", int(is_loaded)),
        ):
            lines += [f"# HELP ggufmoe_{name} {what}", f"# TYPE ggufmoe_{name} {kind}", f"ggufmoe_{name} {value}"]
        return "\n".join(lines) + "\n"
