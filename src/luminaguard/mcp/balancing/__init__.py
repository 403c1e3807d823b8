"""Which endpoint gets a request, and whether it may be sent again: pure decisions, without a clock or I/O.

What happens comes in as facts with their time in seconds, from any clock that does not go back; what comes out
is what to do. :mod:`luminaguard.mcp.http` does it.
"""

from luminaguard.mcp.balancing.balancer import Balancer, Chance, Chosen, Nobody, Strategy, Waits
from luminaguard.mcp.balancing.budget import Budget
from luminaguard.mcp.balancing.endpoint import Attempt, Endpoint, Health, Tuning
from luminaguard.mcp.balancing.rules import Call, Fate, Verdict, verdict

__all__ = ["Attempt", "Balancer", "Budget", "Call", "Chance", "Chosen", "Endpoint", "Fate", "Health", "Nobody",
           "Strategy", "Tuning", "Verdict", "Waits", "verdict"]  # fmt: skip
