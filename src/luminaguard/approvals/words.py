"""A request in words, as every front end shows it above its card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luminaguard.actions.model import Severity
from luminaguard.approvals.model import Judged, Request, State, Verdict
from luminaguard.effects.render import Line
from luminaguard.effects.text import visible

__all__ = ["CONFIRM", "answered", "duration", "heading", "judged_json", "request_json"]

CONFIRM = "publish"
"""What a person types to let go what is critical."""
_ENDED = {
    State.DENIED: "denied", State.RETURNED: "changes were asked for", State.STOPPED: "stopped",
    State.EXPIRED: "nobody answered in time, which is a denial",
}  # fmt: skip


def heading(request: Request, now_ns: int = 0, approved_by: Sequence[str] = ()) -> list[Line]:
    """What asks, how severe it is and why, and what it follows.

    Args:
        request: what is asked.
        now_ns: nanoseconds since the epoch; with it, how long it waits is said.
        approved_by: who approved it so far, where more than one must.
    """
    judged = request.judged
    loud = judged.severity in {Severity.HIGH, Severity.CRITICAL}
    ended = f"   (exit {request.exit_code})" if request.effect == "changeset" else ""
    lines: list[Line] = [
        ("path", f"{request.id}   {visible(' '.join(request.command))[:200]}{ended}"),
        (
            "loud" if loud else "plain",
            f"{judged.severity.value.upper()}: {visible(judged.reason)}   [{visible(judged.rule)}]",
        ),
    ]
    if request.workspace:
        lines.append(("plain", f"folder: {visible(request.workspace)}"))
    if request.task:
        lines.append(("plain", f"task: {visible(request.task)}"))
    if request.taint:
        lines.append(("loud", f"follows untrusted input: {visible(', '.join(request.taint))}"))
    if judged.people > 1:
        so_far = f"; so far: {visible(', '.join(approved_by))}" if approved_by else ""
        lines.append(("loud", f"{judged.people} different people must approve it{so_far}"))
    if now_ns and request.state in {State.PENDING, State.APPROVED}:
        left = duration((request.expires_ns - now_ns) / 1e9)
        lines.append(("plain", f"waits {left} more; then it counts as denied"))
    return lines


def ended_words(state: State, outcome: str) -> str:
    """How a request ended, for whoever asked."""
    words = _ENDED.get(state, state.value)
    return f"{words}: {visible(outcome)}" if outcome else words


def answered(verdict: Verdict, reason: str) -> str:
    """What became of a request by an answer that let nothing through."""
    return ended_words(verdict.state, reason)


def judged_json(judged: Judged) -> dict[str, Any]:
    """What the rules said, for programs."""
    return {"risk": judged.risk.value, "severity": judged.severity.value, "reason": judged.reason,
            "rule": judged.rule, "policy": judged.policy, "people": judged.people}  # fmt: skip


def request_json(request: Request) -> dict[str, Any]:
    """A request, for programs."""
    return {
        "id": request.id, "state": request.state.value, "effect": request.effect, "workspace": request.workspace,
        "digest": request.digest, "command": list(request.command), "exit_code": request.exit_code,
        "created_ns": request.created_ns, "expires_ns": request.expires_ns, "task": request.task,
        "taint": list(request.taint), "judged": judged_json(request.judged),
    }  # fmt: skip


def duration(seconds: float) -> str:
    """A span of time in its largest unit: ``3 h``."""
    whole = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"
