"""Which experts every token went to, and with what weight: recorded, counted, drawn.

``record`` watches the graph while llama.cpp computes it, ``trace`` is what comes out, ``statistics`` are pure functions
of it, ``page`` and ``plot`` draw it. Nothing here changes what is computed.
"""

from ggufmoe.routing.record import RoutingTracer, trace_routing
from ggufmoe.routing.trace import RoutingTrace
from ggufmoe.runtime.events import RoutedToken

__all__ = ["RoutedToken", "RoutingTrace", "RoutingTracer", "trace_routing"]
