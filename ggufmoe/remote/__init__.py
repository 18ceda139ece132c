"""Workers on other machines, and engines in child processes that use them.

``freeze_support`` is public: frozen apps that use workers call it first.
"""

from __future__ import annotations

from ggufmoe.remote.tasks import freeze_support as freeze_support
