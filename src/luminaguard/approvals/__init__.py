"""Who allows an effect: request, decision, grant, claim. Pure: keys, times and ids come in as arguments."""

from luminaguard.approvals.grants import Grant, Limits, Scope
from luminaguard.approvals.model import Decision, Judged, Request, State, Verdict, may_become
from luminaguard.approvals.signing import key_id, sign, sign_grant, verify, verify_grant

__all__ = [
    "Decision",
    "Grant",
    "Judged",
    "Limits",
    "Request",
    "Scope",
    "State",
    "Verdict",
    "key_id",
    "may_become",
    "sign",
    "sign_grant",
    "verify",
    "verify_grant",
]
