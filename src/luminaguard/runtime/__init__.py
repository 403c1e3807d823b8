"""The composition root, and what it composes: one action, and the decisions about its effects."""

from luminaguard.runtime.action import Execution, Status
from luminaguard.runtime.core import Runtime

__all__ = ["Execution", "Runtime", "Status"]
