"""What a hostile command tries in its machine: the attempts, the program that makes them, and the verdicts."""

from luminaguard.runtime.escapes.suite import ATTEMPTS, Attempt, Result, judge, run_suite

__all__ = ["ATTEMPTS", "Attempt", "Result", "judge", "run_suite"]
