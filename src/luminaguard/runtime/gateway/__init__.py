"""What stands behind the gateway: servers that are kept open, a folder's own tools, and the cliff before both."""

from luminaguard.runtime.gateway.backend import Gateway

__all__ = ["Gateway"]
