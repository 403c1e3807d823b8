"""Tasks: what an agent was asked, moved on one durable step after another."""

from luminaguard.tasks.engine import Engine
from luminaguard.tasks.model import Status, Task

__all__ = ["Engine", "Status", "Task"]
