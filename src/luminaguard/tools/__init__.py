"""What an agent can do in a machine: a few tools, each a command on a copy of the workspace."""

from luminaguard.tools.builtin import IN_MACHINE, Plan, as_asked, plan

__all__ = ["IN_MACHINE", "Plan", "as_asked", "plan"]
