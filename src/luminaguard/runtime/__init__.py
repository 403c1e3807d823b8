"""The composition root, and what it composes: one action, and the decisions about its effects."""

from luminaguard.runtime.core import Runtime
from luminaguard.runtime.rehearsal import Execution, Status

__all__ = ["Execution", "Runtime", "Status"]
