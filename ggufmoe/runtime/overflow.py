"""Which tokens stay when a text has grown longer than the context.

Both policies that cut keep the beginning and the newest tokens, and leave room for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggufmoe.errors import ContextFullError
from ggufmoe.options import OverflowPolicy


@dataclass(frozen=True)
class Overflow:
    """``policy`` as ``ContextOptions.overflow`` describes it; the first ``n_keep`` tokens always stay."""

    policy: OverflowPolicy
    n_keep: int

    def cut(self, n_tokens: int, n_ctx: int) -> tuple[int, int]:
        """For a text of ``n_tokens``: how many tokens stay at its beginning, and how many after those are dropped."""
        if self.policy == "shift":
            head = min(self.n_keep, n_ctx // 2)
            left = head + (n_ctx - head) // 2
        else:
            left = n_ctx - n_ctx // 4
            head = min(max(self.n_keep, left // 2), left - n_ctx // 8)
        return head, n_tokens - left

    def fitted(self, prompt: Sequence[int], n_ctx: int) -> list[int]:
        """``prompt``, cut if it leaves no room for a single token; with the policy ``error``, ContextFullError then."""
        if len(prompt) < n_ctx:
            return list(prompt)
        if self.policy == "error":
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens and the context holds {n_ctx}: shorten it, ask for more with "
                "--ctx-size, or have it cut with --overflow"
            )
        head, n = self.cut(len(prompt), n_ctx)
        return [*prompt[:head], *prompt[head + n :]]
