"""MCP: servers of tools, each in a machine of its own; what they define is pinned, what they say is data."""
