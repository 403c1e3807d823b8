"""LuminaGuard: every action of an agent runs in a throwaway micro-VM; only approved effects leave it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
