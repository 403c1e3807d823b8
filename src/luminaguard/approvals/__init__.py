"""Who allows an effect: request, decision, claim. Pure: keys, times and ids come in as arguments."""

from luminaguard.approvals.model import Decision, Request, State, Verdict, may_become
from luminaguard.approvals.signing import sign, verify

__all__ = ["Decision", "Request", "State", "Verdict", "may_become", "sign", "verify"]
