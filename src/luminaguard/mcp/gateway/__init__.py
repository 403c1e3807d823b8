"""LuminaGuard as an MCP server: many servers behind one address. What a call may do is decided elsewhere."""

from luminaguard.mcp.gateway.server import Backend, Client, make_server

__all__ = ["Backend", "Client", "make_server"]
