"""Who does which step when: one port, and an adapter for one host and for a fleet.

A queue only says that a step can be done. What is true stands in the tasks' table, whose compare-and-set lets one
of two who did the same step save it; so a queue may say something twice, late, or again.
"""

from luminaguard.tasks.queues.port import Handler, Later, Queue

__all__ = ["Handler", "Later", "Queue"]
