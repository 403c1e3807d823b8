"""Streamable HTTP to one server at one or several endpoints, as a transport below the SDK."""

from luminaguard.mcp.http.exchange import Target, Times
from luminaguard.mcp.http.transport import BalancedTransport, Failure, Trust

__all__ = ["BalancedTransport", "Failure", "Target", "Times", "Trust"]
