"""Servers of tools: in machines or elsewhere, pinned, and called only as far as the rules and people let them."""

from luminaguard.runtime.mcp.servers import McpServers, Opened

__all__ = ["McpServers", "Opened"]
