"""What becomes of a text that has grown longer than the context: which tokens stay.

Both ways of going on keep the beginning and the newest tokens, and leave room for more.
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
        """Of ``n_tokens`` too many: how many stay at the beginning, and how many after those are dropped."""
        if self.policy == "shift":
            head = min(self.n_keep, n_ctx // 2)
            left = head + (n_ctx - head) // 2
        else:
            left = n_ctx - n_ctx // 4
            head = min(max(self.n_keep, left // 2), left - n_ctx // 8)
        return head, n_tokens - left

    def fitted(self, prompt: Sequence[int], n_ctx: int) -> list[int]:
        """``prompt``, cut if it leaves no room for a single token. Raises ContextFullError under the policy error."""
        if len(prompt) < n_ctx:
            return list(prompt)
        if self.policy == "error":
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens and the context holds {n_ctx}: shorten it, ask for more with "
                "--ctx-size, or have it cut with --overflow"
            )
        head, n = self.cut(len(prompt), n_ctx)
        return [*prompt[:head], *prompt[head + n :]]
