"""Helpers that tests import, ours and those of people who build on LuminaGuard.

Nothing here replaces a machine: a test that says something about isolation boots a real one.
"""

from luminaguard.testing.homes import CommandResult, Home

__all__ = ["CommandResult", "Home"]
